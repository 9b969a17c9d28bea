"""The backward kernels of the gated delta rule, beside those of the forward pass in `gated_delta_kernels`.

Letters and layouts are theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gpu.gated_delta_kernels import (
    _decay,
    _dot,
    _head,
    _load_scalars,
    _load_tokens,
    _tile,
    _token_tile,
    _transposed,
)


@triton.jit(do_not_specialize=["T"])
def state_scan_backward(
    q_ptr, k_ptr, beta_ptr, cum_ptr, inverse_ptr, do_ptr, dfinal_ptr, dresidual_ptr, dv_ptr, dstate_ptr, dinitial_ptr,
    scale, T, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, HAS_DFINAL: tl.constexpr,
):  # fmt: skip
    """Carry the state's gradient from the last chunk to the first.

    Stores dv and the gradients of each chunk's last state and of beta times its residual v - exp(cum) k S.
    """
    bh, first = tl.program_id(0), tl.program_id(1) * BV
    dtype = k_ptr.dtype.element_ty
    num_chunks = tl.cdiv(T, C)
    i = tl.arange(0, C)
    if HAS_DFINAL:
        dstate = tl.load(_tile(dfinal_ptr, bh, K, V, 0, K, first, BV)).to(tl.float32)
    else:
        dstate = tl.zeros([K, BV], dtype=tl.float32)
    for step in range(num_chunks):
        n = num_chunks - 1 - step
        index = bh * num_chunks + n
        row = _head(bh, n * C, T, H)
        valid = n * C + i < T
        q = _load_tokens(q_ptr, row, valid, H, K, 0, C, K)
        k = _load_tokens(k_ptr, row, valid, H, K, 0, C, K)
        q_t = _transposed(q, _token_tile(q_ptr, row, H, K, 0, C, K), valid)
        k_t = _transposed(k, _token_tile(k_ptr, row, H, K, 0, C, K), valid)
        do = _load_tokens(do_ptr, row, valid, H, V, first, C, BV)
        at_inverse = _tile(inverse_ptr, index, C, C, 0, C, 0, C)
        # Rows past the end are dropped in float32; they meet zeros.
        inverse_t = _transposed(tl.load(at_inverse), at_inverse, valid)
        beta = _load_scalars(beta_ptr, row, valid, H, C)
        cum = tl.load(cum_ptr + index.to(tl.int64) * C + i)
        total = tl.load(cum_ptr + index.to(tl.int64) * C + C - 1)

        narrow = dstate.to(dtype)
        tl.store(_tile(dstate_ptr, index, K, V, 0, K, first, BV), narrow)
        p_transposed = scale * _decay(-cum, -cum, i[:, None] <= i[None, :]) * _dot(k, tl.trans(q))
        dupdate = tl.exp(total - cum)[:, None] * _dot(k, narrow) + _dot(p_transposed.to(dtype), do)
        dresidual = _dot(inverse_t, dupdate.to(dtype))
        dv = beta[:, None] * dresidual
        tl.store(_token_tile(dresidual_ptr, row, H, V, first, C, BV), dresidual.to(dtype), mask=valid[:, None])
        tl.store(_token_tile(dv_ptr, row, H, V, first, C, BV), dv.to(dtype), mask=valid[:, None])
        from_output = (scale * tl.exp(cum)[:, None] * do.to(tl.float32)).to(dtype)
        from_residual = (-tl.exp(cum)[:, None] * dv).to(dtype)
        dstate = dstate * tl.exp(total) + _dot(q_t, from_output) + _dot(k_t, from_residual)
    tl.store(_tile(dinitial_ptr, bh, K, V, 0, K, first, BV), dstate)


@triton.jit
def _row_minus_column_sums(x):
    """(C,) from (C, C): what exp(cum_i - cum_j) inside x_ij passes on to cum."""
    return tl.sum(x, axis=1) - tl.sum(x, axis=0)


@triton.jit(do_not_specialize=["T"])
def chunk_gradients(
    q_ptr, k_ptr, v_ptr, beta_ptr, cum_ptr, update_ptr, state_ptr, do_ptr, dresidual_ptr, dstate_ptr,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, scale, T, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq and dk, and this block of key columns' share of dg and dbeta, all chunks in parallel.

    dP = scale * do u^T and dA = -dresidual u^T. Ordered so that few tiles are alive at a time: registers are the limit.
    """
    bh, n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = bh * tl.num_programs(1) + n
    row = _head(bh, n * C, T, H)
    part_row = row + part.to(tl.int64) * (tl.num_programs(0) // H) * T * H
    i = tl.arange(0, C)
    valid = n * C + i < T
    q = _load_tokens(q_ptr, row, valid, H, K, part * BK, C, BK)
    k = _load_tokens(k_ptr, row, valid, H, K, part * BK, C, BK)
    update = _load_tokens(update_ptr, row, valid, H, V, 0, C, V)
    do = _load_tokens(do_ptr, row, valid, H, V, 0, C, V)
    state = tl.load(_tile(state_ptr, index, K, V, part * BK, BK, 0, V))
    beta = _load_scalars(beta_ptr, row, valid, H, C)
    cum = tl.load(cum_ptr + index.to(tl.int64) * C + i)
    total = tl.load(cum_ptr + index.to(tl.int64) * C + C - 1)

    dq = scale * tl.exp(cum)[:, None] * _dot(do, tl.trans(state))
    dcum = tl.sum(q.to(tl.float32) * dq, axis=1)
    dp = scale * _decay(cum, cum, i[:, None] >= i[None, :]) * _dot(do, tl.trans(update))
    dcum += _row_minus_column_sums(dp * _dot(q, tl.trans(k)))
    dq += _dot(dp.to(k.dtype), k)
    tl.store(_token_tile(dq_ptr, row, H, K, part * BK, C, BK), dq.to(q.dtype), mask=valid[:, None])

    dp_t = scale * _decay(-cum, -cum, i[:, None] <= i[None, :]) * _dot(update, tl.trans(do))
    dk = _dot(dp_t.to(q.dtype), q)
    dresidual = _load_tokens(dresidual_ptr, row, valid, H, V, 0, C, V)
    da = _decay(cum, cum, i[:, None] > i[None, :]) * _dot(dresidual, tl.trans(update))
    da_t = _decay(-cum, -cum, i[:, None] < i[None, :]) * _dot(update, tl.trans(dresidual))
    dk -= _dot((beta[:, None] * da + beta[None, :] * da_t).to(k.dtype), k)
    da *= _dot(k, tl.trans(k))
    dbeta = -tl.sum(da, axis=1)
    dcum -= _row_minus_column_sums(beta[:, None] * da)

    dk_read = tl.exp(cum)[:, None] * _dot(dresidual, tl.trans(state))
    dk -= beta[:, None] * dk_read
    read = tl.sum(k.to(tl.float32) * dk_read, axis=1)
    dbeta -= read
    if part == 0:
        v = _load_tokens(v_ptr, row, valid, H, V, 0, C, V).to(tl.float32)
        dbeta += tl.sum(dresidual.to(tl.float32) * v, axis=1)
    tl.store(dbeta_ptr + part_row + i * H, dbeta, mask=valid)

    dstate = tl.load(_tile(dstate_ptr, index, K, V, part * BK, BK, 0, V))
    dk_write = tl.exp(total - cum)[:, None] * _dot(update, tl.trans(dstate))
    write = tl.sum(k.to(tl.float32) * dk_write, axis=1)
    tl.store(_token_tile(dk_ptr, row, H, K, part * BK, C, BK), (dk + dk_write).to(k.dtype), mask=valid[:, None])
    kept = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1), axis=0)
    dtotal = kept * tl.exp(total) + tl.sum(write, axis=0)
    dg = tl.cumsum(dcum - beta * read - write, axis=0, reverse=True) + dtotal
    tl.store(dg_ptr + part_row + i * H, dg, mask=valid)
