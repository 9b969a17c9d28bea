"""Triton kernels that take a prompt through a `GatedDeltaNet` layer; `delta_prompt_triton.py` launches them.

What a chunk of 64 tokens makes of the state S before it is affine, and so are its outputs. With A, cum and the inverse
T = (I + A)^-1 as in `gated_delta_triton.py`, U = T (beta v) and W = T (beta exp(cum) k):

    S' = exp(total) S + N + P S,    P = -(exp(total - cum) k)^T W,    N = (exp(total - cum) k)^T U
    o  = X S + Y,    X = exp(cum) q - D W,    Y = D U,    D_ij = exp(cum_i - cum_j) q_i.k_j for j <= i

`chunk_maps` finds P, N, X and Y of all chunks at once, so that rotated heads and inverses never reach memory.
`prompt_scan` then has one product per chunk on its way from state to state, and writes gated outputs as it goes.

Shapes: B batch, T tokens, D hidden dim, H heads, K head dim, C = 64 tokens a chunk, N chunks. A row of projections is
q, k, v, output gate (H K each) and perhaps the mixes of q and k, of hidden states before the division of their norm,
`scale`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gpu.chunk_inverse_kernels import inverse_of_chunk
from dtr.ops.gpu.decoding_triton import QUADRATIC_EPS, _sigmoid, _softplus
from dtr.ops.gpu.gated_delta_kernels import _dot, _tile


@triton.jit(do_not_specialize=["T"])
def token_gates(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, scale_ptr, gates_ptr, eps, T, D: tl.constexpr, H: tl.constexpr,
    BG: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, B): `scale` (B, T), log decays and write strengths (2, B, H, T), both 0 where a token is padding.

    From hidden states (B, T, D) before their norm, with the norm's weight in `weight` (2 H, D); BG >= 2 H.
    """
    b = tl.program_id(1).to(tl.int64)
    t, g, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BG), tl.arange(0, BD)
    valid = t < T
    at_x = x_ptr + (b * T + t)[:, None] * D + d[None, :]
    at_weight = weight_ptr + g[:, None] * D + d[None, :]
    squares = tl.zeros([BT, BD], dtype=tl.float32)
    logits = tl.zeros([BG, BT], dtype=tl.float32)
    for first in tl.static_range(0, D, BD):
        x = tl.load(at_x + first, mask=valid[:, None], other=0.0)
        weight = tl.load(at_weight + first, mask=(g < 2 * H)[:, None], other=0.0)
        logits += _dot(weight, tl.trans(x))
        x = x.to(tl.float32)
        squares += x * x
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps)
    tl.store(scale_ptr + b * T + t, scale, mask=valid)
    logits = logits * scale[None, :] + tl.load(bias_ptr + g, mask=g < 2 * H, other=0.0).to(tl.float32)[:, None]
    gates = tl.where((g < H)[:, None], -_softplus(logits), _sigmoid(logits))
    if HAS_MASK:
        gates = tl.where((tl.load(mask_ptr + b * T + t, mask=valid, other=0) > 0)[None, :], gates, 0.0)
    place = ((g // H) * tl.num_programs(1) + b) * H + g % H
    tl.store(gates_ptr + place[:, None] * T + t[None, :], gates, mask=(g < 2 * H)[:, None] & valid[None, :])


@triton.jit
def _dot_onto(a, b, total):
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _rotated(
    at_x, cos, sin, seen, scale, norm_ptr, bias_ptr, eps, K: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """Queries or keys (64, K) in float32: the family's norm if any, rotated, of unit length.

    With quadratic features their mix lies MIX columns on, as does its bias.

    `at_x` points to the first halves (64, K / 2), to which cos and sin belong. Without norm and bias the length takes
    any scale out again.
    """
    f = tl.arange(0, K // 2)
    x = tl.load(at_x, mask=seen, other=0.0).to(tl.float32)
    y = tl.load(at_x + K // 2, mask=seen, other=0.0).to(tl.float32)
    if HAS_NORM or HAS_BIAS or MIX:
        x, y = x * scale, y * scale
    if HAS_BIAS:
        x += tl.load(bias_ptr + f).to(tl.float32)[None, :]
        y += tl.load(bias_ptr + K // 2 + f).to(tl.float32)[None, :]
    if MIX:
        mix_x = tl.load(at_x + MIX, mask=seen, other=0.0).to(tl.float32) * scale
        mix_y = tl.load(at_x + MIX + K // 2, mask=seen, other=0.0).to(tl.float32) * scale
        if HAS_BIAS:
            mix_x += tl.load(bias_ptr + MIX + f).to(tl.float32)[None, :]
            mix_y += tl.load(bias_ptr + MIX + K // 2 + f).to(tl.float32)[None, :]
        inverse = (1.0 / tl.sqrt(tl.sum(x * x + y * y, axis=1) / K + QUADRATIC_EPS))[:, None]
        x *= inverse * (1.0 + inverse * mix_x)
        y *= inverse * (1.0 + inverse * mix_y)
    if HAS_NORM:
        inverse = (1.0 / tl.sqrt(tl.sum(x * x + y * y, axis=1) / K + eps))[:, None]
        x *= inverse * tl.load(norm_ptr + f).to(tl.float32)[None, :]
        y *= inverse * tl.load(norm_ptr + K // 2 + f).to(tl.float32)[None, :]
    x, y = x * cos - y * sin, y * cos + x * sin
    inverse = (1.0 / tl.maximum(tl.sqrt(tl.sum(x * x + y * y, axis=1)), 1e-12))[:, None]
    return tl.reshape(tl.permute(tl.join(x * inverse, y * inverse), (0, 2, 1)), [64, K])


@triton.jit(do_not_specialize=["T"])
def chunk_maps(
    rows_ptr, bias_ptr, scale_ptr, gates_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, eps, p_ptr, n_ptr, x_ptr, y_ptr,
    total_ptr, T, cos_stride, H: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUADRATIC: tl.constexpr,
):  # fmt: skip
    """Grid (B H, N): P, N, X and Y of one chunk, (K, K), (K, K), (64, K) and (64, K), and the decay over all of it.

    Rows are (B, T, 4 H K), or 6 H K with QUADRATIC features, `gates` (2, B, H, T) those of `token_gates`, cos and sin
    (B or 1, T, K).
    """
    bh, n = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    index = bh.to(tl.int64) * tl.num_programs(1) + n
    dtype = rows_ptr.dtype.element_ty
    width: tl.constexpr = H * K
    columns: tl.constexpr = 6 * width if QUADRATIC else 4 * width
    mix: tl.constexpr = 4 * width if QUADRATIC else 0
    i, f, c = tl.arange(0, 64), tl.arange(0, K), tl.arange(0, K // 2)
    valid = n * 64 + i < T
    seen = valid[:, None]
    token = b * T + n * 64
    corner = rows_ptr + token * columns + h * K
    bias_ptr += h * K
    at_angle = b * cos_stride + (n * 64 + i)[:, None] * K + c[None, :]
    cos = tl.load(cos_ptr + at_angle, mask=seen, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at_angle, mask=seen, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + token + i, mask=valid, other=0.0)[:, None]
    at_gate = gates_ptr + bh.to(tl.int64) * T + n * 64 + i
    g = tl.load(at_gate, mask=valid, other=0.0)
    beta = tl.load(at_gate + tl.num_programs(0).to(tl.int64) * T, mask=valid, other=0.0)
    at_half = corner + i[:, None] * columns + c[None, :]
    k = _rotated(
        at_half + width, cos, sin, seen, scale, k_norm_ptr, bias_ptr + width, eps, K, HAS_NORM, HAS_BIAS, mix
    ).to(dtype)
    q = _rotated(at_half, cos, sin, seen, scale, q_norm_ptr, bias_ptr, eps, K, HAS_NORM, HAS_BIAS, mix).to(dtype)
    at_v = corner + 2 * width + i[:, None] * columns + f[None, :]
    v = tl.load(at_v, mask=seen, other=0.0).to(tl.float32) * (beta[:, None] * scale)
    if HAS_BIAS:
        v += beta[:, None] * tl.load(bias_ptr + 2 * width + f).to(tl.float32)[None, :]
    v = v.to(dtype)
    cum, total = tl.cumsum(g, axis=0), tl.sum(g, axis=0)
    tl.store(total_ptr + index, tl.exp(total))

    k_t = tl.trans(k)
    # Where the exponent would be above 0 the mask below takes the value away.
    decay = tl.exp(tl.minimum(cum[:, None] - cum[None, :], 0.0))
    a = tl.where(i[:, None] > i[None, :], beta[:, None] * decay * _dot(k, k_t), 0.0)
    d = tl.where(i[:, None] >= i[None, :], decay * _dot(q, k_t), 0.0).to(dtype)
    inverse = inverse_of_chunk(a, tl.float16 if dtype == tl.bfloat16 else tl.float32).to(dtype)
    u = _dot(inverse, v)
    w = _dot(inverse, ((beta * tl.exp(cum))[:, None] * k.to(tl.float32)).to(dtype))
    to_end = tl.exp(total - cum)[:, None]
    tl.store(_tile(p_ptr, index, K, K, 0, K, 0, K), _dot(k_t, (-to_end * w).to(dtype)).to(dtype))
    tl.store(_tile(n_ptr, index, K, K, 0, K, 0, K), _dot(k_t, (to_end * u).to(dtype)).to(dtype))
    x = tl.exp(cum)[:, None] * q.to(tl.float32) - _dot(d, w.to(dtype))
    tl.store(_tile(x_ptr, index, 64, K, 0, 64, 0, K), x.to(dtype))
    tl.store(_tile(y_ptr, index, 64, K, 0, 64, 0, K), _dot(d, u.to(dtype)).to(dtype))


@triton.jit(do_not_specialize=["T", "N", "segment_chunks"])
def prompt_scan(
    rows_ptr, bias_ptr, scale_ptr, p_ptr, n_ptr, x_ptr, y_ptr, total_ptr, initial_ptr, final_ptr, out_ptr, bounds_ptr,
    T, N, segment_chunks, H: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, HAS_INITIAL: tl.constexpr,
    AFFINE: tl.constexpr, QUADRATIC: tl.constexpr, HAS_BOUNDS: tl.constexpr,
):  # fmt: skip
    """Grid (V / BV, B H, segments of `segment_chunks` chunks): carry BV columns of a state, and write their outputs.

    The state lies on its side, (BV, K), so that it is the left operand of its products and stays in registers. What is
    added to it and to the outputs comes through a product with the identity too, and so do the gates: exact in any
    type, and the compiler then fetches them as early as every other operand, straight into the layout of a product.
    AFFINE, grid ((V + K) / BV, B H, segments): only what a segment makes of its first state, as in `state_scan`, as is
    HAS_BOUNDS.
    """
    first, bh, segment = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    b, h = (bh // H).to(tl.int64), bh % H
    place = bh.to(tl.int64) * tl.num_programs(2) + segment
    dtype = rows_ptr.dtype.element_ty
    width: tl.constexpr = H * K
    columns: tl.constexpr = 6 * width if QUADRATIC else 4 * width
    j, f, i = tl.arange(0, BV), tl.arange(0, K), tl.arange(0, 64)
    column = first + j
    identity = tl.where(j[:, None] == j[None, :], 1.0, 0.0).to(dtype)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + place * (K * K) + f[None, :] * K + column[:, None])
    elif AFFINE:
        state = tl.where(f[None, :] == column[:, None] - K, 1.0, 0.0)
    else:
        state = tl.zeros([BV, K], dtype=tl.float32)
    begin = segment * segment_chunks
    end = tl.minimum(begin + segment_chunks, N)
    if HAS_BOUNDS:
        begin, end = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    chunk, token = bh.to(tl.int64) * N + begin, b * T + begin * 64
    at_p = p_ptr + chunk * (K * K) + f[:, None] * K + f[None, :]
    at_n = n_ptr + chunk * (K * K) + f[:, None] * K + column[None, :]
    at_x = x_ptr + chunk * (64 * K) + i[:, None] * K + f[None, :]
    at_y = y_ptr + chunk * (64 * K) + i[:, None] * K + column[None, :]
    at_gate = rows_ptr + token * columns + 3 * width + h * K + i[:, None] * columns + column[None, :]
    at_out = out_ptr + token * width + h * K + column[:, None] + i[None, :] * width
    at_scale, at_total = scale_ptr + token + i, total_ptr + chunk
    # One chunk ahead by hand: only operands of products are fetched ahead by the compiler.
    total = tl.load(at_total)
    scale = tl.load(at_scale, mask=begin * 64 + i < T, other=0.0)
    bias = tl.load(bias_ptr + 3 * width + h * K + column, mask=column < K, other=0.0).to(tl.float32)[:, None]
    for n in range(begin, end):
        more = n + 1 < end
        in_text = n * 64 + i < T
        next_total = tl.load(at_total + 1, mask=more, other=0.0)
        narrow = state.to(dtype)
        new = tl.load(at_n, mask=(column < K)[None, :], other=0.0)
        state = _dot_onto(narrow, tl.trans(tl.load(at_p)), _dot_onto(identity, tl.trans(new), state * total))
        if not AFFINE:
            next_scale = tl.load(at_scale + 64, mask=((n + 1) * 64 + i < T) & more, other=0.0)
            o = _dot(identity, tl.trans(tl.load(at_y)))
            o = _dot_onto(narrow, tl.trans(tl.load(at_x)), o)
            gate = _dot(identity, tl.trans(tl.load(at_gate, mask=in_text[:, None], other=0.0)))
            o = 2.0 * o / (1.0 + tl.exp(-(gate * scale[None, :] + bias)))
            tl.store(at_out, o.to(dtype), mask=in_text[None, :])
            at_out += 64 * width
            at_gate += 64 * columns
            at_scale += 64
            at_x += 64 * K
            at_y += 64 * K
            scale = next_scale
        at_p += K * K
        at_n += K * K
        at_total += 1
        total = next_total
    if AFFINE:
        tl.store(final_ptr + place * (2 * K * K) + f[None, :] * (2 * K) + column[:, None], state)
    else:
        tl.store(final_ptr + place * (K * K) + f[None, :] * K + column[:, None], state)
