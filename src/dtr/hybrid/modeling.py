"""The hybrid as Hugging Face classes: a supported family with some attention modules replaced by linear mixers.

One config and one model class per family, so that everything the library knows of the family (device placement,
weight tying, generation) holds for the hybrid too.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)

from dtr.arch import HYBRID_PREFIX, decoder_layers, is_classifier, read_geometry, with_mixer
from dtr.errors import ModelError
from dtr.hybrid.cache import HybridCache
from dtr.hybrid.configuration import HybridLlamaConfig, HybridMistralConfig, HybridQwen2Config, HybridQwen3Config
from dtr.mixers import make_mixer

if TYPE_CHECKING:
    from transformers import GenerationMixin

    class _FamilyModel(PreTrainedModel, GenerationMixin):
        """What every family's model is; at run time the family's own class stands there."""

else:
    _FamilyModel = object


class HybridModelMixin(_FamilyModel):
    """What turns a family's causal language model into a hybrid."""

    config: Any
    model: Any
    tokenizer: Any

    def __init__(self, config: Any) -> None:
        if len(config.mixers) != config.num_hidden_layers:
            raise ModelError(
                "config.mixers",
                got=f"{len(config.mixers)} entries",
                expected=f"{config.num_hidden_layers}, one per layer",
                hint="The checkpoint's config.json was changed or damaged.",
            )
        super().__init__(config)
        geometry = read_geometry(config)
        for index, spec in enumerate(config.mixers):
            if spec is not None:
                options = {key: value for key, value in spec.items() if key != "kind"}
                self.model.layers[index].self_attn = make_mixer(spec["kind"], geometry, index, options)

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the layers whose attention is linear."""
        return [index for index, spec in enumerate(self.config.mixers) if spec is not None]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the family's forward; adds the hybrid cache and hands the padding mask to the mixers."""
        if past_key_values is not None and not isinstance(past_key_values, HybridCache):
            raise ModelError(
                "past_key_values",
                got=type(past_key_values).__name__,
                expected="HybridCache",
                hint="Leave past_key_values out, or make one with model.new_cache().",
            )
        wants_cache = self.config.use_cache if use_cache is None else use_cache
        if wants_cache and past_key_values is None:
            # In training the library would make a cache of its own, which linear layers cannot use.
            use_cache = not self.training
            past_key_values = None if self.training else self.new_cache()
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and self.linear_layers:
            kwargs["token_mask"] = attention_mask
        # A classification head knows no such argument.
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    def new_cache(self, max_cache_len: int | None = None) -> HybridCache:
        """An empty cache for this model, static with slots for `max_cache_len` tokens if that is given."""
        return HybridCache(self.config, max_cache_len)

    # Releases differ in what follows the first two arguments.
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:  # type: ignore[override]
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "hybrid", "static"):
            raise ModelError(
                "cache_implementation",
                got=f"'{kind}'",
                expected="none, 'dynamic' or 'static'",
                hint="A linear layer's state is small, so there is little to move away or to quantise.",
            )
        if kind == "static":
            # The library works out how long it must be and asks `_prepare_static_cache` for it.
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        elif generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> HybridCache:  # type: ignore[override]
        # As the library does: never shorter than the last one, whose compiled forward pass can then be used again.
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", 0))
        return self.new_cache(self._previous_max_cache_length)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the library's, which prepares a 4D mask for a static cache; the mixers need the padding as well."""
        library: Any = super()
        inputs = library.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        is_prepared = inputs.get("attention_mask") is not attention_mask
        if is_prepared and attention_mask is not None and attention_mask.dim() == 2 and self.linear_layers:
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            # Of a fixed size, so that a compiled step stays what it is.
            inputs["token_mask"] = attention_mask[:, -tokens.shape[1] :].contiguous()
        return inputs

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save weights, config and the code to load them without this package; the tokenizer too if it is known."""
        from dtr.hybrid.bundle import auto_map, write_code

        self.config.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        write_code(save_directory)
        if getattr(self, "tokenizer", None) is not None:
            self.tokenizer.save_pretrained(save_directory)


class HybridLlamaForCausalLM(HybridModelMixin, LlamaForCausalLM):
    """Llama (SmolLM2 and others) with linear layers."""

    config_class = HybridLlamaConfig


class HybridMistralForCausalLM(HybridModelMixin, MistralForCausalLM):
    """Mistral with linear layers."""

    config_class = HybridMistralConfig


class HybridQwen2ForCausalLM(HybridModelMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with linear layers."""

    config_class = HybridQwen2Config


