"""Packed sequences through a `GatedDeltaNet` layer in a fixed number of launches, whatever their number and lengths.

Each sequence is padded to whole chunks, where padding neither decays nor writes. `segments.py` carries the states.

Shapes: T tokens with padding, P sequences, D hidden dim, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dtr.ops.chunk_layout import ChunkLayout
from dtr.ops.decoding import delta_tokens, gated_product
from dtr.ops.gpu.delta_prompt_triton import Gates, map_chunks, scan_chunks, supports
from dtr.ops.gpu.gated_delta_prefill import prefill
from dtr.ops.gpu.segments import PackedStates
from dtr.ops.projections import DeltaProjection


@torch.no_grad()
def run(
    hidden_TD: torch.Tensor,
    projection: DeltaProjection,
    cos_TK: torch.Tensor,
    sin_TK: torch.Tensor,
    layout: ChunkLayout,
    initial_PHKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `dtr.ops.packed_prompts.delta_sequences`."""
    rows = hidden_TD, cos_TK, sin_TK
    hidden, cos, sin = rows if layout.is_whole else (x.index_select(0, layout.token) for x in rows)
    packed = PackedStates(layout=layout, initial_PHKV=initial_PHKV)
    way = _fused if supports(hidden[None], projection.head_dim) else _in_parts
    heads_TC, last = way(hidden, projection, cos, sin, packed)
    return heads_TC if layout.is_whole else heads_TC.index_select(0, layout.place), last


def _fused(
    hidden_TD: torch.Tensor,
    projection: DeltaProjection,
    cos_TK: torch.Tensor,
    sin_TK: torch.Tensor,
    packed: PackedStates,
) -> tuple[torch.Tensor, torch.Tensor]:
    p, mask = projection, packed.layout.is_text
    assert p.bias is not None, "the gates have biases"
    own = slice(p.num_head_rows, p.num_rows)
    decay, write = F.linear(hidden_TD, p.weight[own], p.bias[own]).float().t().split(p.num_heads)
    # The norm has run: nothing is left to divide by.
    gates = Gates(
        scale_BT=torch.ones(mask.shape, dtype=torch.float32, device=hidden_TD.device),
        gates_2BHT=torch.stack([-F.softplus(decay), torch.sigmoid(write)]).mul_(mask)[:, None].contiguous(),
    )
    rows = F.linear(hidden_TD, p.weight[: p.num_head_rows])[None]
    maps = map_chunks(rows, gates, p, cos_TK[None], sin_TK[None])
    heads, last = scan_chunks(rows, gates, maps, p, packed=packed)
    return heads[0], last


def _in_parts(
    hidden_TD: torch.Tensor,
    projection: DeltaProjection,
    cos_TK: torch.Tensor,
    sin_TK: torch.Tensor,
    packed: PackedStates,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = None if packed.layout.is_whole else packed.layout.is_text
    t = delta_tokens(hidden_TD[None], projection, cos_TK[None], sin_TK[None], mask)
    rows = (t.q_BTHK, t.k_BTHK, t.v_BTHK, t.log_decay_BTH, t.strength_BTH)
    out, last = prefill(*rows, scale=1.0, packed=packed)
    return gated_product(t.gate_BTC[0], out[0].flatten(1), activation="identity_gate"), last
