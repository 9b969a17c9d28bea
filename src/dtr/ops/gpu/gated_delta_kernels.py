"""Triton kernels of the chunked gated delta rule; `gated_delta_triton.py` launches them and holds the maths.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, C chunk, N chunks; BK and BV are blocks of K and V.
Token tensors are contiguous (B, T, H, dim); per-chunk tensors are contiguous (B*H, N, rows, columns).
`cum` is the running sum of the log decay g inside a chunk, so every exponent below is a difference that is at most 0.

On Hopper, Triton 3.4 to 3.7 miscompiles `dot(trans(x), y)` where trans happens in registers, as it does when x is the
result of a dot. These kernels therefore transpose loaded tiles only, which takes place in shared memory, and compute a
transposed product as a second dot with swapped operands.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b):
    """Matrix product accumulated in float32; float32 operands keep nearly full precision, bfloat16 ones are exact."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _head(bh, start, T, H: tl.constexpr):
    """Row of token `start` of sequence-and-head `bh` in a (B*T*H, dim) view; 64-bit, so that offsets can be 32-bit."""
    return ((bh // H).to(tl.int64) * T + start) * H + bh % H


@triton.jit
def _token_tile(ptr, row, H: tl.constexpr, D: tl.constexpr, first, C: tl.constexpr, BD: tl.constexpr):
    """Pointers (C, BD) to the tokens from `row` on and features first.. of a (B, T, H, D) tensor."""
    return ptr + row * D + first + (tl.arange(0, C) * (H * D))[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def _load_tokens(ptr, row, valid, H: tl.constexpr, D: tl.constexpr, first, C: tl.constexpr, BD: tl.constexpr):
    """Tile (C, BD) of a (B, T, H, D) tensor, zero where not `valid` (C,)."""
    return tl.load(_token_tile(ptr, row, H, D, first, C, BD), mask=valid[:, None], other=0.0)


@triton.jit
def _load_scalars(ptr, row, valid, H: tl.constexpr, C: tl.constexpr):
    """Float32 vector (C,) of a (B, T, H) tensor, zero where not `valid`."""
    return tl.load(ptr + row + tl.arange(0, C) * H, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _tile(ptr, index, R: tl.constexpr, D: tl.constexpr, top, BR: tl.constexpr, first, BD: tl.constexpr):
    """Pointers (BR, BD) to rows top.. and columns first.. of matrix `index` in a contiguous stack of R x D ones."""
    corner = ptr + index.to(tl.int64) * (R * D) + top * D + first
    return corner + (tl.arange(0, BR) * D)[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def _transposed(x, pointers, valid):
    """x^T as the left operand of a dot. wgmma would transpose float32 in registers (see above), so load it that way."""
    if x.dtype == tl.float32:
        return tl.load(tl.trans(pointers), mask=valid[None, :], other=0.0)
    else:
        return tl.trans(x)


@triton.jit
def _decay(cum_row, cum_column, keep):
    """exp(cum_row[i] - cum_column[j]) where `keep`, else 0; masked before exp so that nothing can overflow."""
    return tl.where(keep, tl.exp(tl.where(keep, cum_row[:, None] - cum_column[None, :], 0.0)), 0.0)


@triton.jit
def _inverse_of_unit_lower(a):
    """(I + a)^-1 for a strictly lower triangular float32 a of shape (32, 32).

    Forward substitution on both 16 x 16 diagonal blocks at once, then one block merge. A Neumann product would be
    cheaper but loses all accuracy for strongly correlated keys.
    """
    block = tl.arange(0, 2)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(a, [2, 16, 2, 16]), 0.0), axis=2)
    x = _inverses_of_blocks(diagonal, 2)
    return _merge_blocks(tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [32, 32]), a)


@triton.jit
def _inverses_of_blocks(a, NUM: tl.constexpr):
    """(I + a)^-1 for NUM strictly lower triangular 16 x 16 blocks, by forward substitution."""
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    x = tl.where(row == column, 1.0, 0.0) + tl.zeros([NUM, 16, 16], dtype=tl.float32)
    for i in range(1, 16):
        a_i = tl.sum(tl.where(row == i, a, 0.0), axis=1)
        correction = tl.sum(a_i[:, :, None] * x, axis=1)
        x = tl.where(row == i, x - correction[:, None, :], x)
    return x


@triton.jit
def _merge_blocks(blocks, a):
    """(I + a)^-1 of shape (32, 32) from the inverses of its two diagonal blocks."""
    half = tl.arange(0, 32) // 16
    below = tl.where(half[:, None] > half[None, :], a, 0.0)
    return blocks - _dot(_dot(blocks, below), blocks)


@triton.jit(do_not_specialize=["T"])
def chunk_inverse(
    k_ptr, g_ptr, beta_ptr, cum_ptr, inverse_ptr, T, H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Per chunk of 64: cum, and (I + A)^-1 with A_ij = beta_i exp(cum_i - cum_j) k_i.k_j below the diagonal.

    Works on 32 x 32 quarters: small tiles keep the inverse in registers and off wgmma.
    """
    bh, n = tl.program_id(0), tl.program_id(1)
    index = bh * tl.num_programs(1) + n
    row = _head(bh, n * 64, T, H)
    i = tl.arange(0, 32)
    valid_0, valid_1 = n * 64 + i < T, n * 64 + 32 + i < T
    k_0 = _load_tokens(k_ptr, row, valid_0, H, K, 0, 32, K)
    k_1 = _load_tokens(k_ptr, row + 32 * H, valid_1, H, K, 0, 32, K)
    beta_0 = _load_scalars(beta_ptr, row, valid_0, H, 32)
    beta_1 = _load_scalars(beta_ptr, row + 32 * H, valid_1, H, 32)
    g_0 = _load_scalars(g_ptr, row, valid_0, H, 32)
    g_1 = _load_scalars(g_ptr, row + 32 * H, valid_1, H, 32)
    cum_0 = tl.cumsum(g_0, axis=0)
    cum_1 = tl.sum(g_0, axis=0) + tl.cumsum(g_1, axis=0)
    tl.store(cum_ptr + index.to(tl.int64) * 64 + i, cum_0)
    tl.store(cum_ptr + index.to(tl.int64) * 64 + 32 + i, cum_1)

    strict = i[:, None] > i[None, :]
    a_00 = beta_0[:, None] * _decay(cum_0, cum_0, strict) * _dot(k_0, tl.trans(k_0))
    a_11 = beta_1[:, None] * _decay(cum_1, cum_1, strict) * _dot(k_1, tl.trans(k_1))
    inverse_00, inverse_11 = _inverse_of_unit_lower(a_00), _inverse_of_unit_lower(a_11)
    a_10 = beta_1[:, None] * tl.exp(cum_1[:, None] - cum_0[None, :]) * _dot(k_1, tl.trans(k_0))
    inverse_10 = -_dot(_dot(inverse_11, a_10), inverse_00)

    dtype = inverse_ptr.dtype.element_ty
    tl.store(_tile(inverse_ptr, index, 64, 64, 0, 32, 0, 32), inverse_00.to(dtype))
    tl.store(_tile(inverse_ptr, index, 64, 64, 0, 32, 32, 32), tl.zeros([32, 32], dtype=dtype))
    tl.store(_tile(inverse_ptr, index, 64, 64, 32, 32, 0, 32), inverse_10.to(dtype))
    tl.store(_tile(inverse_ptr, index, 64, 64, 32, 32, 32, 32), inverse_11.to(dtype))


@triton.jit(do_not_specialize=["T", "segment_chunks"])
def state_scan(
    k_ptr, v_ptr, beta_ptr, cum_ptr, inverse_ptr, initial_ptr, update_ptr, state_ptr, final_ptr, bounds_ptr, T,
    segment_chunks, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, HAS_INITIAL: tl.constexpr, AFFINE: tl.constexpr, HAS_BOUNDS: tl.constexpr,
):  # fmt: skip
    """Carry the state over the chunks of one head and BV value columns; store each chunk's first state and its u.

    Values are H of W heads that lie side by side, as a joined projection leaves them.

    Grid (B H, V / BV, segments of `segment_chunks` chunks), each segment with a first and a last state of its own.
    HAS_BOUNDS: segment p is the chunks from bounds[p] to before bounds[p + 1].
    AFFINE, grid (B H, (V + K) / BV, segments): only what a segment makes of its first state is stored, last states
    (K, V + K). The first V columns start from zero, the others from the identity with all values zero.
    """
    bh, first, segment = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2)
    place = bh * tl.num_programs(2) + segment
    dtype = k_ptr.dtype.element_ty
    num_chunks = tl.cdiv(T, C)
    i = tl.arange(0, C)
    if HAS_INITIAL:
        state = tl.load(_tile(initial_ptr, place, K, V, 0, K, first, BV)).to(tl.float32)
    elif AFFINE:
        column = first - V + tl.arange(0, BV)
        state = tl.where(tl.arange(0, K)[:, None] == column[None, :], 1.0, 0.0)
    else:
        state = tl.zeros([K, BV], dtype=tl.float32)
    begin, end = segment * segment_chunks, tl.minimum((segment + 1) * segment_chunks, num_chunks)
    if HAS_BOUNDS:
        begin, end = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    for n in range(begin, end):
        index = bh * num_chunks + n
        row = _head(bh, n * C, T, H)
        v_row = ((bh // H).to(tl.int64) * T + n * C) * W + bh % H
        valid = n * C + i < T
        k = _load_tokens(k_ptr, row, valid, H, K, 0, C, K)
        k_t = _transposed(k, _token_tile(k_ptr, row, H, K, 0, C, K), valid)
        inverse = tl.load(_tile(inverse_ptr, index, C, C, 0, C, 0, C))
        beta = _load_scalars(beta_ptr, row, valid, H, C)
        cum = tl.load(cum_ptr + index.to(tl.int64) * C + i)
        total = tl.load(cum_ptr + index.to(tl.int64) * C + C - 1)

        if AFFINE:
            v = _load_tokens(v_ptr, v_row, valid & (first < V), W, V, first, C, BV).to(tl.float32)
        else:
            v = _load_tokens(v_ptr, v_row, valid, W, V, first, C, BV).to(tl.float32)

        narrow = state.to(dtype)
        residual = beta[:, None] * (v - tl.exp(cum)[:, None] * _dot(k, narrow))
        update = _dot(inverse, residual.to(dtype))
        if not AFFINE:
            tl.store(_tile(state_ptr, index, K, V, 0, K, first, BV), narrow)
            tl.store(_token_tile(update_ptr, row, H, V, first, C, BV), update.to(dtype), mask=valid[:, None])
        state = state * tl.exp(total) + _dot(k_t, (update * tl.exp(total - cum)[:, None]).to(dtype))
    if AFFINE:
        tl.store(_tile(final_ptr, place, K, V + K, 0, K, first, BV), state)
    else:
        tl.store(_tile(final_ptr, place, K, V, 0, K, first, BV), state)


@triton.jit
def carry_segments(
    affine_ptr, first_ptr, start_ptr, P, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Grid (B H, V / BV): from what each of P segments makes of its first state to all first states (K, V).

    HAS_STARTS: where start[p] is not 0 the first state of segment p is there already.
    """
    bh, first = tl.program_id(0), tl.program_id(1) * BV
    state = tl.zeros([K, BV], dtype=tl.float32)
    for p in range(P):
        if HAS_STARTS:
            given = tl.load(_tile(first_ptr, bh * P + p, K, V, 0, K, first, BV))
            state = tl.where(tl.load(start_ptr + p) != 0, given, state)
        tl.store(_tile(first_ptr, bh * P + p, K, V, 0, K, first, BV), state)
        kept = tl.load(_tile(affine_ptr, bh * P + p, K, V + K, 0, K, V, K))
        state = tl.load(_tile(affine_ptr, bh * P + p, K, V + K, 0, K, first, BV)) + _dot(kept, state)


@triton.jit(do_not_specialize=["T"])
def chunk_output(
    q_ptr, k_ptr, update_ptr, cum_ptr, state_ptr, o_ptr, scale, T, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o = scale * (exp(cum) q S + P u), P_ij = exp(cum_i - cum_j) q_i.k_j for j <= i, all chunks in parallel."""
    bh, n, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    index = bh * tl.num_programs(1) + n
    row = _head(bh, n * C, T, H)
    i = tl.arange(0, C)
    valid = n * C + i < T
    q = _load_tokens(q_ptr, row, valid, H, K, 0, C, K)
    k = _load_tokens(k_ptr, row, valid, H, K, 0, C, K)
    update = _load_tokens(update_ptr, row, valid, H, V, first, C, BV)
    state = tl.load(_tile(state_ptr, index, K, V, 0, K, first, BV))
    cum = tl.load(cum_ptr + index.to(tl.int64) * C + i)
    p = _decay(cum, cum, i[:, None] >= i[None, :]) * _dot(q, tl.trans(k))
    o = scale * (tl.exp(cum)[:, None] * _dot(q, state) + _dot(p.to(q.dtype), update))
    tl.store(_token_tile(o_ptr, row, H, V, first, C, BV), o.to(q.dtype), mask=valid[:, None])
