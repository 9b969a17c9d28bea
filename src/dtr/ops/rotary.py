"""Rotary positions in the half-split layout of the Hugging Face Llama family. Shapes: B, T, H heads, K head dim."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

MIN_NORM = 1e-12
"""Shorter vectors are divided by this, as `F.normalize` does."""


def rotate(x_BTHK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head by its position's angles (RoFormer, arXiv 2104.09864, eq. 34)."""
    cos, sin = cos_BTK.unsqueeze(2).to(x_BTHK.dtype), sin_BTK.unsqueeze(2).to(x_BTHK.dtype)
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_to_unit_length(x_BTHK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor) -> torch.Tensor:
    """`rotate`, then each head's vector divided by its length.

    On a CPU, where every small operation is a trip through memory, a form with a third of them; elsewhere compilers
    fuse the plain one.
    """
    if x_BTHK.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RotateToUnitLength.apply(x_BTHK, cos_BTK, sin_BTK)
    return F.normalize(rotate(x_BTHK, cos_BTK, sin_BTK), dim=-1)


class _RotateToUnitLength(torch.autograd.Function):
    """y = R x / |R x|, and for the gradient dy of y: dx = R^T (dy - y (y . dy)) / |R x|."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor) -> torch.Tensor:
        cos, sin = cos_BTK.unsqueeze(2).to(x.dtype), sin_BTK.unsqueeze(2).to(x.dtype)
        y = _rotated(x, cos, sin, 1)
        inverse_norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(MIN_NORM).reciprocal_()
        y *= inverse_norm
        ctx.save_for_backward(y, inverse_norm, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, inverse_norm, cos, sin = ctx.saved_tensors
        along = (y * grads[0]).sum(-1, keepdim=True)
        across = torch.addcmul(grads[0], y, along, value=-1).mul_(inverse_norm)
        return _rotated(across, cos, sin, -1), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    """R x, or R^T x for the direction -1, where each half has its own cosines and sines."""
    first, second = x.chunk(2, dim=-1)
    # R^T takes the sines of the other half, R its own.
    low, high = sin.chunk(2, dim=-1) if direction == 1 else sin.chunk(2, dim=-1)[::-1]
    y = x * cos
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.addcmul_(second, low, value=-direction)
    y_second.addcmul_(first, high, value=direction)
    return y
