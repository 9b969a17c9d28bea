"""What a prompt meets around attention, in Triton: residual sum with norm, and the first half of a gated MLP.

Gate and up projection of a long prompt are several times as large as its hidden states; here they never reach memory.

Shapes: R rows, D hidden dim, C inner dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MIN_ROWS = 1024
"""Fewer rows do not fill a GPU with tiles of this size."""
_INNER = 64


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the product is cut for a machine."""

    rows: int = 128
    columns: int = 128
    """Of the gate, and as many of the up projection."""
    warps: int = 8
    stages: int = 3


DEFAULT = Tiles()


@triton.jit
def _add_and_norm(x_ptr, update_ptr, weight_ptr, sum_ptr, normed_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (R): one row; the norm is of the rounded sum, as it is when they are two operations."""
    at, c = tl.program_id(0).to(tl.int64) * D, tl.arange(0, BLOCK)
    seen = c < D
    x = tl.load(x_ptr + at + c, mask=seen, other=0.0).to(tl.float32)
    x = (x + tl.load(update_ptr + at + c, mask=seen, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at + c, x, mask=seen)
    x = x.to(tl.float32)
    x *= tl.load(weight_ptr + c, mask=seen, other=0.0).to(tl.float32) / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(normed_ptr + at + c, x.to(normed_ptr.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["R"])
def _gated_pair(
    x_ptr, weight_ptr, out_ptr, R, D: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Grid (C / BC, R / BR): one tile of the output; weight rows are the gate's, then the up projection's."""
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
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + r.to(tl.int64)[:, None] * C + c[None, :], out.to(out_ptr.dtype.element_ty), mask=seen)


def supports(x_RD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles = DEFAULT) -> bool:
    """Whether the product is large and cut evenly, in bfloat16 and without a bias."""
    num_rows, dim = x_RD.shape
    fits = dim % _INNER == 0 and weight.shape[0] % (2 * tiles.columns) == 0 and x_RD.is_contiguous()
    return bias is None and x_RD.dtype == torch.bfloat16 and num_rows >= MIN_ROWS and fits


@torch.no_grad()
def gated_pair(x_RD: torch.Tensor, weight: torch.Tensor, tiles: Tiles = DEFAULT) -> torch.Tensor:
    """(R, C) from x (R, D) and the weights (2 C, D) of gate and up projection, one below the other."""
    (R, D), inner = x_RD.shape, len(weight) // 2
    out = x_RD.new_empty(R, inner)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x_RD):
        _gated_pair[(inner // tiles.columns, triton.cdiv(R, tiles.rows))](
            x_RD, weight.contiguous(), out, R, D=D, C=inner, BR=tiles.rows, BC=tiles.columns, BD=min(_INNER, D),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def add_and_norm(
    hidden: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x, update, D = hidden.contiguous(), update.contiguous(), hidden.shape[-1]
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(D)
    with torch.cuda.device_of(x):
        _add_and_norm[(x.numel() // D,)](
            x, update, weight, total, normed, eps, D=D, BLOCK=block, num_warps=max(1, min(8, block // 512))
        )
    return total, normed
