"""Quadratic features of a head: each feature times one plus a mix of all of them. `dtr.mixers.quadratic` says why.

Shapes: ... leading dims, K head dim.
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
