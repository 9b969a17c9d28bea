"""Prompts of any lengths, packed one after the other, through a `GatedDeltaNet` layer, with states that may go on.

The kernels (`gpu/packed_prompts_triton.py`) take all sequences in one launch; the plain form goes from one to the next.

Shapes: T packed tokens, P sequences, D hidden dim, H heads, K head dim, V value dim (= K), R rows.
"""

from __future__ import annotations

import torch

from dtr.ops.chunk_layout import ChunkLayout
from dtr.ops.decoding import delta_tokens, gated_product
from dtr.ops.dispatch import gated_delta_rule
from dtr.ops.projections import DeltaProjection


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
    t = delta_tokens(hidden_TD[None], projection, cos_TK[None], sin_TK[None])
    outs, lasts = [], []
    for rows, state in zip(_sequences(layout), initial_PHKV):
        parts = (x[:, rows] for x in (t.q_BTHK, t.k_BTHK, t.v_BTHK, t.log_decay_BTH, t.strength_BTH))
        out, last = gated_delta_rule(*parts, scale=1.0, state_BHKV=state[None])
        outs.append(out[0])
        lasts.append(last)
    heads = torch.cat(outs).flatten(1)
    return gated_product(t.gate_BTC[0], heads, activation="identity_gate"), torch.cat(lasts)


def _sequences(layout: ChunkLayout) -> list[slice]:
    starts = [*layout.first_token.tolist(), len(layout.place)]
    return [slice(*starts[i : i + 2]) for i in range(len(starts) - 1)]
