"""What surrounds the attention or mixer of a decoder layer of the known families, as plain tensors for kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtr.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """What surrounds the attention or mixer of a decoder layer, as plain tensors."""

    mixing_norm: torch.Tensor
    mlp_norm: torch.Tensor
    norm_eps: float
    gate_up: tuple[torch.Tensor, torch.Tensor | None]
    """Weight (2 I, D) and bias of gate and up projection, one below the other."""
    down: tuple[torch.Tensor, torch.Tensor | None]


def block_weights(layer: Any) -> BlockWeights:
    """The norms and the gated MLP of a decoder layer."""
    return BlockWeights(
        mixing_norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        norm_eps=layer.input_layernorm.variance_epsilon,
        gate_up=stacked([layer.mlp.gate_proj, layer.mlp.up_proj]),
        down=stacked([layer.mlp.down_proj]),
    )


def stacked(projections: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of several linear maps of the same input as those of one; None where none has a bias.

    Raises:
        ModelError: one of them is more than a linear map, as an adapter or a quantised weight is.
    """
    for projection in projections:
        if type(projection) is not nn.Linear:
            raise ModelError(
                "model",
                got=f"a projection of type {type(projection).__name__}",
                expected="plain linear projections",
                hint="Merge adapters first (merge_and_unload), or use model.generate.",
            )
    weights: list[torch.Tensor] = [p.weight.detach() for p in projections]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if all(p.bias is None for p in projections):
        return weight, None
    biases: list[torch.Tensor] = [weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in projections]
    return weight, torch.cat(biases)


def rotary_table(model: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (num_positions, K) in the model's type.

    Raises:
        ModelError: the angles depend on the length of the text, so that there is no table of them.
    """
    kind = getattr(model.model.rotary_emb, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelError(
            "rope_parameters.rope_type",
            got=f"'{kind}', whose angles change with the length of the text",
            expected="angles that depend on the position alone",
            hint="Use model.generate, which takes every kind.",
        )
    positions = torch.arange(num_positions, device=model.device)[None]
    cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight[:1], positions)
    return cos[0].contiguous(), sin[0].contiguous()
