"""Rotary positions in the half-split layout of the Hugging Face Llama family. Shapes: B, T, H heads, K head dim."""

from __future__ import annotations

import torch


def rotate(x_BTHK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head by its position's angles (RoFormer, arXiv 2104.09864, eq. 34)."""
    cos, sin = cos_BTK.unsqueeze(2).to(x_BTHK.dtype), sin_BTK.unsqueeze(2).to(x_BTHK.dtype)
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos + torch.cat((-second, first), dim=-1) * sin
