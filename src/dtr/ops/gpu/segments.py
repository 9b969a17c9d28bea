"""Carrying states through sequences that are cut into segments, which run at once: what all scans of chunks share.

What a segment makes of its first state is affine, S -> M S + N. One pass of a scan finds M and N of all segments, a
short loop over them gives each its true first state, and a second pass the outputs. Sequences of one segment each need
one pass.

Shapes: P sequences, Q segments, H heads (of all sequences of a batch, where they are of one length), K key dim, V value
dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from dtr.ops.chunk_layout import ChunkLayout
from dtr.ops.gpu.gated_delta_kernels import carry_segments


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where the segments of a scan begin."""

    num_segments: int
    length_chunks: int = 0
    """Of each but the last, where all are of one length."""
    bounds: torch.Tensor | None = None
    """int32 (Q + 1,), first chunk of each segment, where they are not."""

    @classmethod
    def of_chunks(cls, num_chunks: int, wanted: int) -> Segments:
        """About `wanted` segments of one length."""
        length = triton.cdiv(num_chunks, wanted)
        return cls(num_segments=triton.cdiv(num_chunks, length), length_chunks=length)


@dataclass(frozen=True, kw_only=True)
class PackedStates:
    """Several sequences of any lengths in one row, and the states from which they go on."""

    layout: ChunkLayout
    initial_PHKV: torch.Tensor
    """float32."""

    @property
    def segments(self) -> Segments:
        return Segments(num_segments=self.layout.num_pieces, bounds=self.layout.piece_chunks)


def scan_segments(
    scan: Callable[[torch.Tensor | None, torch.Tensor], None],
    cut: Segments,
    like_HKV: torch.Tensor,
    packed: PackedStates | None,
) -> torch.Tensor:
    """Run a scan over all segments; last states (H, K, V), or with `packed` (P, H, K, V), in float32.

    Args:
        scan: given first states (H, Q, K, V), or None for zeros, and where last states go (H, Q, K, V). Without first
            states, and with K more columns there, it finds N and M side by side.
        cut: the segments.
        like_HKV: of the shape of one state, contents of no meaning.
        packed: the sequences, where there are several.
    """
    (H, K, V), Q = like_HKV.shape, cut.num_segments
    initial, starts = None, None
    if packed is not None:
        given, starts = packed.initial_PHKV.transpose(0, 1), packed.layout.is_first_piece
        initial = given.contiguous()
    if packed is None or packed.layout.num_sequences < Q:
        firsts = like_HKV.new_empty(H, Q, K, V)
        if packed is not None:
            firsts[:, packed.layout.sequence_pieces[:-1]] = given
        if Q > 1:
            affine = like_HKV.new_empty(H, Q, K, V + K)
            scan(None, affine)
            carry_segments[(H, V // 16)](
                affine, firsts, starts, Q, K=K, V=V, BV=16, HAS_STARTS=starts is not None, num_warps=4, num_stages=1
            )
            initial = firsts
    last = like_HKV.new_empty(H, Q, K, V)
    scan(initial, last)
    if packed is None:
        return last[:, -1]
    return last[:, packed.layout.sequence_pieces[1:] - 1].transpose(0, 1)
