"""A linear map of half-precision numbers whose results are not rounded back to half precision.

Logits near 20 lie 0.125 apart in bfloat16. Which side of such a step a logit falls on depends on the order of its sum,
and so on the batch that it is computed in; with float32 results batches differ by 1e-6 of a logit, given equal inputs.

Shapes: N positions, D hidden dim, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

BLOCK_ROWS = 4096
"""Rows of the weight that are copied to float32 at a time, where a product cannot read them as they are."""


def linear_in_float32(x_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` (N, V) with products and sums in float32, from half-precision operands; wider types keep their own."""
    if weight_VD.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x_ND, weight_VD, bias_V)
    if x_ND.device.type == "cuda":
        out_NV = torch.mm(x_ND, weight_VD.t(), out_dtype=torch.float32)
    else:
        out_NV = torch.empty(len(x_ND), len(weight_VD), device=x_ND.device)
        x_ND = x_ND.float()
        with _products_of(weight_VD.dtype):
            for first in range(0, len(weight_VD), BLOCK_ROWS):
                block = slice(first, first + BLOCK_ROWS)
                out_NV[:, block] = x_ND @ weight_VD[block].float().t()
    return out_NV if bias_V is None else out_NV.add_(bias_V)


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """On a CPU that multiplies bfloat16: do so for float32 operands that hold nothing finer; sums stay in float32."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if dtype == torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
