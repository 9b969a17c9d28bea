"""Triton kernels of recurrences that decay per key channel; `channel_decay_triton.py` launches them and has the maths.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, C = 32 tokens of a chunk, N chunks; BK and BV are blocks of
K and V. Token tensors are contiguous (B, T, H, dim); per-chunk tensors are contiguous (B*H, N, rows, columns). DELTA
says whether the recurrence has the delta rule; without it what only that needs is None.

For transposed products see `gated_delta_kernels.py`: what is transposed here was loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gpu.gated_delta_kernels import (
    _dot,
    _head,
    _inverse_of_unit_lower,
    _load_scalars,
    _load_tokens,
    _tile,
    _token_tile,
    _transposed,
)


@triton.jit
def _centred_sums(g, LOWEST: tl.constexpr):
    """(C, K) running sums of max(g, LOWEST) less half their total, and that half (K,): exponents of either sign."""
    g = tl.maximum(g, LOWEST)
    half = 0.5 * tl.sum(g, axis=0)
    return tl.cumsum(g, axis=0) - half[None, :], half


@triton.jit
def _load_half(half_ptr, index, K: tl.constexpr, first, BK: tl.constexpr):
    """(BK,) of the half totals of chunk `index`."""
    return tl.load(half_ptr + index.to(tl.int64) * K + first + tl.arange(0, BK))


@triton.jit(do_not_specialize=["T"])
def chunk_factors(
    q_ptr, k_ptr, g_ptr, read_ptr, probe_ptr, write_ptr, half_ptr, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOWEST: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Per chunk of keys and queries with their decays: reads, probes and writes, and the half totals.

    Made once, as the scans and products that need them would each take exp of all of it again.
    """
    bh, n = tl.program_id(0), tl.program_id(1)
    index = bh * tl.num_programs(1) + n
    row = _head(bh, n * C, T, H)
    valid = n * C + tl.arange(0, C) < T
    dtype = k_ptr.dtype.element_ty
    centred, half = _centred_sums(_load_tokens(g_ptr, row, valid, H, K, 0, C, K).to(tl.float32), LOWEST)
    tl.store(half_ptr + index.to(tl.int64) * K + tl.arange(0, K), half)
    since, until = tl.exp(centred), tl.exp(-centred)
    q = _load_tokens(q_ptr, row, valid, H, K, 0, C, K).to(tl.float32)
    tl.store(_tile(read_ptr, index, C, K, 0, C, 0, K), (q * since).to(dtype))
    k = _load_tokens(k_ptr, row, valid, H, K, 0, C, K).to(tl.float32)
    tl.store(_tile(write_ptr, index, C, K, 0, C, 0, K), (k * until).to(dtype))
    if DELTA:
        tl.store(_tile(probe_ptr, index, C, K, 0, C, 0, K), (k * since).to(dtype))


@triton.jit(do_not_specialize=["T"])
def chunk_inverse(
    probe_ptr, write_ptr, beta_ptr, inverse_ptr, T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Per chunk (I + A)^-1 with A_ij = beta_i probe_i.write_j below the diagonal.

    A kernel of its own, so that the writes that it transposes are loaded.
    """
    bh, n = tl.program_id(0), tl.program_id(1)
    index = bh * tl.num_programs(1) + n
    i = tl.arange(0, C)
    probe = tl.load(_tile(probe_ptr, index, C, K, 0, C, 0, K))
    write = tl.load(_tile(write_ptr, index, C, K, 0, C, 0, K))
    beta = _load_scalars(beta_ptr, _head(bh, n * C, T, H), n * C + i < T, H, C)
    # Above the diagonal products may be infinite.
    a = tl.where(i[:, None] > i[None, :], beta[:, None] * _dot(probe, tl.trans(write)), 0.0)
    inverse = _inverse_of_unit_lower(a)
    tl.store(_tile(inverse_ptr, index, C, C, 0, C, 0, C), inverse.to(inverse_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def state_scan(
    probe_ptr, write_ptr, half_ptr, v_ptr, beta_ptr, inverse_ptr, initial_ptr, update_ptr, state_ptr, final_ptr, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Carry the state over the chunks of one head and BV value columns; store each chunk's decayed state and its u."""
    bh, first = tl.program_id(0), tl.program_id(1) * BV
    dtype = write_ptr.dtype.element_ty
    num_chunks = tl.cdiv(T, C)
    i = tl.arange(0, C)
    if HAS_INITIAL:
        state = tl.load(_tile(initial_ptr, bh, K, V, 0, K, first, BV)).to(tl.float32)
    else:
        state = tl.zeros([K, BV], dtype=tl.float32)
    for n in range(num_chunks):
        index = bh * num_chunks + n
        row = _head(bh, n * C, T, H)
        valid = n * C + i < T
        at_write = _tile(write_ptr, index, C, K, 0, C, 0, K)
        write_t = _transposed(tl.load(at_write), at_write, valid)
        kept = tl.exp(_load_half(half_ptr, index, K, 0, K))[:, None]
        v = _load_tokens(v_ptr, row, valid, H, V, first, C, BV)

        state *= kept
        narrow = state.to(dtype)
        tl.store(_tile(state_ptr, index, K, V, 0, K, first, BV), narrow)
        if DELTA:
            probe = tl.load(_tile(probe_ptr, index, C, K, 0, C, 0, K))
            inverse = tl.load(_tile(inverse_ptr, index, C, C, 0, C, 0, C))
            beta = _load_scalars(beta_ptr, row, valid, H, C)
            residual = beta[:, None] * (v.to(tl.float32) - _dot(probe, narrow))
            update = _dot(inverse, residual.to(dtype)).to(dtype)
            tl.store(_token_tile(update_ptr, row, H, V, first, C, BV), update, mask=valid[:, None])
        else:
            update = v
        state = kept * (state + _dot(write_t, update))
    tl.store(_tile(final_ptr, bh, K, V, 0, K, first, BV), state)


@triton.jit(do_not_specialize=["T"])
def chunk_output(
    read_ptr, write_ptr, update_ptr, state_ptr, o_ptr, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o = scale * (read S + P u), P_ij = read_i.write_j for j <= i, all chunks in parallel."""
    bh, n, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    index = bh * tl.num_programs(1) + n
    row = _head(bh, n * C, T, H)
    i = tl.arange(0, C)
    valid = n * C + i < T
    read = tl.load(_tile(read_ptr, index, C, K, 0, C, 0, K))
    write = tl.load(_tile(write_ptr, index, C, K, 0, C, 0, K))
    update = _load_tokens(update_ptr, row, valid, H, V, first, C, BV)
    state = tl.load(_tile(state_ptr, index, K, V, 0, K, first, BV))
    p = tl.where(i[:, None] >= i[None, :], _dot(read, tl.trans(write)), 0.0)
    o = scale * (_dot(read, state) + _dot(p.to(read.dtype), update))
    tl.store(_token_tile(o_ptr, row, H, V, first, C, BV), o.to(read.dtype), mask=valid[:, None])
