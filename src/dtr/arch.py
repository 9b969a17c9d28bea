"""The only file that knows Hugging Face model internals: where attention sits, its geometry, masks, running layers.

Supported families share one skeleton: `model.model.layers[l].self_attn` with q/k/v/o projections, rotary positions and
pre-norm residual blocks. A new family of that skeleton is one line in `FAMILIES`.

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dtr.errors import ModelError
from dtr.ops.float32_linear import linear_in_float32

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""`config.model_type` to the prefix of the Hugging Face classes. SmolLM2 is a llama, Qwen2.5 a qwen2."""

HYBRID_PREFIX = "dtr_"
"""What a hybrid's model type puts before that of its family."""


TESTED = ("5.17", "5.23")
"""Oldest and newest transformers that all tests have passed with. Methods that it calls private are overridden here."""


def check_library() -> None:
    """Raise ModelError unless the installed transformers is one that was tested."""
    # Here, as this file may be imported while that package still is.
    import transformers

    oldest, newest = (tuple(map(int, version.split("."))) for version in TESTED)
    installed = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if not oldest <= installed <= newest:
        raise ModelError(
            "transformers",
            got=f"version {transformers.__version__}",
            expected=f"{TESTED[0]} to {TESTED[1]}, with which this was tested",
            hint=f"pip install 'transformers>={TESTED[0]},<{newest[0]}.{newest[1] + 1}', or a newer release of dtr.",
        )


@dataclass(frozen=True, kw_only=True)
class HeadGeometry:
    """What a mixer must know of the attention that it stands in for."""

    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys pass an RMS norm over the head dim before rotary positions (Qwen3)."""
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class BackboneGeometry(HeadGeometry):
    """Of an attention that was found by a probe (`dtr.backbone`), whose own module keeps projecting and norming."""

    value_dim: int
    """V, which some families have other than the head dim of queries and keys."""


def is_family(config: Any) -> bool:
    """Whether a config is of `FAMILIES`, or of a hybrid of one; other models are known by a probe (`dtr.backbone`)."""
    return config.model_type.removeprefix(HYBRID_PREFIX) in FAMILIES


def require_family(config: Any, where: str, *, hint: str, given: object = None) -> None:
    """Raise ModelError unless a config is of `FAMILIES`: `where` names what other models do not have yet.

    `given` is the setting's value, where it is a setting.
    """
    if not is_family(config):
        raise ModelError(
            where,
            got=f"{'' if given is None else f'{given} for '}model type '{config.model_type}'",
            expected=f"one of {', '.join(sorted(FAMILIES))}, which alone have this",
            hint=hint,
        )


def check_supported(config: Any) -> None:
    """Raise ModelError unless the config is of a causal model type of transformers, or of a hybrid of one."""
    if not is_family(config) and config.model_type.removeprefix(HYBRID_PREFIX) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            "teacher.source",
            got=f"model type '{config.model_type}'",
            expected="a causal language model with full attention of a type that transformers knows",
            hint="docs/models.md lists those that work; encoders and encoder-decoders are not supported.",
        )


def read_geometry(config: Any) -> HeadGeometry:
    """Head geometry of one attention layer, the same for all that can be replaced.

    Raises:
        ModelError: not of `FAMILIES`, whose attention a config describes, nor a hybrid that keeps its geometry.
    """
    check_supported(config)
    if getattr(config, "backbone", None):
        return BackboneGeometry(**config.backbone["geometry"])
    require_family(config, "model", hint="Use model.generate.")
    family = config.model_type.removeprefix(HYBRID_PREFIX)
    bias = bool(getattr(config, "attention_bias", False))
    return HeadGeometry(
        hidden_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        # Qwen2 has biases on q, k and v that its config does not mention.
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        qk_norm=family == "qwen3",
        norm_eps=config.rms_norm_eps,
    )


def model_class(model_type: str, suffix: str) -> type:
    """The Hugging Face class of a family, e.g. ("llama", "ForCausalLM") -> LlamaForCausalLM."""
    module = "configuration" if suffix == "Config" else "modeling"
    return getattr(
        importlib.import_module(f"transformers.models.{model_type}.{module}_{model_type}"),
        FAMILIES[model_type] + suffix,
    )


def is_classifier(model: Any) -> bool:
    """Whether the model scores classes at a sequence's last token (AutoModelForSequenceClassification)."""
    return not hasattr(model, "lm_head") and hasattr(model, "score")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    if is_family(model.config):
        return model.model.layers  # type: ignore[union-attr, return-value]
    from dtr.backbone.probe import backbone_of

    return model.get_submodule(backbone_of(model).layers)  # type: ignore[return-value]


