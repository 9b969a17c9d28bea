"""Cutting sequences into chunks and back, shared by the chunked forms of the recurrences.

Shapes: B batch, T tokens, H heads, G = B * H sequences, N chunks, C tokens of a chunk, K key dim, V value dim.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

MIN_CHUNK = 16
MIN_LOG_DECAY = -4.0
"""The strongest decay of a key channel in one token, a half-life of 0.17 tokens. Mixers keep to it, so that all
backends compute the same: our kernels measure decays from the middle of a chunk of 32 tokens, where 16 of this one make
exp(64), 6e27, which leaves float32 room for what it multiplies."""


def chunk_length(num_tokens: int, chunk_size: int) -> int:
    """Tokens per chunk: `chunk_size`, or for a shorter sequence the next power of two, at least 16."""
    assert chunk_size >= MIN_CHUNK, chunk_size
    assert chunk_size & (chunk_size - 1) == 0, f"chunk_size {chunk_size} is no power of two"
    assert num_tokens >= 1, "an empty sequence has no output"
    return min(chunk_size, max(MIN_CHUNK, 1 << (num_tokens - 1).bit_length()))


def state_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Type of states and decays: float32, or float64 where an input has that (reference runs, gradient checks)."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def to_chunks(
    x_BTH: torch.Tensor, num_chunk_tokens: int, dtype: torch.dtype, *, chunks_first: bool = False
) -> torch.Tensor:
    """[B, T, H, ...] to contiguous [G, N, C, ...], or [N, G, C, ...] for loops over chunks; zeros after the end.

    A token of zeros neither writes to a state nor decays it, in both recurrences.
    """
    num_pad = -x_BTH.shape[1] % num_chunk_tokens
    x_BHT = x_BTH.to(dtype).transpose(1, 2)
    if num_pad:
        x_BHT = F.pad(x_BHT, (0, 0) * (x_BHT.dim() - 3) + (0, num_pad))
    x_BHNC = x_BHT.unflatten(2, (-1, num_chunk_tokens))
    return x_BHNC.movedim(2, 0).contiguous().flatten(1, 2) if chunks_first else x_BHNC.contiguous().flatten(0, 1)


def from_chunks(x_GNCV: torch.Tensor, num_tokens: int, num_heads: int, *, chunks_first: bool = False) -> torch.Tensor:
    """[G, N, C, V], or [N, G, C, V], to [B, T, H, V] without the padding."""
    if chunks_first:
        x_BNCHV = x_GNCV.unflatten(1, (-1, num_heads)).permute(1, 0, 3, 2, 4)
        return x_BNCHV.flatten(1, 2)[:, :num_tokens]
    return x_GNCV.flatten(1, 2).unflatten(0, (-1, num_heads))[:, :, :num_tokens].transpose(1, 2)


def start_state(
    state_BHKV: torch.Tensor | None, k_BTHK: torch.Tensor, v_BTHV: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The carried-in state [B, H, K, V] in `dtype`, zeros for None."""
    if state_BHKV is None:
        batch, _, heads, dim = k_BTHK.shape
        return v_BTHV.new_zeros(batch, heads, dim, v_BTHV.shape[-1], dtype=dtype)
    return state_BHKV.to(dtype)


def pair_decays(g: torch.Tensor) -> torch.Tensor:
    """exp of the sum of g over the tokens after j up to i, for j <= i, else 0; [..., C, C].

    A difference of running sums loses its digits after one strong decay, so these are kept as two numbers each.
    """
    sums = g.double().cumsum(-1)
    high = sums.to(g.dtype)
    low = (sums - high).to(g.dtype)
    differences = (high.unsqueeze(-1) - high.unsqueeze(-2)).add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    return differences.exp_().tril_()


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[None] | torch.autocast:
    """Context without autocast, which would otherwise run the matmuls on states and inverses in 16 bits."""
    # On the device "meta", where shapes are all there is, autocast does not exist.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
