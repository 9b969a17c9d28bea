"""What the mixers of native architectures share: how they start from the teacher in spite of convolution and SiLU.

Shapes: B batch, T tokens, D hidden dim, C channels of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtr.mixers.base import Mixer
from dtr.ops.short_convolution import RealTokens, short_convolution

CONV_TOKENS = 4
"""Tokens that the short convolution sees, the current one among them."""
VALUE_SCALE, SCORE_SCALE = 0.25, 0.5
"""Size of what SiLU gets at the start for values, and for queries and keys: where it is small, SiLU(u) is nearly u / 2.
A norm follows on each, so that the size itself has no effect."""


class CausalConv1d(nn.Conv1d):
    """A short depthwise convolution over what has been, with weights as the library names them.

    A module that computes by its own weights, so that hooks which bring them into memory (offloading) are asked.
    """

    def forward(  # type: ignore[override]
        self, x_BTC: torch.Tensor, past: torch.Tensor | None, real: RealTokens | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `short_convolution`: the convolved inputs (B, T, C), and the last ones for later tokens."""
        return short_convolution(x_BTC, self.weight[:, 0], self.bias, past, real)


class NativeMixer(Mixer):
    """A mixer without rotary positions: a convolution, a recurrence, a norm and a gate, then `out_proj`."""

    out_proj: nn.Linear

    def mix(
        self,
        hidden_BTD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        token_mask_BT: torch.Tensor | None,
        memory: Any,
        starting_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `Mixer.mix`; positions are not used."""
        mask = None if token_mask_BT is None else token_mask_BT[..., None]
        heads_BTC, state, conv_inputs = self._heads(hidden_BTD, mask, memory)
        if memory is not None:
            memory.write(state, hidden_BTD.shape[1], conv_inputs)
        return self.out_proj(heads_BTC)

    def _heads(
        self, hidden_BTD: torch.Tensor, token_mask_BT1: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gated heads side by side (B, T, C), the last state and the convolution's last inputs."""
        raise NotImplementedError


def start_taps(weight_CD: torch.Tensor, head_dim: int, size: float) -> torch.Tensor:
    """The convolution's last tap (C,) that gives heads of a projection about the given size.

    Inputs have about unit size in each channel, so that a head's rows say how large its outputs are.
    """
    per_head = weight_CD.unflatten(0, (-1, head_dim)).square().sum(-1).mean(-1).sqrt().clamp(min=1e-6)
    return (size / per_head).repeat_interleave(head_dim)


def fit_channel_scales(heads_BTC: torch.Tensor, out_DC: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """Least-squares factors w (C,) of the heads' channels before the output projection.

    A norm has taken away the size of each head's output. With n the heads and O the projection, the sum over tokens of
    |O diag(w) n - target|^2 is least where (O^T O * sum n n^T) w = diag(O^T sum target n^T), `*` by element.
    """
    heads, target = heads_BTC.flatten(0, 1).double(), target_BTD.flatten(0, 1).double()
    out = out_DC.double()
    gram = (out.mT @ out) * (heads.mT @ heads)
    wanted = ((target.mT @ heads) * out).sum(0)
    # A little ridge, for channels that nothing depends on.
    gram.diagonal().add_(1e-3 * gram.diagonal().mean().clamp(min=1e-12))
    return torch.linalg.solve(gram, wanted)