def replaceable_layers(model: Any) -> list[int]:
    """Layers that a mixer can stand in for; others keep what they have."""
    if is_family(model.config):
        return list(range(model.config.num_hidden_layers))
    from dtr.backbone.probe import backbone_of

    return backbone_of(model).full_layers


def attention_of(model: Any, index: int) -> Any:
    """The attention module of a layer, for which a mixer can stand in."""
    layer: Any = decoder_layers(model)[index]
    if is_family(model.config):
        return layer.self_attn
    from dtr.backbone.probe import backbone_of

    place = backbone_of(model).places[index]
    assert place is not None, f"layer {index} has no full attention"
    return layer.get_submodule(place)


def run_body(model: Any, input_ids: torch.Tensor) -> Any:
    """One pass over (B, T) tokens without a cache, and without a head where that can be left out."""
    return (model.model if is_family(model.config) else model)(input_ids=input_ids, use_cache=False)


def with_mixer(layer: nn.Module, mixer: nn.Module | None) -> nn.Module:
    """A decoder layer that shares everything with `layer` but its attention; `layer` itself stays as it is.

    Raises:
        ModelError: the layer's forward pass was replaced on this one object, in a way that cannot be moved to a twin.
    """
    twin = copy.copy(layer)
    # copy.copy shares the dict of submodules, and assigning one would change the original.
    twin._modules = dict(layer._modules)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    for name, value in vars(layer).items():
        # Hooks (accelerate's device_map) put a forward pass of their own on the object, bound to the original.
        if (bound := _bound_to(twin, layer, value)) is not value:
            vars(twin)[name] = bound
    if mixer is not None and "forward" in vars(layer) and vars(twin)["forward"] is vars(layer)["forward"]:
        raise ModelError(
            "model",
            got="a decoder layer whose forward pass was replaced on the object, so that a copy runs the original",
            expected="layers as their class defines them, or with accelerate's hooks",
            hint="Load the model without what wraps its layers.",
        )
    if mixer is not None:
        _put(twin, getattr(mixer, "place", "self_attn"), mixer)
    return twin


def _put(twin: nn.Module, place: str, mixer: nn.Module) -> None:
    """Set a module at a path, with copies of what lies between."""
    name, _, rest = place.partition(".")
    if not rest:
        setattr(twin, name, mixer)
        return
    between = copy.copy(getattr(twin, name))
    between._modules = dict(between._modules)
    _put(between, rest, mixer)
    setattr(twin, name, between)


def _bound_to(twin: nn.Module, layer: nn.Module, value: Any) -> Any:
    """A method of `layer`, or a partial call with it, as that of `twin`; anything else as it is."""
    if isinstance(value, MethodType) and value.__self__ is layer:
        return MethodType(value.__func__, twin)
    if isinstance(value, partial) and any(x is layer for x in (*value.args, *value.keywords.values())):
        args, keywords = [twin if x is layer else x for x in value.args], value.keywords.items()
        return partial(value.func, *args, **{key: twin if x is layer else x for key, x in keywords})
    return value


