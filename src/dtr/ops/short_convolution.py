"""Causal depthwise convolutions over a few tokens: with fixed taps, and with taps that each token makes for itself.

Both are written as sums over shifted copies, which compilers fuse; depthwise convolution kernels are slow in 16 bits.

Shapes: B batch, T tokens, C channels, H heads, V value dim, W tokens that the convolution sees.
"""

from __future__ import annotations

import torch


def with_past(x_BTC: torch.Tensor, past: torch.Tensor | None, num_past: int) -> torch.Tensor:
    """The last `num_past` earlier inputs before `x` (B, num_past + T, C); zeros where a sequence had not started.

    Args:
        x_BTC: inputs, zero for padding.
        past: at least the last `num_past` inputs (B, ., C), or None at the start of a sequence.
        num_past: how many earlier tokens are needed.
    """
    if past is None:
        past = x_BTC.new_zeros(len(x_BTC), num_past, x_BTC.shape[2])
    return torch.cat([past[:, past.shape[1] - num_past :].to(x_BTC.dtype), x_BTC], dim=1)


def short_convolution(
    x_BTC: torch.Tensor, taps_CW: torch.Tensor, bias_C: torch.Tensor | None, past: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's convolution with its last tap on the current token.

    Args:
        x_BTC: inputs, zero for padding.
        taps_CW: weights of `torch.nn.Conv1d` without its middle dimension.
        bias_C: added, or None.
        past: at least the last W - 1 inputs (B, ., C), or None at the start of a sequence, where they are zero.

    Returns:
        (B, T, C), and the last W - 1 inputs for the tokens that follow.
    """
    num_taps, num_tokens = taps_CW.shape[1], x_BTC.shape[1]
    padded = with_past(x_BTC, past, num_taps - 1)
    out = padded[:, :num_tokens] * taps_CW[:, 0]
    for i in range(1, num_taps):
        out = out + padded[:, i : i + num_tokens] * taps_CW[:, i]
    return out if bias_C is None else out + bias_C, padded[:, num_tokens:]


def dynamic_convolution(padded_BSHV: torch.Tensor, taps_BTHW: torch.Tensor) -> torch.Tensor:
    """sum_w taps_w v_{t - W + 1 + w}: each token weighs the values of the last W tokens, head by head.

    Source: "Pay Less Attention with Lightweight and Dynamic Convolutions" (arXiv 1901.10430), eq. 4, whose softmax over
    the taps is left to the caller.

    Args:
        padded_BSHV: values of the W - 1 tokens before, then of these tokens; S = W - 1 + T.
        taps_BTHW: weights, the last one for the current token.

    Returns:
        (B, T, H, V).
    """
    num_tokens = taps_BTHW.shape[1]
    out = padded_BSHV[:, :num_tokens] * taps_BTHW[..., :1]
    for i in range(1, taps_BTHW.shape[-1]):
        out = out + padded_BSHV[:, i : i + num_tokens] * taps_BTHW[..., i : i + 1]
    return out
