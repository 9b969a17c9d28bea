"""Quadratic features of a head: each feature times one plus a mix of all of them. `dtr.mixers.quadratic` says why.

Shapes: ... leading dims, B batch, T tokens, H heads, K head dim.
"""

from __future__ import annotations

import torch

EPS = 1e-6
"""Keeps the root mean square of a head of zeros from being divided by."""


def quadratic_features(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """x (1 + mix), both (..., K) over the root mean square of x; in the type of x.

    With a mix that is linear in x the length of x drops out.
    """
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (wide * inverse * (1 + mix.float() * inverse)).to(x.dtype)


def mix_of_heads(x_BTHK: torch.Tensor, weight_HKK: torch.Tensor, *, step_size: float) -> torch.Tensor:
    """Each head's own weight times the step size, applied to it."""
    weight = step_size * weight_HKK.to(x_BTHK.dtype)
    # A product for each sequence: for all at once the gradient of the weight would be H long sums, too few for a GPU.
    return (x_BTHK.transpose(1, 2) @ weight.mT).transpose(1, 2)