@contextmanager
def capture_attention(model: nn.Module, layers: Sequence[int], visit: Any) -> Iterator[None]:
    """While open, call `visit(layer, hidden_BTD, context, output_BTD)` after each attention of `layers` has run.

    The context is what else a mixer reads: (cos, sin), or the whole call of an attention that was found by a probe.
    """
    by_probe = not is_family(model.config)

    def hook_for(index: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if by_probe:
                from dtr.backbone.probe import Call, first_of

                visit(index, hidden, Call(args, kwargs), first_of(output))
            else:
                visit(index, hidden, kwargs["position_embeddings"], output[0])

        return hook

    attentions: list[Any] = [attention_of(model, i) for i in layers]
    handles = [a.register_forward_hook(hook_for(i), with_kwargs=True) for i, a in zip(layers, attentions)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch of right-padded sequences on its way through the layers."""

    hidden_BTD: torch.Tensor
    positions: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    masks: dict[str, Any]
    """Attention mask by layer kind, in the form that the attention implementation takes; None for plain causal."""


def make_runner(model: Any) -> LayerRunner:
    """What runs the model's layers one by one."""
    if is_family(model.config):
        return LayerRunner(model)
    from dtr.backbone.runner import BackboneRunner

    return BackboneRunner(model)


class LayerRunner:
    """Runs a model's layers one by one, so that unchanged lower layers need not run again.

    Sequences start at position 0 and are padded on the right, which a causal model never sees; no padding mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.layers: list[nn.Module] = list(decoder_layers(model))
        # Tables and masks by shape of the batch.
        self._kept: dict[torch.Size, Prepared] = {}

    def prepare(self, input_ids: torch.Tensor) -> Prepared:
        """Embed `input_ids` (B, T) and make rotary tables and masks for that length."""
        body = self._model.model
        hidden = body.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        common = {
            "config": self._model.config,
            "inputs_embeds": hidden,
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions,
        }
        kinds = {layer_kind(self._model.config, i) for i in range(len(self.layers))}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return Prepared(
            hidden_BTD=hidden,
            positions=positions,
            rotary=body.rotary_emb(hidden, positions),
            masks={kind: makers[kind](**common) for kind in kinds},
        )

    def prepare_for_recording(self, input_ids: torch.Tensor) -> Prepared:
        """As `prepare`, with tables and masks made once for a shape, before a pass over it is recorded.

        While a CUDA stream is captured the library makes an explicit mask where it makes none otherwise, with which
        attention is slower, and compiled anew.
        """
        if input_ids.shape not in self._kept:
            batch = self.prepare(input_ids)
            self._kept[input_ids.shape] = replace(batch, hidden_BTD=batch.hidden_BTD.new_empty(0))
        return replace(self._kept[input_ids.shape], hidden_BTD=self.embed(input_ids))

    @property
    def can_branch(self) -> bool:
        """Whether attention takes the masks of `surroundings` and angles depend on the position alone."""
        rope = getattr(self._model.model.rotary_emb, "rope_type", "default")
        return self._model.config._attn_implementation in ("sdpa", "eager") and rope not in ("dynamic", "longrope")

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The first layer's input."""
        return self._model.model.embed_tokens(input_ids)

    def surroundings(
        self, hidden: torch.Tensor, positions_BT: torch.Tensor, keys_BS: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Rotary tables and attention masks by layer kind, for tokens at any positions that see keys at any positions.

        Args:
            hidden: any tensor of the model's dtype and device.
            positions_BT: the tokens' places in their sequences; -1 for padding, which may see anything.
            keys_BS: the keys' places; -1 for padding, which no token sees.
        """
        distance = positions_BT[:, :, None] - keys_BS[:, None]
        # A row that sees nothing would be 0 / 0.
        is_padding = (positions_BT < 0)[:, :, None]
        causal = (distance >= 0) & (keys_BS >= 0)[:, None]
        masks: dict[str, Any] = {}
        for kind in {layer_kind(self._model.config, i) for i in range(len(self.layers))}:
            seen = causal if kind == "full_attention" else causal & (distance < self._model.config.sliding_window)
            mask = (seen | is_padding)[:, None]
            if self._model.config._attn_implementation == "eager":
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
            masks[kind] = mask
        return self._model.model.rotary_emb(hidden, positions_BT.clamp(min=0)), masks

    def kind(self, index: int) -> str:
        """full_attention or sliding_attention: what the teacher's own attention of that layer sees."""
        return layer_kind(self._model.config, index)

    def run_layer(self, index: int, layer: nn.Module, hidden_BTD: torch.Tensor, batch: Prepared) -> torch.Tensor:
        """One decoder layer; `layer` may be the teacher's own or a twin of it with a mixer."""
        return layer(
            hidden_BTD,
            attention_mask=batch.masks[layer_kind(self._model.config, index)],
            position_ids=batch.positions,
            position_embeddings=batch.rotary,
            past_key_values=None,
            use_cache=False,
        )

    @property
    def num_outputs(self) -> int:
        """Logits of one position: tokens of the vocabulary, or classes."""
        config = self._model.config
        return config.num_labels if is_classifier(self._model) else config.vocab_size

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head of chosen positions (num_positions, D) -> (num_positions, vocab or classes).

        In float32 for models of half precision, so that near-ties do not turn with the batch they are computed in.
        """
        head = self._model.score if is_classifier(self._model) else self._model.lm_head
        normed = self._model.model.norm(hidden)
        # A head that is more than its weight, as with an adapter, computes in its own way.
        return linear_in_float32(normed, head.weight, head.bias) if type(head) is nn.Linear else head(normed).float()


def layer_kind(config: Any, index: int) -> str:
    """full_attention or sliding_attention: what the teacher's own attention of that layer sees."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[index]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
