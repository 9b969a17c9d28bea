"""The backward kernels of recurrences that decay per key channel, beside `channel_decay_kernels`.

Letters and layouts are theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gpu.channel_decay_kernels import _centred_sums, _load_half
from dtr.ops.gpu.gated_delta_kernels import (
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
    read_ptr, probe_ptr, write_ptr, half_ptr, beta_ptr, inverse_ptr, do_ptr, dfinal_ptr, dresidual_ptr, dv_ptr,
    dstate_ptr, dinitial_ptr, scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, HAS_DFINAL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Carry the state's gradient from the last chunk to the first.

    Stores dv, the gradient of each chunk's state before it decays to the chunk's end, and with the delta rule that of
    beta times its residual.
    """
    bh, first = tl.program_id(0), tl.program_id(1) * BV
    dtype = write_ptr.dtype.element_ty
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
        at_read = _tile(read_ptr, index, C, K, 0, C, 0, K)
        read = tl.load(at_read)
        read_t = _transposed(read, at_read, valid)
        write = tl.load(_tile(write_ptr, index, C, K, 0, C, 0, K))
        do = _load_tokens(do_ptr, row, valid, H, V, first, C, BV)
        kept = tl.exp(_load_half(half_ptr, index, K, 0, K))[:, None]

        dstate *= kept
        narrow = dstate.to(dtype)
        tl.store(_tile(dstate_ptr, index, K, V, 0, K, first, BV), narrow)
        p_t = tl.where(i[:, None] <= i[None, :], scale * _dot(write, tl.trans(read)), 0.0)
        dupdate = _dot(write, narrow) + _dot(p_t.to(dtype), do)
        dstate += scale * _dot(read_t, do)
        if DELTA:
            at_probe = _tile(probe_ptr, index, C, K, 0, C, 0, K)
            probe_t = _transposed(tl.load(at_probe), at_probe, valid)
            at_inverse = _tile(inverse_ptr, index, C, C, 0, C, 0, C)
            # Rows past the end are dropped in float32; they meet zeros.
            inverse_t = _transposed(tl.load(at_inverse), at_inverse, valid)
            beta = _load_scalars(beta_ptr, row, valid, H, C)
            dresidual = _dot(inverse_t, dupdate.to(dtype))
            tl.store(_token_tile(dresidual_ptr, row, H, V, first, C, BV), dresidual.to(dtype), mask=valid[:, None])
            dv = (beta[:, None] * dresidual).to(dtype)
            dstate -= _dot(probe_t, dv)
        else:
            dv = dupdate.to(dtype)
        tl.store(_token_tile(dv_ptr, row, H, V, first, C, BV), dv, mask=valid[:, None])
        dstate *= kept
    tl.store(_tile(dinitial_ptr, bh, K, V, 0, K, first, BV), dstate)


@triton.jit(do_not_specialize=["T"])
def chunk_gradients(
    v_ptr, g_ptr, beta_ptr, read_ptr, probe_ptr, write_ptr, update_ptr, state_ptr, do_ptr, dresidual_ptr, dstate_ptr,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, scale, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LOWEST: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of BK key columns, and their share of dbeta, all chunks in parallel.

    dP = scale * do u^T and dA = -dresidual u^T. The running sum of g gets, channel by channel, what reads and probes
    get less what writes get. Both sides multiply the same rounded numbers, so that a read of a write after the token
    whose decay it is, cancels. Sums over values come first, BV at a time: registers are the limit.
    """
    bh, n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = bh * tl.num_programs(1) + n
    row = _head(bh, n * C, T, H)
    i = tl.arange(0, C)
    valid = n * C + i < T
    first = part * BK
    dp, dp_t = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    dread, carried = tl.zeros([C, BK], dtype=tl.float32), tl.zeros([C, BK], dtype=tl.float32)
    dtotal = tl.zeros([BK], dtype=tl.float32)
    if DELTA:
        da, da_t = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
        erased, dbeta = tl.zeros([C, BK], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
    for column in range(0, V, BV):
        update = _load_tokens(update_ptr, row, valid, H, V, column, C, BV)
        do = _load_tokens(do_ptr, row, valid, H, V, column, C, BV)
        state = tl.load(_tile(state_ptr, index, K, V, first, BK, column, BV))
        dstate = tl.load(_tile(dstate_ptr, index, K, V, first, BK, column, BV))
        dp += _dot(do, tl.trans(update))
        dp_t += _dot(update, tl.trans(do))
        dread += _dot(do, tl.trans(state))
        carried += _dot(update, tl.trans(dstate))
        dtotal += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
        if DELTA:
            dresidual = _load_tokens(dresidual_ptr, row, valid, H, V, column, C, BV)
            da += _dot(dresidual, tl.trans(update))
            da_t += _dot(update, tl.trans(dresidual))
            erased += _dot(dresidual, tl.trans(state))
            if part == 0:
                v = _load_tokens(v_ptr, row, valid, H, V, column, C, BV)
                dbeta += tl.sum(dresidual.to(tl.float32) * v.to(tl.float32), axis=1)

    read = tl.load(_tile(read_ptr, index, C, K, 0, C, first, BK))
    write = tl.load(_tile(write_ptr, index, C, K, 0, C, first, BK))
    dtype = write.dtype
    g = _load_tokens(g_ptr, row, valid, H, K, first, C, BK).to(tl.float32)
    centred, _ = _centred_sums(g, LOWEST)
    since = tl.exp(centred)
    lower, upper = i[:, None] > i[None, :], i[:, None] < i[None, :]
    dread = scale * dread + _dot(tl.where(upper, 0.0, scale * dp).to(dtype), write)
    dwrite = _dot(tl.where(lower, 0.0, scale * dp_t).to(dtype), read)
    tl.store(_token_tile(dq_ptr, row, H, K, first, C, BK), (dread * since).to(dtype), mask=valid[:, None])
    dsums = read.to(tl.float32) * dread
    dk = tl.zeros([C, BK], dtype=tl.float32)
    if DELTA:
        probe = tl.load(_tile(probe_ptr, index, C, K, 0, C, first, BK))
        beta = _load_scalars(beta_ptr, row, valid, H, C)
        da = tl.where(lower, da, 0.0)
        # Above the diagonal products may be infinite.
        overlap = tl.where(lower, _dot(probe, tl.trans(write)), 0.0)
        dbeta -= tl.sum(da * overlap, axis=1) + tl.sum(probe.to(tl.float32) * erased, axis=1)
        part_row = row + part.to(tl.int64) * (tl.num_programs(0) // H) * T * H
        tl.store(dbeta_ptr + part_row + i * H, dbeta, mask=valid)
        dprobe = -beta[:, None] * erased - _dot((beta[:, None] * da).to(dtype), write)
        dwrite -= _dot(tl.where(upper, beta[None, :] * da_t, 0.0).to(dtype), probe)
        dsums += probe.to(tl.float32) * dprobe
        dk = dprobe * since

    dwrite += carried
    # Its inverse, as another exp would be another tile to move between layouts.
    dk += dwrite / since
    tl.store(_token_tile(dk_ptr, row, H, K, first, C, BK), dk.to(dtype), mask=valid[:, None])
    write_32 = write.to(tl.float32)
    # What the chunk's end passes on decays by all of g: the state before it as well as what was written.
    dtotal += tl.sum(write_32 * carried, axis=0)
    dg = tl.cumsum(dsums - write_32 * dwrite, axis=0, reverse=True) + dtotal[None, :]
    tl.store(_token_tile(dg_ptr, row, H, K, first, C, BK), tl.where(g < LOWEST, 0.0, dg), mask=valid[:, None])
