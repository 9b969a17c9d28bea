"""The hybrid as Hugging Face classes: a supported family with some attention modules replaced by linear mixers.

One config and one model class per family, so that everything the library knows of the family (device placement,
weight tying, generation) holds for the hybrid too.
"""

import copy
import os
from collections.abc import Collection, Mapping
from pathlib import Path
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

from dtr.arch import HYBRID_PREFIX, decoder_layers, is_classifier, is_family, with_mixer
from dtr.errors import DeviceError, ModelError
from dtr.hybrid.body import BodyMixin
from dtr.hybrid.cache import HybridCache
from dtr.hybrid.configuration import HybridLlamaConfig, HybridMistralConfig, HybridQwen2Config, HybridQwen3Config

if TYPE_CHECKING:
    from transformers import GenerationMixin

    class _FamilyModel(PreTrainedModel, GenerationMixin):
        """What every family's model is; at run time the family's own class stands there."""

else:
    _FamilyModel = object


class HybridModelMixin(_FamilyModel):
    """What turns a family's model with a head into a hybrid.

    Body and head are built by class: the library's own ways know no hybrids.
    """

    config: Any
    model: Any
    tokenizer: Any
    body_class: Any
    code_entry = "dtr.hybrid.modeling"
    """The module that has the class, for whoever loads it without this package."""
    head: str
    """Where the head is: `lm_head`, or `score` of a classifier."""
    _saved_beside: Collection[str] = ()
    """Names of what `save_pretrained` has last written beside the weights."""

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.body_class(config)
        self.vocab_size, self.num_labels = config.vocab_size, config.num_labels
        num_outputs = self.vocab_size if self.head == "lm_head" else self.num_labels
        setattr(self, self.head, nn.Linear(config.hidden_size, num_outputs, bias=False))
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As the library's, which only warns of weights that are missing and runs with random ones.

        With `output_loading_info` the caller is told of them instead. A head of another kind than the saved one, as for
        fine-tuning a classifier, starts at random as ever.

        Raises:
            ModelError: weights are missing, or there are some that the config has no place for; says which.
        """
        library: Any = super()
        model, told = library.from_pretrained(*args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, told
        has_own_head = cls.__name__ in (model.config.architectures or ())
        heads = () if has_own_head else ("lm_head.", "score.")
        wrong = sorted(n for n in (*told["missing_keys"], *told["unexpected_keys"]) if not n.startswith(heads))
        if wrong:
            raise ModelError(
                str(args[0] if args else kwargs.get("pretrained_model_name_or_path")),
                got=f"{len(wrong)} weights that are missing or have no place in its config ({', '.join(wrong[:3])})",
                expected="every weight of the hybrid",
                hint="The checkpoint is incomplete or its config.json was changed: save the hybrid again.",
            )
        return model

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the layers whose attention is linear."""
        return [index for index, spec in enumerate(self.config.mixers) if spec is not None]

    @property
    def _is_stateful(self) -> bool:  # type: ignore[override]
        """What the library asks before assisted generation, which takes tokens back."""
        return bool(self.linear_layers)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, for hybrids without linear layers.

        Raises:
            ModelError: there are linear layers, for whose states that has no place.
        """
        if self.linear_layers:
            raise ModelError(
                "generate_batch",
                got=f"a hybrid with {len(self.linear_layers)} linear layers",
                expected="attention alone: continuous batching does not support states of linear layers",
                hint="Use generate, with a batch padded on the left; or export the hybrid for a server (dtr export).",
            )
        library: Any = super()
        return library.init_continuous_batching(*args, **kwargs)

    def new_cache(self, max_cache_len: int | None = None) -> HybridCache:
        """An empty cache for this model, static with slots for `max_cache_len` tokens if that is given."""
        return HybridCache(self.config, max_cache_len)

    # Releases differ in what follows the first two arguments.
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:  # type: ignore[override]
        if generation_config.is_assistant and self.linear_layers:
            raise ModelError(
                "assistant_model",
                got="a hybrid with linear layers",
                expected="attention alone: assisted generation is not supported with states that cannot go back",
                hint="Take an assistant without linear layers, or leave it out.",
            )
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
        if self.linear_layers and inputs.get("attention_mask") is not attention_mask:
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            if attention_mask is None:
                attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            # Of a fixed size, so that a compiled step stays what it is.
            inputs["token_mask"] = attention_mask[:, -tokens.shape[1] :].contiguous()
        return inputs

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, *, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save weights, config and the code to load them without this package; the tokenizer too if it is known.

        All of it is there before the library uploads what is new in the folder, if it is asked to (`push_to_hub`).
        """
        from dtr.hybrid.bundle import auto_map, write_code

        self.config.auto_map = auto_map(type(self))
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            # Those of a hybrid that was here before would not fit.
            Path(save_directory, "dtr-checksums.json").unlink(missing_ok=True)
            beside = [str(file) for file in write_code(save_directory, self.code_entry)]
            if getattr(self, "tokenizer", None) is not None:
                beside += self.tokenizer.save_pretrained(save_directory)
            self._saved_beside = {os.path.relpath(file, save_directory).split(os.sep)[0] for file in beside}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """As the library's, which uploads what is newer; what was written beside the weights is new as well."""
        library: Any = super()
        stamps = library._get_files_timestamps(working_dir)
        return {name: stamp for name, stamp in stamps.items() if name not in self._saved_beside}


