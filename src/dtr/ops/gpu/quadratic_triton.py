"""Quadratic features, rotation and unit length in one pass over memory, forward and backward, for one CUDA GPU.

    out = R u / |R u|,    u = n x (1 + n m),    m = a A x,    n = 1 / sqrt(mean(x^2) + eps)

as `rotate_to_unit_length(quadratic_features(x, m), cos, sin)` with a step size a. The backward pass recomputes all of
it from x. Sums over tokens are made by a fixed number of programs and added in a fixed order: results are equal from
run to run. Arithmetic is float32; operands of products are rounded to the type of x.

Shapes: B batch, T tokens, H heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from dtr.errors import DeviceError
from dtr.ops.backend import QUADRATIC_HEAD_DIMS
from dtr.ops.gpu.device import runs_on
from dtr.ops.gpu.quadratic_kernels import features_backward, features_forward

BLOCK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the work is spread; results differ by rounding only."""

    forward_programs: int = 1056
    backward_programs: int = 528
    """At most, over all heads (an H100 has 132 multiprocessors). Each leaves K x K float32 to be added."""
    forward_warps: int = 4
    backward_warps: int = 4
    backward_stages: int = 2
    """Loads run this many blocks ahead less one; in float32 none, as shared memory would run out."""


cut = Cut()


def supports(x_BTHK: torch.Tensor) -> bool:
    """Whether the kernels take `x`: CUDA (or Triton's interpreter), and a head dim and type of
    `QUADRATIC_HEAD_DIMS`."""
    return runs_on(x_BTHK) and x_BTHK.shape[-1] in QUADRATIC_HEAD_DIMS.get(x_BTHK.dtype, ())


def rotated_features(
    x_BTHK: torch.Tensor, weight_HKK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor, *, step_size: float
) -> torch.Tensor:
    """(B, T, H, K) in x's type; differentiable in x and the weight.

    Rows of x may be strided. cos and sin are (B or 1, T, K) with equal halves. Runs without a graph break under
    torch.compile and can be captured in a CUDA graph after one warm-up call. Raises DeviceError where `supports` is
    false.
    """
    if not supports(x_BTHK):
        sizes = "; ".join(f"{str(dtype).removeprefix('torch.')} {dims}" for dtype, dims in QUADRATIC_HEAD_DIMS.items())
        raise DeviceError(
            "quadratic_triton.rotated_features",
            got=f"K={x_BTHK.shape[-1]}, {x_BTHK.dtype} on {x_BTHK.device}",
            expected=f"heads of {sizes} on a CUDA device",
            hint="Use the plain PyTorch form in dtr.ops.quadratic_features instead.",
        )
    return _forward(x_BTHK, weight_HKK, cos_BTK, sin_BTK, float(step_size))


def _readable(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with contiguous last dims, and cos and sin with the same strides; copied only where they are not so."""
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return x if x.stride(-1) == 1 else x.contiguous(), cos, sin


def _numbers(x: torch.Tensor, cos: torch.Tensor, step_size: float) -> tuple[float, ...]:
    """What both kernels take after their pointers: sizes, strides, and the step size."""
    B, T, _, _ = x.shape
    angle_batch = 0 if len(cos) == 1 else cos.stride(0)
    return B * triton.cdiv(T, BLOCK_TOKENS), T, *x.stride()[:3], angle_batch, cos.stride(1), step_size


def _num_programs(x: torch.Tensor, most: int) -> int:
    """Programs of each head."""
    B, T, H, _ = x.shape
    return max(1, min(B * triton.cdiv(T, BLOCK_TOKENS), most // H))


@torch.library.custom_op(
    "dtr_triton::rotated_features_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, float step_size) -> Tensor",
)
def _forward(x, weight, cos, sin, step_size):  # type: ignore[no-untyped-def]
    x, cos, sin = _readable(x, cos, sin)
    out = _empty_forward(x, weight, cos, sin, step_size)
    H, K = x.shape[2:]
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        features_forward[(H, _num_programs(x, cut.forward_programs))](
            x, weight.contiguous(), cos, sin, out, *_numbers(x, cos, step_size), H=H, K=K, BT=BLOCK_TOKENS,
            num_warps=cut.forward_warps, num_stages=1,
        )  # fmt: skip
    return out


@_forward.register_fake
def _empty_forward(x, weight, cos, sin, step_size):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "dtr_triton::rotated_features_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, Tensor d_out, float step_size) -> (Tensor, Tensor)",
)
def _backward(x, weight, cos, sin, d_out, step_size):  # type: ignore[no-untyped-def]
    """Gradients of x and of the weight."""
    x, cos, sin = _readable(x, cos, sin)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    H, K = x.shape[2:]
    programs = _num_programs(x, cut.backward_programs)
    parts = x.new_empty((programs, H, K, K), dtype=torch.float32)
    with torch.cuda.device_of(x):
        features_backward[(H, programs)](
            x, weight.contiguous(), cos, sin, d_out.contiguous(), dx, parts, *_numbers(x, cos, step_size), H=H, K=K,
            BT=BLOCK_TOKENS, num_warps=cut.backward_warps,
            num_stages=cut.backward_stages if x.dtype == torch.bfloat16 else 1,
        )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


@_backward.register_fake
def _empty_backward(x, weight, cos, sin, d_out, step_size):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.step_size = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, d_out, ctx.step_size), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
