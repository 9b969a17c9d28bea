"""The norm and the first half of a gated MLP over a prompt, in Gluon, for GPUs of the Hopper generation.

A tile of 128 rows stays in shared memory while the weights stream past it. A plain tiling reads both of its operands
anew for every tile of the output: of 262,144 rows, dim 576 and 3,072 columns, tiles of 128 x 256 read 11 GB, this 7.
One warp copies, and two groups of four take turns: one multiplies while the other finishes its outputs and writes them.
Programs stay for many tiles, as starting one takes as long as a good part of so short an inner dim.

The order of the weights' rows (`dtr.ops.projections.GatedProjection`) puts gate and up of an output, and eight outputs
that are neighbours in memory, into the registers of one thread: nothing is exchanged before it is stored.

Shapes: R rows, D hidden dim, C inner dim.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 128
"""Rows of x that stay, and rows of weights (gates and up projections) that a group multiplies them with."""
_INNER = 64
_TILE_BYTES = 2 * ROWS * _INNER
_SHARED_BYTES = 227 * 2**10
"""Of a program, on GPUs of this generation."""
_BARRIER_BYTES = 2048
_MAX_STAGES = 5
_MIN_STAGES = 3
_REGISTERS = 168
"""Of a thread, on average over three groups of four warps: two have `_MATH_REGISTERS`, one has `_COPY_REGISTERS`."""
_MATH_REGISTERS = 240
_COPY_REGISTERS = 24

BR = gl.constexpr(ROWS)
BN = gl.constexpr(ROWS)
BD = gl.constexpr(_INNER)


@gluon.jit
def _copy(
    x_desc, w_desc, x_tiles, w_tiles, x_full, x_empty, w_full, w_empty, begin, end, STEPS: gl.constexpr,
    PAIRS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch tiles of x when both groups are done with the last ones, and the weights as places become free."""
    w_count = 0
    x_count = 0
    for pair in range(begin, end):
        is_first = (pair == begin) | (pair % PAIRS == 0)
        for half in gl.static_range(2):
            row = ((pair % PAIRS) * 2 + half) * BN
            is_new = is_first & (half == 0)
            for k in range(STEPS):
                if is_new:
                    mbarrier.wait(x_empty.index(k), (x_count & 1) ^ 1)
                    mbarrier.expect(x_full.index(k), BR * BD * 2)
                    at = [(pair // PAIRS) * BR, k * BD]
                    tma.async_copy_global_to_shared(x_desc, at, x_full.index(k), x_tiles.index(k))
                slot = w_count % STAGES
                mbarrier.wait(w_empty.index(slot), ((w_count // STAGES) & 1) ^ 1)
                mbarrier.expect(w_full.index(slot), BN * BD * 2)
                tma.async_copy_global_to_shared(w_desc, [row, k * BD], w_full.index(slot), w_tiles.index(slot))
                w_count += 1
        if is_first:
            x_count += 1


@gluon.jit
def _multiply(
    half: gl.constexpr, x_tiles, w_tiles, x_full, x_empty, w_full, w_empty, turns, out_ptr, eps, R, begin, end,
    D: gl.constexpr, C: gl.constexpr, STEPS: gl.constexpr, PAIRS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One half of each pair of column blocks: 64 outputs from 128 rows of weights.

    A barrier is waited for by the parity of its uses, which only tells a use from the one before it. As the other group
    waits for half of the uses of a place, each group starts when the other has seen all of its own.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    # Of the outputs, as they lie in registers after their columns are sorted.
    sorted_layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [64, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[BR, BN // 2],
    )
    zeros = gl.zeros([BR, BN], gl.float32, layout)
    scale = gl.zeros([BR], gl.float32, gl.SliceLayout(1, narrow))
    w_count = half * STEPS
    x_count = 0
    for pair in range(begin, end):
        is_first = (pair == begin) | (pair % PAIRS == 0)
        is_last = (pair == end - 1) | (pair % PAIRS == PAIRS - 1)
        # What x is still needed for in the first round follows the products.
        is_done = is_last & (is_first == 0)
        if is_first:
            x_count += 1
        mbarrier.wait(turns.index(half), ((pair - begin) & 1) ^ (1 - half))
        acc = zeros
        for k in range(STEPS):
            slot = (w_count + k) % STAGES
            if is_first:
                mbarrier.wait(x_full.index(k), (x_count - 1) & 1)
            mbarrier.wait(w_full.index(slot), ((w_count + k) // STAGES) & 1)
            weight = w_tiles.index(slot).permute((1, 0))
            acc = warpgroup_mma(x_tiles.index(k), weight, acc, use_acc=k > 0, is_async=True)
            # The product before this one is done.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if k > 0:
                mbarrier.arrive(w_empty.index((w_count + k - 1) % STAGES))
                if is_done:
                    mbarrier.arrive(x_empty.index(k - 1))
        mbarrier.arrive(turns.index(1 - half))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(w_empty.index((w_count + STEPS - 1) % STAGES))
        w_count += 2 * STEPS
        if is_first:
            squares = gl.zeros([BR], gl.float32, gl.SliceLayout(1, narrow))
            for k in range(STEPS):
                x = x_tiles.index(k).load(narrow).to(gl.float32)
                squares += gl.sum(x * x, axis=1)
            scale = 1.0 / gl.sqrt(squares / D + eps)
            if is_last:
                for k in range(STEPS):
                    mbarrier.arrive(x_empty.index(k))
        if is_done:
            mbarrier.arrive(x_empty.index(STEPS - 1))
        gate, up = acc.reshape([BR, BN // 2, 2]).split()
        s = gl.convert_layout(scale, gl.SliceLayout(1, gate.type.layout))[:, None]
        gate, up = gate * s, up * s
        out = (gate / (1.0 + gl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
        out = out.reshape([BR, BN // 64, 8, 4]).permute([0, 1, 3, 2]).reshape([BR, BN // 2])
        out = gl.convert_layout(out, sorted_layout)
        r = (pair // PAIRS) * BR + gl.arange(0, BR, layout=gl.SliceLayout(1, sorted_layout))
        c = ((pair % PAIRS) * 2 + half) * (BN // 2) + gl.arange(0, BN // 2, layout=gl.SliceLayout(0, sorted_layout))
        gl.store(out_ptr + r.to(gl.int64)[:, None] * C + c[None, :], out, mask=(r < R)[:, None])


@gluon.jit(do_not_specialize=["R"])
def _gated_pair(
    x_desc, w_desc, out_ptr, eps, R, D: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    MATH_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (programs): an equal share each of all pairs of column blocks, row tile after row tile."""
    STEPS: gl.constexpr = D // BD
    PAIRS: gl.constexpr = C // BN
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STEPS, BR, BD], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BD], w_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    for k in gl.static_range(STEPS):
        mbarrier.init(x_full.index(k), count=1)
        mbarrier.init(x_empty.index(k), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=1)
    fence_async_shared()
    total = (gl.cdiv(R, BR) * PAIRS).to(gl.int64)
    begin = (total * gl.program_id(0) // gl.num_programs(0)).to(gl.int32)
    end = (total * (gl.program_id(0) + 1) // gl.num_programs(0)).to(gl.int32)
    # The language has no starred expressions.
    work = (out_ptr, eps, R, begin, end, D, C, STEPS, PAIRS, STAGES)
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), x_tiles, w_tiles, x_full, x_empty, w_full, w_empty, turns) + work),  # noqa: RUF005
            (_multiply, (gl.constexpr(1), x_tiles, w_tiles, x_full, x_empty, w_full, w_empty, turns) + work),  # noqa: RUF005
            (
                _copy,
                (x_desc, w_desc, x_tiles, w_tiles, x_full, x_empty, w_full, w_empty, begin, end, STEPS, PAIRS, STAGES),
            ),
        ],
        [4, 1],
        [MATH_REGISTERS, COPY_REGISTERS],
    )


def num_stages(dim: int) -> int:
    """Tiles of weights on their way from memory that fit beside a tile of x, at most `_MAX_STAGES`."""
    free = _SHARED_BYTES - _BARRIER_BYTES - _TILE_BYTES * (dim // _INNER)
    return min(_MAX_STAGES, free // _TILE_BYTES)


def supports(x_RD: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the tiles divide the weights (2 C, D) evenly, and enough of them fit into shared memory."""
    num_rows, dim = weight.shape
    is_even = dim % _INNER == 0 and num_rows % (2 * ROWS) == 0 and x_RD.is_contiguous()
    return is_even and x_RD.dtype == torch.bfloat16 and num_stages(dim) >= _MIN_STAGES


@torch.no_grad()
def gated_pair(x_RD: torch.Tensor, rows: torch.Tensor, eps: float, stages: int | None = None) -> torch.Tensor:
    """(R, C) of x (R, D) over its root mean square, from `dtr.ops.projections.GatedProjection.streamed_rows`."""
    (R, D), inner = x_RD.shape, len(rows) // 2
    out = x_RD.new_empty(R, inner)
    layout = gl.NVMMASharedLayout.get_default_for([ROWS, _INNER], gl.bfloat16)
    x_desc, w_desc = (TensorDescriptor.from_tensor(x, [ROWS, _INNER], layout) for x in (x_RD, rows))
    processors = torch.cuda.get_device_properties(x_RD.device).multi_processor_count
    pairs = triton.cdiv(R, ROWS) * (inner // ROWS)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x_RD):
        _gated_pair[(min(processors, pairs),)](
            x_desc, w_desc, out, eps, R, D=D, C=inner, STAGES=stages or num_stages(D),
            MATH_REGISTERS=_MATH_REGISTERS, COPY_REGISTERS=_COPY_REGISTERS, num_warps=4, maxnreg=_REGISTERS,
        )  # fmt: skip
    return out
