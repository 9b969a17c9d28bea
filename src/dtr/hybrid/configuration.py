"""The configs of hybrids, one per family, and how the library comes to know hybrids.

`config.mixers` lists, per layer, None or {"kind": ..., options}. A field of our own is used because the stock forward
does not know `linear_attention` in `layer_types`.
"""

from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class HybridConfigMixin:
    """What a family's config needs to be a hybrid's."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        config: Any = self
        if config.mixers is None:
            config.mixers = [None] * config.num_hidden_layers
        # Servers choose their class by this name, and other packages have theirs under the name that ours has here.
        config.architectures = [name.replace("Hybrid", "Dtr", 1) for name in config.architectures or ()] or None
        # Whoever makes a hybrid's config is about to look up its model class.
        register_models()


class HybridLlamaConfig(HybridConfigMixin, LlamaConfig):
    """A Llama whose `mixers` names the linear layers."""

    model_type = "dtr_llama"
    mixers: list | None = None


class HybridMistralConfig(HybridConfigMixin, MistralConfig):
    """A Mistral whose `mixers` names the linear layers."""

    model_type = "dtr_mistral"
    mixers: list | None = None


class HybridQwen2Config(HybridConfigMixin, Qwen2Config):
    """A Qwen2 whose `mixers` names the linear layers."""

    model_type = "dtr_qwen2"
    mixers: list | None = None


class HybridQwen3Config(HybridConfigMixin, Qwen3Config):
    """A Qwen3 whose `mixers` names the linear layers."""

    model_type = "dtr_qwen3"
    mixers: list | None = None


CONFIGS = (HybridLlamaConfig, HybridMistralConfig, HybridQwen2Config, HybridQwen3Config)


def register_configs() -> None:
    """Make AutoConfig know hybrids. Imports no model class, so it can run while transformers is being imported."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Make AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification know hybrids."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from dtr.hybrid.modeling import CLASSIFIERS, HYBRIDS

    for auto, models in ((AutoModelForCausalLM, HYBRIDS), (AutoModelForSequenceClassification, CLASSIFIERS)):
        for model in models.values():
            auto.register(model.config_class, model, exist_ok=True)
            AutoModel.register(model.config_class, model.body_class, exist_ok=True)
