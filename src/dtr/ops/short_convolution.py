"""Causal depthwise convolutions over a few tokens, with fixed taps or taps by token; activations are up to the caller.

Shapes: B batch, T tokens, C channels, W tokens that the convolution sees.
"""

from __future__ import annotations

import torch


def short_convolution(
    x_BTC: torch.Tensor, taps_CW: torch.Tensor, bias_C: torch.Tensor | None, past: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's convolution with its last tap on the current token.

    Written as a sum over shifted copies, which compilers fuse; depthwise convolution kernels are slow in 16 bits.

    Args:
        x_BTC: inputs, zero for padding.
        taps_CW: weights of `torch.nn.Conv1d` without its middle dimension.
        bias_C: added, or None.
        past: the last W - 1 inputs (B, W - 1, C), or None at the start of a sequence, where they are zero.

    Returns:
        (B, T, C), and the last W - 1 inputs for the tokens that follow.
    """
    num_taps, num_tokens = taps_CW.shape[1], x_BTC.shape[1]
    padded = _with_past(x_BTC, past, num_taps - 1)
    out = padded[:, :num_tokens] * taps_CW[:, 0]
    for i in range(1, num_taps):
        out = out + padded[:, i : i + num_tokens] * taps_CW[:, i]
    return out if bias_C is None else out + bias_C, padded[:, num_tokens:]


def dynamic_convolution(
    x_BTC: torch.Tensor, taps_BTCW: torch.Tensor, past: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `short_convolution`, with taps of each token's own (JetBlock, arXiv 2508.15884)."""
    num_taps, num_tokens = taps_BTCW.shape[-1], x_BTC.shape[1]
    padded = _with_past(x_BTC, past, num_taps - 1)
    out = padded[:, :num_tokens] * taps_BTCW[..., 0]
    for i in range(1, num_taps):
        out = out + padded[:, i : i + num_tokens] * taps_BTCW[..., i]
    return out, padded[:, num_tokens:]


def _with_past(x_BTC: torch.Tensor, past: torch.Tensor | None, num_past: int) -> torch.Tensor:
    before = x_BTC.new_zeros(len(x_BTC), num_past, x_BTC.shape[2]) if past is None else past.to(x_BTC.dtype)
    return torch.cat([before, x_BTC], dim=1)
