"""The norm and the first half of a gated MLP over a prompt, in Triton.

Gate and up projection of a long prompt are several times as large as its hidden states; here they never reach memory.
The weight of the norm is part of the projections, and its division comes after them.

Shapes: R rows, D hidden dim, C inner dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

MIN_ROWS = 1024
"""Fewer rows do not fill a GPU with tiles of this size."""
_INNER = 64
_STREAMING_GPU = (9, 0)
_STREAMING_RELEASE = "3.6"
_NORM_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the product is cut for a machine."""

    rows: int = 128
    columns: int = 128
    """Of the gate, and as many of the up projection."""
    warps: int = 8
    stages: int = 4


DEFAULT = Tiles()


@triton.jit(do_not_specialize=["R"])
def _inverse_rms(x_ptr, scale_ptr, eps, R, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Grid (R / BR): one over the root mean square of each row."""
    r, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    at_x = x_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    squares = tl.zeros([BR, BD], dtype=tl.float32)
    for first in tl.static_range(0, D, BD):
        x = tl.load(at_x + first, mask=(r < R)[:, None], other=0.0).to(tl.float32)
        squares += x * x
    tl.store(scale_ptr + r, 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps), mask=r < R)


@triton.jit(do_not_specialize=["R"])
def _gated_pair(
    x_ptr, scale_ptr, weight_ptr, out_ptr, R, D: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Grid (C / BC, R / BR): one tile of the output; weight rows are the gate's, then the up projection's.

    Rows of x count times their factor `scale`, which a matrix product may as well take at its end.
    """
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    c, d = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BD)
    seen = (r < R)[:, None]
    at_x = x_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    at_gate = weight_ptr + c[None, :] * D + d[:, None]
    at_up = at_gate + C * D
    gate = tl.zeros([BR, BC], dtype=tl.float32)
    up = tl.zeros([BR, BC], dtype=tl.float32)
    for _ in range(0, D, BD):
        x = tl.load(at_x, mask=seen, other=0.0)
        gate = tl.dot(x, tl.load(at_gate), gate, input_precision="tf32x3")
        up = tl.dot(x, tl.load(at_up), up, input_precision="tf32x3")
        at_x += BD
        at_gate += BD
        at_up += BD
    scale = tl.load(scale_ptr + r, mask=r < R, other=0.0)[:, None]
    gate, up = gate * scale, up * scale
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + r.to(tl.int64)[:, None] * C + c[None, :], out.to(out_ptr.dtype.element_ty), mask=seen)


def supports(x_RD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles = DEFAULT) -> bool:
    """Whether the product is large and cut evenly, in bfloat16 and without a bias."""
    num_rows, dim = x_RD.shape
    fits = dim % _INNER == 0 and weight.shape[0] % (2 * tiles.columns) == 0 and x_RD.is_contiguous()
    return bias is None and x_RD.dtype == torch.bfloat16 and num_rows >= MIN_ROWS and fits


def streaming(x_RD: torch.Tensor, weight: torch.Tensor) -> Any:
    """The module `mlp_gluon` where it runs, which is faster, else None.

    Its instructions are those of one generation of GPUs, and its language is experimental: each release changes it.
    """
    if torch.cuda.get_device_capability(x_RD.device) != _STREAMING_GPU or _release() != _STREAMING_RELEASE:
        return None
    kernels = importlib.import_module("dtr.ops.gpu.mlp_gluon")
    return kernels if kernels.supports(x_RD, weight) else None


def _release() -> str:
    return ".".join(triton.__version__.split(".")[:2])


@torch.no_grad()
def gated_pair(x_RD: torch.Tensor, weight: torch.Tensor, eps: float, tiles: Tiles = DEFAULT) -> torch.Tensor:
    """(R, C) of x (R, D) over its root mean square, from weights (2 C, D) of gate and up projection on each other."""
    (R, D), inner = x_RD.shape, len(weight) // 2
    scale, out = x_RD.new_empty(R, dtype=torch.float32), x_RD.new_empty(R, inner)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x_RD):
        _inverse_rms[(triton.cdiv(R, _NORM_ROWS),)](x_RD, scale, eps, R, D=D, BR=_NORM_ROWS, BD=_INNER, num_warps=4)
        _gated_pair[(inner // tiles.columns, triton.cdiv(R, tiles.rows))](
            x_RD, scale, weight.contiguous(), out, R, D=D, C=inner, BR=tiles.rows, BC=tiles.columns, BD=_INNER,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out
