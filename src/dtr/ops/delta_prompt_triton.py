"""A prompt through a `GatedDeltaNet` layer, from its joined projections to its gated outputs.

`delta_prompt_kernels.py` has the maths. A prompt of few sequences is cut into segments that are scanned at once, as in
`gated_delta_prefill.py`.

Shapes: B batch, T tokens, H heads, K head dim, N chunks of 64 tokens, P segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch.nn import functional as F

from dtr.ops.decoding_triton import rotate_heads
from dtr.ops.delta_prompt_kernels import chunk_maps, prompt_scan
from dtr.ops.gated_delta_kernels import carry_segments, chunk_inverse

if TYPE_CHECKING:
    from dtr.ops.decoding import HeadNorms

_CHUNK_TOKENS = 64
_MIN_SEGMENT_CHUNKS = 8
_MAX_SEGMENTS = 16
_HEAD_DIM = 64
_MIN_TOKENS = 14 * _CHUNK_TOKENS


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernels are cut for a machine."""

    inverse_warps: int = 2
    inverse_paired: bool = False
    """Whether one substitution inverts both halves of a chunk."""
    map_warps: int = 4
    scan_columns: int = 16
    """Columns of a state that a program carries."""
    scan_warps: int = 4
    scan_stages: int = 3
    """Chunks that are on their way from memory."""
    full: int = 72
    """Sequences times heads from which on the prompt is not cut into segments."""
    segments: int | None = None
    """Segments, whatever there is to fill the GPU."""


DEFAULT = Tuning()


def supports(rows_BTC: torch.Tensor, *, num_heads: int, head_dim: int) -> bool:
    """Whether `prompt` has been seen to work on a GPU for inputs like these.

    A test with heads of 16, prompts of 7 and of 3000 tokens and segments ended in an illegal memory access that is not
    explained, so nothing is let through that has not run: not small heads or few tokens, nor what is cut into segments.
    Larger heads do not fit into registers.
    """
    B, T = rows_BTC.shape[:2]
    is_whole = _num_segments(B * num_heads, triton.cdiv(T, _CHUNK_TOKENS), DEFAULT.full) == 1
    return is_whole and T >= _MIN_TOKENS and head_dim == _HEAD_DIM and rows_BTC.dtype == torch.bfloat16


@torch.no_grad()
def prompt(
    rows_BTC: torch.Tensor,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    num_heads: int,
    token_mask_BT: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
    tuning: Tuning = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `dtr.ops.decoding.delta_prompt`; `supports` says for what."""
    maps = map_chunks(
        rows_BTC, cos_BTK, sin_BTK, num_heads=num_heads, token_mask_BT=token_mask_BT, norms=norms, tuning=tuning
    )
    return scan_chunks(rows_BTC, maps, num_heads=num_heads, tuning=tuning)


def map_chunks(
    rows_BTC: torch.Tensor,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    num_heads: int,
    token_mask_BT: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
    tuning: Tuning = DEFAULT,
) -> list[torch.Tensor]:
    """What each chunk makes of the state before it: P, N^T, X, Y^T (B H, N, ...) and the decay over it (B H, N)."""
    assert rows_BTC.stride(2) == 1, "a row's projections lie side by side"
    B, T, K, H = *rows_BTC.shape[:2], cos_BTK.shape[-1], num_heads
    N, C = triton.cdiv(T, _CHUNK_TOKENS), _CHUNK_TOKENS
    rows, sizes = rows_BTC, [H * K] * 4 + [H] * 2
    q, k, _, _, decay, write = rows[..., : sum(sizes)].split(sizes, dim=-1)
    eps, weights = (0.0, (None, None)) if norms is None else (norms.eps, (norms.query, norms.key))
    q, k = (
        rotate_heads(x.unflatten(-1, (H, K)), cos_BTK, sin_BTK, weight, eps, True) for x, weight in zip((q, k), weights)
    )
    g, beta = -F.softplus(decay.float()), torch.sigmoid(write.float())
    if token_mask_BT is not None:
        g, beta = (x * token_mask_BT[..., None] for x in (g, beta))
    p, n, x, y, inverses = (rows.new_empty(B * H, N, *size) for size in ((K, K), (K, K), (C, K), (K, C), (C, C)))
    cum = rows.new_empty(B * H, N, C, dtype=torch.float32)
    total = rows.new_empty(B * H, N, dtype=torch.float32)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(rows):
        chunk_inverse[(B * H, N)](
            k, g.contiguous(), beta.contiguous(), cum, inverses, T, H, K=K, PAIRED=tuning.inverse_paired,
            num_warps=tuning.inverse_warps,
        )  # fmt: skip
        chunk_maps[(B * H, N)](
            q, k, rows, beta.contiguous(), cum, inverses, p, n, x, y, total, T, rows.stride(1), H=H, K=K,
            num_warps=tuning.map_warps,
        )  # fmt: skip
    return [p, n, x, y, total]


def scan_chunks(
    rows_BTC: torch.Tensor, maps: list[torch.Tensor], *, num_heads: int, tuning: Tuning = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated outputs (B, T, H K) and the last state (B, H, K, K) in float32, from a state of zeros."""
    (B, T), H, (_, N, K, _) = rows_BTC.shape[:2], num_heads, maps[0].shape
    out = rows_BTC.new_empty(B, T, H * K)
    length = triton.cdiv(N, tuning.segments or _num_segments(B * H, N, tuning.full))
    P = triton.cdiv(N, length)
    columns = min(K, tuning.scan_columns)

    def scan(initial: torch.Tensor | None, last: torch.Tensor) -> None:
        affine = last.shape[-1] > K
        prompt_scan[(last.shape[-1] // columns, B * H, P)](
            rows_BTC, *maps, last if initial is None else initial, last, out, T, N, length, rows_BTC.stride(1),
            H=H, K=K, BV=columns, HAS_INITIAL=initial is not None, AFFINE=affine, num_warps=tuning.scan_warps,
            num_stages=tuning.scan_stages,
        )  # fmt: skip

    with torch.cuda.device_of(rows_BTC):
        initial = None
        if P > 1:
            initial, affine = (rows_BTC.new_empty(B * H, P, K, w, dtype=torch.float32) for w in (K, 2 * K))
            scan(None, affine)
            carry_segments[(B * H, K // 16)](affine, initial, P, K=K, V=K, BV=16, num_warps=4, num_stages=1)
        last = rows_BTC.new_empty(B * H, P, K, K, dtype=torch.float32)
        scan(initial, last)
    return out, last[:, -1].reshape(B, H, K, K)


def _num_segments(num_sequences: int, num_chunks: int, full: int) -> int:
    return max(1, min(_MAX_SEGMENTS, full // num_sequences, num_chunks // _MIN_SEGMENT_CHUNKS))
