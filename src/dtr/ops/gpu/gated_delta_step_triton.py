"""One token of the gated delta rule in Triton: the state is read once and written once, which is what a step costs.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - k_t^T exp(g_t) S_{t-1})^T,    o_t = scale * q_t^T S_t

Shapes: B batch, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FULL = 1024
"""Sequences times heads from which on a GPU is full without splitting the values."""


@triton.jit
def _step(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, o_ptr, new_ptr, scale, K: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Grid (B H, V / BV)."""
    bh, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV + tl.arange(0, BV)
    i = tl.arange(0, K)
    q, k = tl.load(q_ptr + bh * K + i).to(tl.float32), tl.load(k_ptr + bh * K + i).to(tl.float32)
    v = tl.load(v_ptr + bh * V + j).to(tl.float32)
    decay, beta = tl.exp(tl.load(g_ptr + bh).to(tl.float32)), tl.load(beta_ptr + bh).to(tl.float32)
    tile = bh * K * V + i[:, None] * V + j[None, :]
    state = decay * tl.load(state_ptr + tile).to(tl.float32)
    # Both sums over the state as it came in, so that neither waits for the other: q (S + k w^T) = q S + (q k) w^T.
    read, o = tl.sum(k[:, None] * state, axis=0), tl.sum(q[:, None] * state, axis=0)
    written = beta * (v - read)
    tl.store(new_ptr + tile, state + k[:, None] * written[None, :])
    o = scale * (o + tl.sum(q * k, axis=0) * written)
    tl.store(o_ptr + bh * V + j, o.to(o_ptr.dtype.element_ty))


def step(
    q_BHK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g_BH: torch.Tensor,
    beta_BH: torch.Tensor,
    state_BHKV: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_delta.step`, without gradients; K and V powers of two of at least 16. The state stays as it was."""
    q, k, v, g, beta, state = (x.contiguous() for x in (q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV))
    (B, H, K), V = q.shape, v.shape[-1]
    o, new = torch.empty_like(v), torch.empty_like(state, dtype=torch.float32)
    BV = V if B * H >= _FULL else max(16, V // 4)
    scale = K**-0.5 if scale is None else scale
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        _step[(B * H, V // BV)](q, k, v, g, beta, state, o, new, scale, K=K, V=V, BV=BV, num_warps=4)
    return o, new
