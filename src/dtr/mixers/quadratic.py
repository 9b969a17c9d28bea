"""Quadratic features of queries and keys: what lets a linear state be read as sharply as softmax reads its keys.

Without them a head's output is linear in its query, whatever the state holds; softmax is far from that, even over a
handful of tokens that any state could tell apart. Each feature here is multiplied by one plus a learned mix of all
features of its head, so that scores are polynomials of degree four in q and k, while the state keeps its size.

Source: ours. Related: the second-order features of Based (arXiv 2402.18668), whose products of all pairs make the state
larger, and the learned feature maps of Hedgehog (arXiv 2402.04347).

Shapes: B batch, T tokens, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import nn

from dtr.ops.dispatch import rotated_quadratic_features
from dtr.ops.quadratic_features import mix_of_heads, quadratic_features

STEP_SIZE = 8.0
"""Factor of the learned mix: entries of A then learn in steps that suit the rate of all other weights."""


class QuadraticFeatures(nn.Module):
    """y = x (1 + 8 A x) with x the head over its root mean square; A starts at zero, so that y starts as x.

    The length of a head is lost, which a mixer with queries and keys of unit length has no use for anyway.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))

    def forward(
        self, x_BTHK: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None = None, backend: str = "auto"
    ) -> torch.Tensor:
        """The features; with the cosines and sines of their positions, rotated and of unit length by `backend`."""
        if angles is None:
            return quadratic_features(x_BTHK, mix_of_heads(x_BTHK, self.weight, step_size=STEP_SIZE))
        return rotated_quadratic_features(x_BTHK, self.weight, *angles, step_size=STEP_SIZE, backend=backend)

    @torch.no_grad()
    def mix_weight(self) -> torch.Tensor:
        """8 A (H, K, K), which makes the mix of a projected head."""
        return STEP_SIZE * self.weight

    @torch.no_grad()
    def joined(self, projection: nn.Linear) -> nn.Linear:
        """8 A after a projection to all heads, as one linear map of the hidden state.

        Divided by the root mean square of the projected head it is the mix that y holds.
        """
        H, K, _ = self.weight.shape
        parts = [projection.weight] if projection.bias is None else [projection.weight, projection.bias[:, None]]
        heads = torch.cat(parts, dim=1).float().view(H, K, -1)
        mixed = (STEP_SIZE * self.weight.float() @ heads).flatten(0, 1).to(projection.weight.dtype)
        linear = nn.Linear(projection.in_features, H * K, bias=projection.bias is not None, device=mixed.device)
        linear.weight = nn.Parameter(mixed[:, : projection.in_features])
        if projection.bias is not None:
            linear.bias = nn.Parameter(mixed[:, -1])
        return linear
