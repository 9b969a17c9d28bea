"""Sequences of any lengths, packed one after the other, in whole chunks of tokens: several of them in one launch.

Kernels over chunks know no sequences, as what a chunk does depends on its own tokens and the state before it. So each
sequence is padded up to a whole number of chunks, and only what carries states from chunk to chunk is told where
sequences begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CHUNK_TOKENS = 64
FULL = 144
"""Heads of pieces that fill a GPU."""
_MIN_PIECE_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """Where tokens lie when each of P sequences fills whole chunks. All tensors are on the device."""

    token: torch.Tensor
    """int64 (padded tokens,), which packed token stands there; any where it is padding."""
    is_text: torch.Tensor
    """uint8 (1, padded tokens), 0 where it is padding."""
    place: torch.Tensor
    """int64 (packed tokens,), where each packed token stands; the first of them is that of the first sequence."""
    first_token: torch.Tensor
    """int64 (P,), each sequence's first packed token, counted from the first sequence's."""
    piece_chunks: torch.Tensor
    """int32 (Q + 1,), first chunk of each piece, and the number of chunks: few long sequences are cut into pieces,
    which a GPU reads at once."""
    sequence_pieces: torch.Tensor
    """int64 (P + 1,), first piece of each sequence, and the number of pieces."""
    is_first_piece: torch.Tensor
    """uint8 (Q,), whether a sequence begins with this piece."""
    num_pieces: int
    num_sequences: int
    is_whole: bool
    """Whether no sequence needs padding, so that tokens lie where they lay."""


def lay_out(starts: np.ndarray, device: torch.device | str, *, num_heads: int = FULL) -> ChunkLayout:
    """The layout of sequences whose tokens begin at `starts` (P + 1,), the last entry being where the last one ends.

    Copies to the device wait for nothing.

    Args:
        starts: counted in tokens; the first need not be 0.
        device: where the layout is used.
        num_heads: that run side by side anyway, so that sequences need not be cut so finely.
    """
    starts = starts.astype(np.int64) - int(starts[0])
    lengths = np.diff(starts)
    num_chunks = -(-lengths // CHUNK_TOKENS)
    chunk_starts = np.concatenate([[0], np.cumsum(num_chunks)])
    sequence = np.repeat(np.arange(len(lengths)), num_chunks * CHUNK_TOKENS)
    within = np.arange(len(sequence)) - chunk_starts[sequence] * CHUNK_TOKENS
    is_text = within < lengths[sequence]
    pieces, sequence_pieces = _cut(num_chunks, chunk_starts, max(1, FULL // num_heads))
    is_first = np.isin(np.arange(len(pieces) - 1), sequence_pieces[:-1])
    return ChunkLayout(
        token=_to_device(np.where(is_text, starts[sequence] + within, 0), device),
        is_text=_to_device(is_text.astype(np.uint8)[None], device),
        place=_to_device(np.flatnonzero(is_text), device),
        first_token=_to_device(starts[:-1], device),
        piece_chunks=_to_device(pieces.astype(np.int32), device),
        sequence_pieces=_to_device(sequence_pieces, device),
        is_first_piece=_to_device(is_first.astype(np.uint8), device),
        num_pieces=len(pieces) - 1,
        num_sequences=len(lengths),
        is_whole=bool(is_text.all()),
    )


def _cut(num_chunks: np.ndarray, chunk_starts: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """First chunks of about `wanted` pieces, none shorter than eight chunks unless its sequence is; first pieces."""
    length = max(_MIN_PIECE_CHUNKS, -(-int(num_chunks.sum()) // wanted))
    num_pieces = -(-num_chunks // length)
    first_pieces = np.concatenate([[0], np.cumsum(num_pieces)])
    sequence = np.repeat(np.arange(len(num_chunks)), num_pieces)
    within = np.arange(len(sequence)) - first_pieces[sequence]
    return np.append(chunk_starts[sequence] + within * length, chunk_starts[-1]), first_pieces


def _to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # From pinned memory a copy does not wait.
    return tensor.pin_memory().to(device, non_blocking=True)