class HybridLlamaModel(BodyMixin, LlamaModel):
    """Llama (SmolLM2 and others) with linear layers, without a head."""

    config_class = HybridLlamaConfig


class HybridLlamaForCausalLM(HybridModelMixin, LlamaForCausalLM):
    """Llama (SmolLM2 and others) with linear layers."""

    config_class, body_class, head = HybridLlamaConfig, HybridLlamaModel, "lm_head"


class HybridLlamaForSequenceClassification(HybridModelMixin, LlamaForSequenceClassification):
    """Llama (SmolLM2 and others) with linear layers and a classification head."""

    config_class, body_class, head = HybridLlamaConfig, HybridLlamaModel, "score"


class HybridMistralModel(BodyMixin, MistralModel):
    """Mistral with linear layers, without a head."""

    config_class = HybridMistralConfig


class HybridMistralForCausalLM(HybridModelMixin, MistralForCausalLM):
    """Mistral with linear layers."""

    config_class, body_class, head = HybridMistralConfig, HybridMistralModel, "lm_head"


class HybridMistralForSequenceClassification(HybridModelMixin, MistralForSequenceClassification):
    """Mistral with linear layers and a classification head."""

    config_class, body_class, head = HybridMistralConfig, HybridMistralModel, "score"


class HybridQwen2Model(BodyMixin, Qwen2Model):
    """Qwen2 and Qwen2.5 with linear layers, without a head."""

    config_class = HybridQwen2Config


class HybridQwen2ForCausalLM(HybridModelMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with linear layers."""

    config_class, body_class, head = HybridQwen2Config, HybridQwen2Model, "lm_head"


class HybridQwen2ForSequenceClassification(HybridModelMixin, Qwen2ForSequenceClassification):
    """Qwen2 and Qwen2.5 with linear layers and a classification head."""

    config_class, body_class, head = HybridQwen2Config, HybridQwen2Model, "score"


class HybridQwen3Model(BodyMixin, Qwen3Model):
    """Qwen3 with linear layers, without a head."""

    config_class = HybridQwen3Config


class HybridQwen3ForCausalLM(HybridModelMixin, Qwen3ForCausalLM):
    """Qwen3 with linear layers."""

    config_class, body_class, head = HybridQwen3Config, HybridQwen3Model, "lm_head"


class HybridQwen3ForSequenceClassification(HybridModelMixin, Qwen3ForSequenceClassification):
    """Qwen3 with linear layers and a classification head."""

    config_class, body_class, head = HybridQwen3Config, HybridQwen3Model, "score"


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


def make_hybrid(
    teacher_model: Any,
    mixers: Mapping[int, nn.Module],
    specs: Mapping[int, dict[str, Any]],
    *,
    share_modules: bool = False,
) -> Any:
    """A hybrid of a teacher's layers and mixers in the place of some attentions; the teacher is not touched.

    The hybrid has modules and weights of its own, so that whatever is done to it (training, adapters merged in, another
    type, more tokens) stays with it. Sharing storage would not do: an optimizer's step and a merge change it in place.

    Args:
        teacher_model: the model whose layers are kept, with a language model head or a classification head.
        mixers: layer index to the mixer in its place.
        specs: layer index to {"kind": ..., options}, as `config.mixers` stores it.
        share_modules: take the teacher's own modules, without a copy: for a hybrid that is only run or saved, by who
            does not hand it on.

    Raises:
        DeviceError: no memory for the copies.
    """
    assert mixers.keys() == specs.keys(), "every mixer needs its spec"
    if not is_family(teacher_model.config):
        from dtr.hybrid.backbone import make_backbone_hybrid

        return make_backbone_hybrid(teacher_model, mixers, specs, share_modules=share_modules)
    source = teacher_model.config
    cls: Any = (CLASSIFIERS if is_classifier(teacher_model) else HYBRIDS)[HYBRID_PREFIX + source.model_type]
    fields = {key: value for key, value in source.to_dict().items() if key not in ("model_type", "quantization_config")}
    placed = [dict(specs[i]) if i in specs else None for i in range(source.num_hidden_layers)]
    config = cls.config_class(**fields, mixers=placed)
    config._attn_implementation = source._attn_implementation
    config.architectures = [cls.__name__]
    with torch.device("meta"):
        hybrid = cls(config)
    teacher_body, head = teacher_model.model, hybrid.head
    layers = nn.ModuleList(
        with_mixer(layer, mixers.get(index)) for index, layer in enumerate(decoder_layers(teacher_model))
    )
    parts = [
        teacher_body.embed_tokens,
        layers,
        teacher_body.norm,
        teacher_body.rotary_emb,
        getattr(teacher_model, head),
    ]
    if not share_modules:
        parts = _own_copies(parts, {id(source): config})
    body = hybrid.model
    body.embed_tokens, body.layers, body.norm, body.rotary_emb = parts[:4]
    setattr(hybrid, head, parts[4])
    if not is_classifier(teacher_model):
        hybrid.generation_config = copy.deepcopy(teacher_model.generation_config)
    return hybrid.eval()


def _own_copies(parts: list[nn.Module], instead: dict[int, Any]) -> list[nn.Module]:
    """Copies of modules, tied weights tied again, with other objects in the place of those whose `id` is given."""
    try:
        return copy.deepcopy(parts, instead)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "memory",
            got="none left for a copy of the layers that hybrid and teacher have in common",
            expected="room for a second model of the teacher's size",
            hint="Save the hybrid instead (dtr search --out, dtr run) and load it without the teacher.",
        ) from error
