"""Triton kernels that take a prompt through a `GatedDeltaNet` layer; `delta_prompt_triton.py` launches them.

What a chunk of 64 tokens makes of the state S before it is affine, and so are its outputs. With A, cum and the inverse
T = (I + A)^-1 as in `gated_delta_triton.py`, U = T (beta v) and W = T (beta exp(cum) k):

    S' = exp(total) S + N - P S,    P = (exp(total - cum) k)^T W,    N = (exp(total - cum) k)^T U
    o  = X S + Y,    X = exp(cum) q - D W,    Y = D U,    D_ij = exp(cum_i - cum_j) q_i.k_j for j <= i

`chunk_maps` finds P, N, X and Y of all chunks at once. `prompt_scan` then has one product per chunk on its way from
state to state, and writes gated outputs as it goes.

Shapes: B batch, T tokens, H heads, K head dim, C = 64 tokens a chunk, N chunks. A row of projections is
q, k, v, output gate (H K each), decay and write strength (H each).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gated_delta_kernels import (
    _decay,
    _dot,
    _head,
    _load_scalars,
    _load_tokens,
    _tile,
    _token_tile,
    _transposed,
)


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["T"])
def chunk_maps(
    q_ptr, k_ptr, rows_ptr, beta_ptr, cum_ptr, inverse_ptr, p_ptr, n_ptr, x_ptr, y_ptr, total_ptr, T, stride,
    H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (B H, N): P, N^T, X and Y^T of one chunk, (K, K), (K, K), (64, K) and (K, 64), and the decay over all of it.

    Queries and keys are rotated and of unit length, (B, T, H, K); values are read from the rows of projections.
    """
    bh, n = tl.program_id(0), tl.program_id(1)
    index = bh * tl.num_programs(1) + n
    dtype = k_ptr.dtype.element_ty
    row = _head(bh, n * 64, T, H)
    i, f = tl.arange(0, 64), tl.arange(0, K)
    valid = n * 64 + i < T
    k = _load_tokens(k_ptr, row, valid, H, K, 0, 64, K)
    k_t = _transposed(k, _token_tile(k_ptr, row, H, K, 0, 64, K), valid)
    token = (bh // H).to(tl.int64) * T + n * 64
    at_v = rows_ptr + token * stride + 2 * H * K + (bh % H) * K + i[:, None] * stride + f[None, :]
    v = tl.load(at_v, mask=valid[:, None], other=0.0).to(tl.float32)
    inverse = tl.load(_tile(inverse_ptr, index, 64, 64, 0, 64, 0, 64))
    beta = _load_scalars(beta_ptr, row, valid, H, 64)
    cum = tl.load(cum_ptr + index.to(tl.int64) * 64 + i)
    total = tl.load(cum_ptr + index.to(tl.int64) * 64 + 63)
    tl.store(total_ptr + index.to(tl.int64), tl.exp(total))

    u = _dot(inverse, (beta[:, None] * v).to(dtype))
    w = _dot(inverse, ((beta * tl.exp(cum))[:, None] * k.to(tl.float32)).to(dtype))
    to_end = tl.exp(total - cum)[:, None]
    tl.store(_tile(p_ptr, index, K, K, 0, K, 0, K), _dot(k_t, (to_end * w).to(dtype)).to(dtype))
    new = _dot(k_t, (to_end * u).to(dtype))
    tl.store(n_ptr + index.to(tl.int64) * (K * K) + f[:, None] + f[None, :] * K, new.to(dtype))

    q = _load_tokens(q_ptr, row, valid, H, K, 0, 64, K)
    d = (_decay(cum, cum, i[:, None] >= i[None, :]) * _dot(q, tl.trans(k))).to(dtype)
    x = tl.exp(cum)[:, None] * q.to(tl.float32) - _dot(d, w.to(dtype))
    tl.store(_tile(x_ptr, index, 64, K, 0, 64, 0, K), x.to(dtype))
    y = _dot(d, u.to(dtype))
    tl.store(y_ptr + index.to(tl.int64) * (64 * K) + i[:, None] + f[None, :] * 64, y.to(dtype))


@triton.jit(do_not_specialize=["T", "N", "segment_chunks"])
def prompt_scan(
    rows_ptr, p_ptr, n_ptr, x_ptr, y_ptr, total_ptr, initial_ptr, final_ptr, out_ptr, T, N, segment_chunks, stride,
    H: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, HAS_INITIAL: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Grid (V / BV, B H, segments of `segment_chunks` chunks): carry BV columns of a state, and write their outputs.

    The state lies on its side, (BV, K), so that it is the left operand of its products and stays in registers.
    AFFINE, grid ((V + K) / BV, B H, segments): only what a segment makes of its first state, as in `state_scan`.
    """
    first, bh, segment = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    b, h = (bh // H).to(tl.int64), bh % H
    place = (bh * tl.num_programs(2) + segment).to(tl.int64)
    dtype = rows_ptr.dtype.element_ty
    width: tl.constexpr = H * K
    j, f, i = tl.arange(0, BV), tl.arange(0, K), tl.arange(0, 64)
    column = first + j
    if HAS_INITIAL:
        state = tl.load(initial_ptr + place * (K * K) + f[None, :] * K + column[:, None])
    elif AFFINE:
        state = tl.where(f[None, :] == column[:, None] - K, 1.0, 0.0)
    else:
        state = tl.zeros([BV, K], dtype=tl.float32)
    begin = segment * segment_chunks
    end = tl.minimum(begin + segment_chunks, N)
    has_values = (column < K)[:, None]
    chunk = (bh * N + begin).to(tl.int64)
    at_p = p_ptr + chunk * (K * K) + f[:, None] * K + f[None, :]
    at_n = n_ptr + chunk * (K * K) + column[:, None] * K + f[None, :]
    at_x = x_ptr + chunk * (64 * K) + i[:, None] * K + f[None, :]
    at_y = y_ptr + chunk * (64 * K) + column[:, None] * 64 + i[None, :]
    at_gate = rows_ptr + (b * T + begin * 64) * stride + 3 * width + h * K + column[:, None] + i[None, :] * stride
    at_out = out_ptr + (b * T + begin * 64) * width + h * K + column[:, None] + i[None, :] * width
    # One chunk ahead by hand: loads that no product takes are not moved ahead by the compiler.
    new = tl.load(at_n, mask=has_values & (begin < N), other=0.0)
    total = tl.load(total_ptr + chunk)
    if not AFFINE:
        y = tl.load(at_y)
        gate = tl.load(at_gate, mask=(begin * 64 + i < T)[None, :], other=0.0)
    for n in range(begin, end):
        more = n + 1 < end
        p = tl.load(at_p)
        if not AFFINE:
            x = tl.load(at_x)
        at_n += K * K
        next_new = tl.load(at_n, mask=has_values & more, other=0.0)
        next_total = tl.load(total_ptr + chunk + (n + 1 - begin), mask=more, other=0.0)
        if not AFFINE:
            at_y += 64 * K
            at_gate += 64 * stride
            next_y = tl.load(at_y, mask=has_values & more, other=0.0)
            next_gate = tl.load(at_gate, mask=((n + 1) * 64 + i < T)[None, :] & more, other=0.0)
        narrow = state.to(dtype)
        state = state * total + new.to(tl.float32) - _dot(narrow, tl.trans(p))
        if not AFFINE:
            o = _dot(narrow, tl.trans(x)) + y.to(tl.float32)
            o *= 2.0 * _logistic(gate.to(tl.float32))
            tl.store(at_out, o.to(dtype), mask=(n * 64 + i < T)[None, :])
            at_out += 64 * width
            at_x += 64 * K
            y, gate = next_y, next_gate
        at_p += K * K
        new, total = next_new, next_total
    if AFFINE:
        tl.store(final_ptr + place * (2 * K * K) + f[None, :] * (2 * K) + column[:, None], state)
    else:
        tl.store(final_ptr + place * (K * K) + f[None, :] * K + column[:, None], state)