class HybridQwen3ForCausalLM(HybridModelMixin, Qwen3ForCausalLM):
    """Qwen3 with linear layers."""

    config_class = HybridQwen3Config


class ClassifierMixin(_FamilyModel):
    """Builds body and head as the library does, but by class: its own way asks AutoModel, which knows no hybrids."""

    body_class: Any

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = self.body_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HybridLlamaForSequenceClassification(HybridModelMixin, ClassifierMixin, LlamaForSequenceClassification):
    """Llama with linear layers and a classification head."""

    config_class = HybridLlamaConfig
    body_class = LlamaModel


class HybridMistralForSequenceClassification(HybridModelMixin, ClassifierMixin, MistralForSequenceClassification):
    """Mistral with linear layers and a classification head."""

    config_class = HybridMistralConfig
    body_class = MistralModel


class HybridQwen2ForSequenceClassification(HybridModelMixin, ClassifierMixin, Qwen2ForSequenceClassification):
    """Qwen2 with linear layers and a classification head."""

    config_class = HybridQwen2Config
    body_class = Qwen2Model


class HybridQwen3ForSequenceClassification(HybridModelMixin, ClassifierMixin, Qwen3ForSequenceClassification):
    """Qwen3 with linear layers and a classification head."""

    config_class = HybridQwen3Config
    body_class = Qwen3Model


HYBRIDS = {
    cls.config_class.model_type: cls
    for cls in (HybridLlamaForCausalLM, HybridMistralForCausalLM, HybridQwen2ForCausalLM, HybridQwen3ForCausalLM)
}
CLASSIFIERS = {
    cls.config_class.model_type: cls
    for cls in (
        HybridLlamaForSequenceClassification,
        HybridMistralForSequenceClassification,
        HybridQwen2ForSequenceClassification,
        HybridQwen3ForSequenceClassification,
    )
}
"""As HYBRIDS, for models whose head scores classes instead of tokens."""


def make_hybrid(teacher_model: Any, mixers: Mapping[int, nn.Module], specs: Mapping[int, dict[str, Any]]) -> Any:
    """A hybrid that shares every module with the teacher but the replaced attentions; the teacher is not touched.

    Args:
        teacher_model: the model whose layers are kept, with a language model head or a classification head.
        mixers: layer index to the mixer in its place.
        specs: layer index to {"kind": ..., options}, as `config.mixers` stores it.
    """
    assert mixers.keys() == specs.keys(), "every mixer needs its spec"
    source = teacher_model.config
    cls: Any = (CLASSIFIERS if is_classifier(teacher_model) else HYBRIDS)[HYBRID_PREFIX + source.model_type]
    fields = {key: value for key, value in source.to_dict().items() if key not in ("model_type", "quantization_config")}
    config = cls.config_class(**fields, mixers=[specs.get(i) for i in range(source.num_hidden_layers)])
    config._attn_implementation = source._attn_implementation
    config.architectures = [cls.__name__]
    with torch.device("meta"):
        hybrid = cls(config)
    body, teacher_body = hybrid.model, teacher_model.model
    body.embed_tokens, body.norm, body.rotary_emb = (
        teacher_body.embed_tokens,
        teacher_body.norm,
        teacher_body.rotary_emb,
    )
    body.layers = nn.ModuleList(
        with_mixer(layer, mixers.get(index)) for index, layer in enumerate(decoder_layers(teacher_model))
    )
    if is_classifier(teacher_model):
        hybrid.score = teacher_model.score
    else:
        hybrid.lm_head = teacher_model.lm_head
        hybrid.generation_config = copy.deepcopy(teacher_model.generation_config)
    return hybrid.eval()
