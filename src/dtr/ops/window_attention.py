"""Softmax attention on a window of the last tokens and on the first ones ("sinks"), at a cost linear in the length.

Source: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), section 3.2; what differs: keys
keep the rotary positions of the whole text. Token t sees itself, the `window - 1` tokens before it and the first
`sinks` tokens.

Shapes: B batch, T tokens, H heads, G key/value heads (H a multiple of G), K head dim, P kept tokens, S tokens in sight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

BLOCK_TOKENS = 128
"""Queries worked on together; each block meets its own keys, those of one window before it, and the sinks."""


class Kept(NamedTuple):
    """Keys and values with their positions."""

    k: torch.Tensor
    """(B, P, G, K), rotated."""
    v: torch.Tensor
    """(B, P, G, K)"""
    positions: torch.Tensor
    """(B, P) place among the real tokens of the sequence; -1 where there is no token."""


def token_positions(
    token_mask_BT: torch.Tensor | None, kept: Kept | None, shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Place of each of (B, T) tokens among the real ones of its sequence; -1 for padding."""
    first = 0 if kept is None else kept.positions.amax(1, keepdim=True) + 1
    if token_mask_BT is None:
        return (torch.arange(shape[1], device=device) + first).expand(shape)
    real = token_mask_BT > 0
    return torch.where(real, real.long().cumsum(1) - 1 + first, -1)


def window_attention(
    q_BTHK: torch.Tensor, new: Kept, kept: Kept | None, *, window: int, sinks: int
) -> tuple[torch.Tensor, Kept]:
    """Attention of each token to its window and the sinks.

    Args:
        q_BTHK: queries, rotated.
        new: keys, values and positions of the same tokens; real tokens must be side by side.
        kept: what the call for the tokens before has returned.
        window: tokens in sight, the current one among them; at least 1.
        sinks: first tokens that stay in sight.

    Returns:
        (B, T, H, K), zeros at padding, and what the tokens that follow need: the sinks, then the last `window` tokens.
    """
    if kept is None:
        kept = _nothing(new, sinks + window)
    first, recent = (Kept(*(x[:, part] for x in kept)) for part in (slice(0, sinks), slice(sinks, None)))
    local = _join(recent, new)
    first = _at(_join(first, new), torch.arange(sinks, device=q_BTHK.device)[None])
    parts = []
    for start in range(0, q_BTHK.shape[1], BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, q_BTHK.shape[1])
        in_sight = Kept(*(x[:, start : end + window] for x in local))
        parts.append(_attend(q_BTHK[:, start:end], new.positions[:, start:end], first, in_sight, window))
    last = local.positions.amax(1, keepdim=True)
    recent = _at(local, last + torch.arange(1 - window, 1, device=q_BTHK.device))
    return torch.cat(parts, dim=1), _join(first, recent)


def attend_window(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    token_mask: torch.Tensor | None,
    kept: tuple[torch.Tensor, ...] | None,
    *,
    window: int,
    sinks: int,
) -> tuple[torch.Tensor, Kept]:
    """`window_attention` for a mixer: from what a cache has kept, and a mask (B, at least T) with 0 for padding."""
    past = None if kept is None else Kept(*kept)
    shape = q_BTHK.shape[:2]
    mask = None if token_mask is None else token_mask[:, -shape[1] :]
    positions = token_positions(mask, past, (shape[0], shape[1]), q_BTHK.device)
    # One type for what a cache keeps: rotation may have widened the keys.
    new = Kept(k_BTGK.to(v_BTGK.dtype), v_BTGK, positions)
    return window_attention(q_BTHK.to(v_BTGK.dtype), new, past, window=window, sinks=sinks)


def kept_bytes(window: int, sinks: int, num_channels: int, bytes_per_element: int) -> int:
    """Bytes of what is kept of one sequence: keys and values of that many channels, and a position each."""
    return (window + sinks) * (2 * num_channels * bytes_per_element + torch.long.itemsize)


def _attend(q_BTHK: torch.Tensor, positions_BT: torch.Tensor, first: Kept, in_sight: Kept, window: int) -> torch.Tensor:
    distance = positions_BT[:, :, None] - in_sight.positions[:, None]
    near = (distance >= 0) & (distance < window) & (in_sight.positions >= 0)[:, None]
    # Sinks inside the window are there already.
    far = (positions_BT[:, :, None] - first.positions[:, None] >= window) & (first.positions >= 0)[:, None]
    mask = torch.cat([far, near], dim=-1)
    is_real = (positions_BT >= 0)[:, :, None]
    # A row without any key would be 0 / 0; what padding attends to is of no consequence.
    mask = mask | ~is_real
    keys, values = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((first.k, in_sight.k), (first.v, in_sight.v)))
    groups = q_BTHK.shape[2] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (keys, values))
    out = F.scaled_dot_product_attention(q_BTHK.transpose(1, 2), keys, values, attn_mask=mask[:, None])
    return out.transpose(1, 2) * is_real.unsqueeze(-1).to(out.dtype)


def _nothing(like: Kept, num_tokens: int) -> Kept:
    batch, _, *heads = like.k.shape
    empty = like.k.new_zeros(batch, num_tokens, *heads)
    return Kept(empty, empty, like.positions.new_full((batch, num_tokens), -1))


def _join(one: Kept, other: Kept) -> Kept:
    return Kept(*(torch.cat([x, y.to(x.dtype)], dim=1) for x, y in zip(one, other, strict=True)))


def _at(tokens: Kept, wanted_BP: torch.Tensor) -> Kept:
    """The tokens at the wanted positions (B or 1, P); zeros and position -1 where there are none."""
    matches = (tokens.positions[:, None] == wanted_BP[:, :, None]) & (wanted_BP >= 0)[:, :, None]
    found = matches.any(-1)
    index = matches.long().argmax(-1)[..., None, None].expand(-1, -1, *tokens.k.shape[2:])
    k, v = (x.gather(1, index) * found[..., None, None].to(x.dtype) for x in (tokens.k, tokens.v))
    return Kept(k, v, torch.where(found, wanted_BP, -1))
