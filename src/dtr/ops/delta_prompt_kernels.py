"""Triton kernels that take a prompt through a `GatedDeltaNet` layer; `delta_prompt_triton.py` launches them.

What a chunk of 64 tokens makes of the state S before it is affine, and so are its outputs. With A, cum and the inverse
T = (I + A)^-1 as in `gated_delta_triton.py`, U = T (beta v) and W = T (beta exp(cum) k):

    S' = exp(total) S + N - P S,    P = (exp(total - cum) k)^T W,    N = (exp(total - cum) k)^T U
    o  = X S + Y,    X = exp(cum) q - D W,    Y = D U,    D_ij = exp(cum_i - cum_j) q_i.k_j for j <= i

`chunk_maps` finds P, N, X and Y of all chunks at once, straight from the joined projections. `prompt_scan` then has one
product per chunk on its way from state to state, and writes gated outputs as it goes.

Tiles of 32 tokens stay off wgmma, and nothing is transposed in registers (see `gated_delta_kernels.py`): keys are
loaded a second time, lying on their side.

Shapes: B batch, T tokens, H heads, K head dim, C = 64 tokens a chunk, N chunks. A row of projections is
q, k, v, output gate (H K each), decay and write strength (H each).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gated_delta_kernels import _decay, _dot, _inverses_of_blocks, _merge_blocks


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _unit_heads(
    x_ptr, cos_ptr, sin_ptr, norm_ptr, eps, tokens, valid, stride, K: tl.constexpr, HAS_NORM: tl.constexpr,
    ON_SIDE: tl.constexpr,
):  # fmt: skip
    """Queries or keys of one head in float32: the family's norm if any, rotary positions, unit length.

    (tokens, K), or (K, tokens) if ON_SIDE; zero where not `valid`.
    """
    i = tl.arange(0, K)
    if ON_SIDE:
        t, seen, f = tokens[None, :], valid[None, :], i[:, None]
        features: tl.constexpr = 0
    else:
        t, seen, f = tokens[:, None], valid[:, None], i[None, :]
        features: tl.constexpr = 1
    partner = (f + K // 2) % K
    x = tl.load(x_ptr + t * stride + f, mask=seen, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + t * stride + partner, mask=seen, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=features, keep_dims=True) / K + eps)
        x *= inverse * tl.load(norm_ptr + f).to(tl.float32)
        other *= inverse * tl.load(norm_ptr + partner).to(tl.float32)
    cos = tl.load(cos_ptr + t * K + f, mask=seen, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * K + f, mask=seen, other=0.0).to(tl.float32)
    x = x * cos + tl.where(f < K // 2, -1.0, 1.0) * other * sin
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, axis=features, keep_dims=True)), 1e-12)


@triton.jit
def _gates(row_ptr, mask_ptr, tokens, valid, stride, H: tl.constexpr, HAS_MASK: tl.constexpr):
    """Log decay and write strength of tokens, both 0 where a token is padding or not there."""
    decay = tl.load(row_ptr + tokens * stride, mask=valid, other=0.0).to(tl.float32)
    write = tl.load(row_ptr + tokens * stride + H, mask=valid, other=0.0).to(tl.float32)
    # As torch's softplus, x itself above 20.
    softplus = tl.where(decay > 20.0, decay, tl.log(1.0 + tl.exp(tl.minimum(decay, 20.0))))
    counts = valid
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + tokens, mask=valid, other=0) != 0)
    return tl.where(counts, -softplus, 0.0), tl.where(counts, _logistic(write), 0.0)


@triton.jit
def _two_inverses(a, b):
    """(I + a)^-1 and (I + b)^-1 for strictly lower triangular a and b (32, 32): one substitution serves both."""
    half = tl.arange(0, 2)
    same = half[None, :, None, None, None] == half[None, None, None, :, None]
    both = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [2, 2, 16, 2, 16])
    diagonal = tl.reshape(tl.sum(tl.where(same, both, 0.0), axis=3), [4, 16, 16])
    x = tl.reshape(_inverses_of_blocks(diagonal, 4), [2, 2, 16, 1, 16])
    x = tl.reshape(tl.where(same, x, 0.0), [2, 32, 32])
    x_a, x_b = tl.split(tl.permute(x, (1, 2, 0)))
    return _merge_blocks(x_a, a), _merge_blocks(x_b, b)


@triton.jit(do_not_specialize=["T"])
def chunk_maps(
    rows_ptr, cos_ptr, sin_ptr, mask_ptr, q_norm_ptr, k_norm_ptr, p_ptr, n_ptr, x_ptr, y_ptr, total_ptr, eps, T,
    stride, angle_stride, H: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (N, B H): P, N^T, X and Y^T of one chunk, (K, K), (K, K), (64, K) and (K, 64), and the decay over all of it.

    The two halves of the chunk are called 0 and 1.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    index = (bh * tl.num_programs(0) + n).to(tl.int64)
    dtype = rows_ptr.dtype.element_ty
    width: tl.constexpr = H * K
    first = n * 64
    i, f = tl.arange(0, 32), tl.arange(0, K)
    # 64-bit up to the chunk, so that offsets within it can be 32-bit.
    row_ptr = rows_ptr + (b * T + first) * stride
    cos_ptr += b * angle_stride + first.to(tl.int64) * K
    sin_ptr += b * angle_stride + first.to(tl.int64) * K
    valid_0, valid_1 = first + i < T, first + 32 + i < T
    gate_ptr, mask_ptr = row_ptr + 4 * width + h, mask_ptr + b * T + first
    g_0, beta_0 = _gates(gate_ptr, mask_ptr, i, valid_0, stride, H, HAS_MASK)
    g_1, beta_1 = _gates(gate_ptr, mask_ptr, 32 + i, valid_1, stride, H, HAS_MASK)
    cum_0 = tl.cumsum(g_0, axis=0)
    cum_1 = tl.sum(g_0, axis=0) + tl.cumsum(g_1, axis=0)
    total = tl.sum(g_0, axis=0) + tl.sum(g_1, axis=0)
    tl.store(total_ptr + index, tl.exp(total))

    head_ptr = row_ptr + width + h * K
    k_0 = _unit_heads(head_ptr, cos_ptr, sin_ptr, k_norm_ptr, eps, i, valid_0, stride, K, HAS_NORM, False).to(dtype)
    k_1 = _unit_heads(head_ptr, cos_ptr, sin_ptr, k_norm_ptr, eps, 32 + i, valid_1, stride, K, HAS_NORM, False)
    k_1 = k_1.to(dtype)
    side_0 = _unit_heads(head_ptr, cos_ptr, sin_ptr, k_norm_ptr, eps, i, valid_0, stride, K, HAS_NORM, True).to(dtype)
    side_1 = _unit_heads(head_ptr, cos_ptr, sin_ptr, k_norm_ptr, eps, 32 + i, valid_1, stride, K, HAS_NORM, True)
    side_1 = side_1.to(dtype)

    strict = i[:, None] > i[None, :]
    across = tl.exp(cum_1[:, None] - cum_0[None, :])
    t_00, t_11 = _two_inverses(
        beta_0[:, None] * _decay(cum_0, cum_0, strict) * _dot(k_0, side_0),
        beta_1[:, None] * _decay(cum_1, cum_1, strict) * _dot(k_1, side_1),
    )
    t_10 = -_dot(_dot(t_11, beta_1[:, None] * across * _dot(k_1, side_0)), t_00)
    t_00, t_10, t_11 = t_00.to(dtype), t_10.to(dtype), t_11.to(dtype)

    at_v = row_ptr + 2 * width + h * K + i[:, None] * stride + f[None, :]
    v_0 = tl.load(at_v, mask=valid_0[:, None], other=0.0).to(tl.float32)
    v_1 = tl.load(at_v + 32 * stride, mask=valid_1[:, None], other=0.0).to(tl.float32)
    v_0, v_1 = (beta_0[:, None] * v_0).to(dtype), (beta_1[:, None] * v_1).to(dtype)
    u_0 = _dot(t_00, v_0).to(dtype)
    u_1 = (_dot(t_10, v_0) + _dot(t_11, v_1)).to(dtype)
    k_0 = ((beta_0 * tl.exp(cum_0))[:, None] * k_0.to(tl.float32)).to(dtype)
    k_1 = ((beta_1 * tl.exp(cum_1))[:, None] * k_1.to(tl.float32)).to(dtype)
    w_0 = _dot(t_00, k_0).to(dtype)
    w_1 = (_dot(t_10, k_0) + _dot(t_11, k_1)).to(dtype)

    head_ptr = row_ptr + h * K
    q_0 = _unit_heads(head_ptr, cos_ptr, sin_ptr, q_norm_ptr, eps, i, valid_0, stride, K, HAS_NORM, False).to(dtype)
    q_1 = _unit_heads(head_ptr, cos_ptr, sin_ptr, q_norm_ptr, eps, 32 + i, valid_1, stride, K, HAS_NORM, False)
    q_1 = q_1.to(dtype)
    causal = i[:, None] >= i[None, :]
    d_00 = (_decay(cum_0, cum_0, causal) * _dot(q_0, side_0)).to(dtype)
    d_10 = (across * _dot(q_1, side_0)).to(dtype)
    d_11 = (_decay(cum_1, cum_1, causal) * _dot(q_1, side_1)).to(dtype)
    x_0 = tl.exp(cum_0)[:, None] * q_0.to(tl.float32) - _dot(d_00, w_0)
    x_1 = tl.exp(cum_1)[:, None] * q_1.to(tl.float32) - _dot(d_10, w_0) - _dot(d_11, w_1)
    at = index * (64 * K)
    at_x = x_ptr + at + i[:, None] * K + f[None, :]
    tl.store(at_x, x_0.to(dtype))
    tl.store(at_x + 32 * K, x_1.to(dtype))
    at_y = y_ptr + at + i[:, None] + f[None, :] * 64
    tl.store(at_y, _dot(d_00, u_0).to(dtype))
    tl.store(at_y + 32, (_dot(d_10, u_0) + _dot(d_11, u_1)).to(dtype))

    side_0 = (tl.exp(total - cum_0)[None, :] * side_0.to(tl.float32)).to(dtype)
    side_1 = (tl.exp(total - cum_1)[None, :] * side_1.to(tl.float32)).to(dtype)
    at = index * (K * K)
    p = _dot(side_0, w_0) + _dot(side_1, w_1)
    tl.store(p_ptr + at + f[:, None] * K + f[None, :], p.to(dtype))
    new = _dot(side_0, u_0) + _dot(side_1, u_1)
    tl.store(n_ptr + at + f[:, None] + f[None, :] * K, new.to(dtype))


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
