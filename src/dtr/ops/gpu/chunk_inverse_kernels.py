"""The inverse of a chunk's unit lower triangular matrix inside a Triton kernel of four warps.

Blocks of 8 x 8 on the diagonal are inverted by forward substitution, then merged with their neighbours three times by
products on tensor cores. Sums of powers would need no substitution but lose all accuracy for equal keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gpu.gated_delta_kernels import _dot


@triton.jit
def inverse_of_chunk(a, narrow: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular float32 a of shape (64, 64), merged by products of type `narrow`.

    Entries of a chunk's inverse and of the products on the way to it are at most 1 in size, so that float16 serves as
    well as tf32, which has as many bits, and is multiplied twice as fast.
    """
    x = _inverse_of_blocks(a)
    x = _merged(x, a, 8, narrow)
    x = _merged(x, a, 16, narrow)
    return _merged(x, a, 32, narrow)


@triton.jit
def _inverse_of_blocks(a):
    """The inverse of I + a with nothing left of a but its blocks of 8 x 8 on the diagonal.

    Each thread solves for one column of one block in its own registers. Eight columns of zeros beside those of a block
    give every thread of the four warps one, which saves sums across threads.
    """
    i = tl.arange(0, 8)
    same = i[:, None, None, None] == i[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(a, [8, 8, 8, 8]), 0.0), axis=2)
    # (row, column, block), the same for all columns of the solution.
    blocks = tl.broadcast_to(tl.permute(blocks, (1, 2, 0))[:, :, :, None], [8, 8, 8, 16])
    row = i[:, None, None]
    x = tl.where(row == tl.arange(0, 16)[None, None, :], 1.0, 0.0) + tl.zeros([8, 8, 16], dtype=tl.float32)
    for r in tl.static_range(1, 8):
        a_r = tl.sum(tl.where(i[:, None, None, None] == r, blocks, 0.0), axis=0)
        x = tl.where(row == r, x - tl.sum(a_r * x, axis=0)[None, :, :], x)
    x = tl.permute(tl.sum(tl.reshape(x, [8, 8, 2, 8]), axis=2), (1, 0, 2))
    return tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [64, 64])


@triton.jit
def _merged(x, a, SIZE: tl.constexpr, narrow: tl.constexpr):
    """From the inverse x of blocks of SIZE on the diagonal to that of blocks twice as large."""
    i = tl.arange(0, 64)
    block, pair = i // SIZE, i // (2 * SIZE)
    below = tl.where((pair[:, None] == pair[None, :]) & (block[:, None] > block[None, :]), a, 0.0)
    x_narrow = x.to(narrow)
    return x - _dot(_dot(x_narrow, below.to(narrow)).to(narrow), x_narrow)
