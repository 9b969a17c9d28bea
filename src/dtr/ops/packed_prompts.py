"""Prompts of any lengths, packed one after the other, through a `GatedDeltaNet` layer, with states that may go on.

The kernels (`gpu/packed_prompts_triton.py`) take all sequences in one launch; the plain form goes from one to the next.

Shapes: T packed tokens, P sequences, D hidden dim, H heads, K head dim, V value dim (= K), R rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dtr.ops.chunk_layout import ChunkLayout
from dtr.ops.decoding import gated_product, rotate_heads
from dtr.ops.dispatch import gated_delta_rule
from dtr.ops.projections import DeltaProjection
from dtr.ops.quadratic_features import quadratic_features


def delta_sequences(
    hidden_TD: torch.Tensor,
    projection: DeltaProjection,
    cos_TK: torch.Tensor,
    sin_TK: torch.Tensor,
    layout: ChunkLayout,
    initial_PHKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences through the layer, from hidden states after their norm to the output projection's input.

    Args:
        hidden_TD: hidden states; the norm of `projection` has run.
        projection: the layer's input projections.
        cos_TK: cosines of each token's position; `sin_TK` likewise.
        layout: where sequences begin.
        initial_PHKV: float32, the states before the first tokens.

    Returns:
        The gated heads (T, H K) and the last states (P, H, K, V) in float32.
    """
    if hidden_TD.is_cuda:
        from dtr.ops.gpu.packed_prompts_triton import run

        return run(hidden_TD, projection, cos_TK, sin_TK, layout, initial_PHKV)
    q, k, v, gate, log_decay, strength = tokens(hidden_TD, projection, cos_TK, sin_TK)
    outs, lasts = [], []
    for rows, state in zip(_sequences(layout), initial_PHKV):
        parts = (x[None, rows] for x in (q, k, v, log_decay, strength))
        out, last = gated_delta_rule(*parts, scale=1.0, state_BHKV=state[None])
        outs.append(out[0])
        lasts.append(last)
    heads = torch.cat(outs).flatten(1)
    return gated_product(gate, heads, activation="identity_gate"), torch.cat(lasts)


def tokens(
    hidden_TD: torch.Tensor, projection: DeltaProjection, cos_TK: torch.Tensor, sin_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each token has by itself: q, k, v (T, H, K), output gate (T, H K), log decay and write strength (T, H)."""
    num_heads, dim, norms = projection.num_heads, projection.head_dim, projection.norms
    width = num_heads * dim
    rows = F.linear(hidden_TD, projection.weight, projection.bias)[:, : projection.num_rows]
    *wide, decay, write = rows.split([width] * (projection.num_head_rows // width) + [num_heads] * 2, dim=-1)
    gate = wide[3]
    q, k, v, _, *mixes = (x.unflatten(-1, (num_heads, dim)) for x in wide)
    if projection.quadratic:
        q, k = (quadratic_features(x, mix) for x, mix in zip((q, k), mixes))
    eps = 0.0 if norms is None else norms.eps
    weights = (None, None) if norms is None else (norms.query, norms.key)
    angles = (cos_TK[None], sin_TK[None])
    q, k = (
        rotate_heads(x[None], *angles, norm_weight=weight, eps=eps, unit_length=True)[0]
        for x, weight in zip((q, k), weights)
    )
    return q, k, v, gate, -F.softplus(decay.float()), torch.sigmoid(write.float())


def _sequences(layout: ChunkLayout) -> list[slice]:
    starts = [*layout.first_token.tolist(), len(layout.place)]
    return [slice(*starts[i : i + 2]) for i in range(len(starts) - 1)]
