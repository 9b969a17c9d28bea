"""Causal depthwise convolutions over a few tokens, with fixed taps or taps by token; activations are up to the caller.

Shapes: B batch, T tokens, C channels, W tokens that the convolution sees.
"""

from __future__ import annotations

import torch


class RealTokens:
    """The tokens that are no padding, moved to the start of their rows, so that a convolution passes over no padding.

    Args:
        mask_BT: 0 where a token is padding, wherever that is in its row.
    """

    def __init__(self, mask_BT: torch.Tensor) -> None:
        is_padding = mask_BT == 0
        self._num_B = (~is_padding).sum(1)
        # A single token is where it is.
        self._order_BT = is_padding.to(torch.uint8).argsort(dim=1, stable=True) if mask_BT.shape[1] > 1 else None

    def align(self, x_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) with each row's real tokens first, in their order."""
        return x_BT if self._order_BT is None else _rows_at(x_BT, self._order_BT)

    def put_back(self, x_BT: torch.Tensor) -> torch.Tensor:
        """What `align` has moved, where it was."""
        return x_BT if self._order_BT is None else _rows_at(x_BT, self._order_BT.argsort(dim=1))

    def last(self, padded_BPC: torch.Tensor, num_past: int) -> torch.Tensor:
        """The last inputs before and among the real tokens (B, num_past, C), of inputs that begin with so many."""
        return _rows_at(padded_BPC, self._num_B[:, None] + torch.arange(num_past, device=padded_BPC.device))


def short_convolution(
    x_BTC: torch.Tensor,
    taps_CW: torch.Tensor,
    bias_C: torch.Tensor | None,
    past: torch.Tensor | None,
    real: RealTokens | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's convolution with its last tap on the current token.

    Written as a sum over shifted copies, which compilers fuse; depthwise convolution kernels are slow in 16 bits.

    Args:
        x_BTC: inputs.
        taps_CW: weights of `torch.nn.Conv1d` without its middle dimension.
        bias_C: added, or None.
        past: the last W - 1 inputs (B, W - 1, C), or None at the start of a sequence, where they are zero.
        real: which inputs are no padding; all when left out. At padding the output means nothing.

    Returns:
        (B, T, C), and the last W - 1 inputs for the tokens that follow.
    """
    num_taps, num_tokens = taps_CW.shape[1], x_BTC.shape[1]
    padded = with_past(x_BTC if real is None else real.align(x_BTC), past, num_taps - 1)
    out = padded[:, :num_tokens] * taps_CW[:, 0]
    for i in range(1, num_taps):
        out = out + padded[:, i : i + num_tokens] * taps_CW[:, i]
    if bias_C is not None:
        out = out + bias_C
    return _finish(out, padded, num_taps - 1, real)


def dynamic_convolution(
    x_BTC: torch.Tensor, taps_BTCW: torch.Tensor, past: torch.Tensor | None, real: RealTokens | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `short_convolution`, with taps of each token's own (JetBlock, arXiv 2508.15884)."""
    num_taps, num_tokens = taps_BTCW.shape[-1], x_BTC.shape[1]
    if real is not None:
        x_BTC, taps_BTCW = real.align(x_BTC), real.align(taps_BTCW)
    padded = with_past(x_BTC, past, num_taps - 1)
    out = padded[:, :num_tokens] * taps_BTCW[..., 0]
    for i in range(1, num_taps):
        out = out + padded[:, i : i + num_tokens] * taps_BTCW[..., i]
    return _finish(out, padded, num_taps - 1, real)


def with_past(x_BTC: torch.Tensor, past: torch.Tensor | None, num_past: int) -> torch.Tensor:
    """The inputs after the `num_past` ones before them, zeros where there are none."""
    before = x_BTC.new_zeros(len(x_BTC), num_past, x_BTC.shape[2]) if past is None else past.to(x_BTC.dtype)
    return torch.cat([before, x_BTC], dim=1)


def _finish(
    out: torch.Tensor, padded: torch.Tensor, num_past: int, real: RealTokens | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if real is None:
        return out, padded[:, out.shape[1] :]
    return real.put_back(out), real.last(padded, num_past)


def _rows_at(x_BT: torch.Tensor, index_BP: torch.Tensor) -> torch.Tensor:
    return x_BT[torch.arange(len(x_BT), device=x_BT.device)[:, None], index_BP]
