"""What we take for granted of a model's parts, and what in a given model is otherwise.

Each function looks at one thing and says in a few words what it found; nothing where all is as it should be.

Shapes: B batch, D hidden dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dtr.arch import HYBRID_PREFIX, decoder_layers

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_NAMED = 5
"""Weights that a message names; of more it tells the number."""


def some(names: list[str]) -> str:
    """A few names, and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def missing_parts(model: Any) -> str:
    """Whether the model is one of the library's with body, layers and head where we look for them."""
    if not isinstance(model, PreTrainedModel):
        return f"a {type(model).__name__}"
    body = getattr(model, "model", None)
    parts = [name for name in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(body, name)]
    if not parts and not hasattr(model, "lm_head") and not hasattr(model, "score"):
        parts = ["lm_head or score"]
    if parts:
        return f"a {type(model).__name__} without {', '.join(parts)}"
    layers = decoder_layers(model)
    if len(layers) != model.config.num_hidden_layers:
        return f"{len(layers)} layers where config.json says {model.config.num_hidden_layers}"
    without = [str(index) for index, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    return f"no self_attn in layer {some(without)}" if without else ""


def scattered_weights(model: Any) -> str:
    """Whether weights lie on several devices, or are not in memory at all."""
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if "meta" in devices:
        return "weights that are offloaded"
    return f"weights on {' and '.join(devices)}" if len(devices) > 1 else ""


def non_finite_weights(model: Any) -> str:
    """Whether a weight holds NaN or infinity."""
    # A sum shows them too, and needs no copy; of finite weights it stays far below what float32 holds.
    bad = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not torch.isfinite(weight.sum(dtype=torch.float32))
    ]
    return f"NaN or infinity in {some(bad)}" if bad else ""


def ignored_settings(config: Any) -> str:
    """Whether a setting says that attention sees less than the family's code makes of it."""
    family, kinds = config.model_type.removeprefix(HYBRID_PREFIX), getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if family == "llama" and window:
        return f"sliding_window {window}, which the forward pass of a {family} ignores and its cache does not"
    # Mistral goes by sliding_window alone.
    usual = {"sliding_attention" if family == "mistral" and window else "full_attention"}
    if family in ("llama", "mistral") and kinds and set(kinds) != usual:
        return f"layer_types with {', '.join(sorted({*kinds} - usual))}, which the forward pass of a {family} ignores"
    return ""


def strange_projections(model: Any) -> str:
    """Whether a projection of an attention is more than a linear map: an adapter, a quantised or a patched one."""
    for index, layer in enumerate(decoder_layers(model)):
        for name in PROJECTIONS:
            projection = getattr(layer.self_attn, name, None)
            if type(projection) is not nn.Linear:
                kind = type(projection)
                return f"{name} of layer {index} as a {kind.__module__}.{kind.__name__}"
            if not projection.weight.is_floating_point():
                return f"{name} of layer {index} in {projection.weight.dtype}"
    return ""


def first_token_output(config: Any, attention: Any, hidden_B1D: torch.Tensor) -> torch.Tensor:
    """What causal attention gives at the first token by its weights: its own value, as softmax over one key is 1."""
    value = F.linear(hidden_B1D, attention.v_proj.weight, attention.v_proj.bias)
    groups = value.unflatten(-1, (config.num_key_value_heads, -1))
    repeated = groups.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=-2)
    return F.linear(repeated.flatten(-2), attention.o_proj.weight, attention.o_proj.bias)
