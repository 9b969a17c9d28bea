"""The causal depthwise convolution over a few tokens, forward and backward, in Triton for one CUDA GPU.

    out_t = sum_j taps_(W-1-j) x_(t-j),    dx_t = sum_j taps_(W-1-j) g_(t+j),    dtaps_(W-1-j) = sum_t g_(t+j) x_t

with g the gradient of the output.

Each pass reads its tensors from memory once: shifted copies come out of the cache, and both gradients use the same
ones. Sums over tokens are made by a fixed number of programs and added in a fixed order.

Shapes: B batch, T tokens, C channels, W tokens that the convolution sees, BW the power of two from W up; tiles are
(shifts, BT tokens, BC channels), with all shifts of an element in one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dtr.errors import DeviceError
from dtr.ops.backend import TRITON_DTYPES
from dtr.ops.gpu.device import runs_on

BLOCK_CHANNELS = 64


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the work is spread; results differ by rounding only."""

    tokens: int = 32
    """Of a tile of the forward pass."""
    backward_tokens: int = 16
    backward_programs: int = 1056
    """At most, over all channels (an H100 has 132 multiprocessors). Each leaves W x 64 float32 to be added."""


cut = Cut()


def supports(x_BTC: torch.Tensor) -> bool:
    """Whether the kernels take `x`: CUDA (or Triton's interpreter), bfloat16 or float32."""
    return runs_on(x_BTC) and x_BTC.dtype in TRITON_DTYPES


def convolution(x_BTC: torch.Tensor, taps_CW: torch.Tensor) -> torch.Tensor:
    """(B, T, C) in x's type, from the start of sequences; differentiable in both.

    Rows of x may be strided. The last tap is on the current token. Runs without a graph break under torch.compile and
    can be captured in a CUDA graph after one warm-up call. Raises DeviceError where `supports` is false.
    """
    if not supports(x_BTC):
        raise DeviceError(
            "convolution_triton.convolution",
            got=f"{x_BTC.dtype} on {x_BTC.device}",
            expected="bfloat16 or float32 on a CUDA device",
            hint="Use the plain PyTorch form in dtr.ops.short_convolution instead.",
        )
    return _forward(x_BTC, taps_CW)


@triton.jit
def _load_taps(ptr, channel, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """Taps (BW, 1, BC) in float32 by how many tokens back they look, zero from W tokens on."""
    back = tl.arange(0, BW)[:, None, None]
    return tl.load(ptr + channel * W + W - 1 - back, mask=(back < W) & (channel < C), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "T"])
def convolution_forward(
    x_ptr, taps_ptr, out_ptr, N, T, x_batch, x_token, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (C / BC, N / BT) for N = B T rows: out (B, T, C), contiguous."""
    back = tl.arange(0, BW)[:, None, None]
    row = (tl.program_id(1) * BT + tl.arange(0, BT))[None, :, None]
    channel = (tl.program_id(0) * BC + tl.arange(0, BC))[None, None, :]
    taps = _load_taps(taps_ptr, channel, C, W, BW)
    token = row % T - back
    at_x = x_ptr + (row // T).to(tl.int64) * x_batch + token.to(tl.int64) * x_token + channel
    seen = (row < N) & (token >= 0) & (back < W) & (channel < C)
    out = tl.sum(tl.load(at_x, mask=seen, other=0.0).to(tl.float32) * taps, axis=0, keep_dims=True)
    tl.store(out_ptr + row.to(tl.int64) * C + channel, out.to(out_ptr.dtype.element_ty), mask=(row < N) & (channel < C))


@triton.jit(do_not_specialize=["N", "T"])
def convolution_backward(
    x_ptr, taps_ptr, d_out_ptr, dx_ptr, dtaps_ptr, N, T, x_batch, x_token, d_out_batch, d_out_token, C: tl.constexpr,
    W: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (C / BC, P): dx (B, T, C), and what each program adds to the gradient of the taps, (P, C, W)."""
    ahead = tl.arange(0, BW)[:, None, None]
    channel = (tl.program_id(0) * BC + tl.arange(0, BC))[None, None, :]
    taps = _load_taps(taps_ptr, channel, C, W, BW)
    dtaps = tl.zeros([BW, BT, BC], dtype=tl.float32)
    for start in range(tl.program_id(1) * BT, N, tl.num_programs(1) * BT):
        row = (start + tl.arange(0, BT))[None, :, None]
        here = (row < N) & (channel < C)
        token = row % T
        batch = (row // T).to(tl.int64)
        at_x = x_ptr + batch * x_batch + token.to(tl.int64) * x_token + channel
        at_d_out = d_out_ptr + batch * d_out_batch + (token + ahead).to(tl.int64) * d_out_token + channel
        seen = here & (token + ahead < T) & (ahead < W)
        d_out = tl.load(at_d_out, mask=seen, other=0.0).to(tl.float32)
        dtaps += d_out * tl.load(at_x, mask=here, other=0.0).to(tl.float32)
        dx = tl.sum(d_out * taps, axis=0, keep_dims=True)
        tl.store(dx_ptr + row.to(tl.int64) * C + channel, dx.to(dx_ptr.dtype.element_ty), mask=here)
    at_dtaps = dtaps_ptr + (tl.program_id(1) * C + channel) * W + W - 1 - ahead
    tl.store(at_dtaps, tl.sum(dtaps, axis=1, keep_dims=True), mask=(ahead < W) & (channel < C))


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its rows are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(taps: torch.Tensor) -> dict[str, int]:
    (C, W), BC = taps.shape, BLOCK_CHANNELS
    return {"C": C, "W": W, "BW": triton.next_power_of_2(W), "BC": BC}


@torch.library.custom_op("dtr_triton::convolution_forward", mutates_args=(), schema="(Tensor x, Tensor taps) -> Tensor")
def _forward(x, taps):  # type: ignore[no-untyped-def]
    x, out = _with_rows(x), _empty_forward(x, taps)
    B, T, C = x.shape
    grid = (triton.cdiv(C, BLOCK_CHANNELS), triton.cdiv(B * T, cut.tokens))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        convolution_forward[grid](
            x, taps.contiguous(), out, B * T, T, *x.stride()[:2], BT=cut.tokens, num_warps=4, **_sizes(taps)
        )
    return out


@_forward.register_fake
def _empty_forward(x, taps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "dtr_triton::convolution_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor taps, Tensor d_out) -> (Tensor, Tensor)",
)
def _backward(x, taps, d_out):  # type: ignore[no-untyped-def]
    """Gradients of x and of the taps."""
    x, d_out = _with_rows(x), _with_rows(d_out)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    B, T, C = x.shape
    num_columns = triton.cdiv(C, BLOCK_CHANNELS)
    programs = max(1, min(triton.cdiv(B * T, cut.backward_tokens), cut.backward_programs // num_columns))
    parts = x.new_empty((programs, *taps.shape), dtype=torch.float32)
    with torch.cuda.device_of(x):
        convolution_backward[(num_columns, programs)](
            x, taps.contiguous(), d_out, dx, parts, B * T, T, *x.stride()[:2], *d_out.stride()[:2],
            BT=cut.backward_tokens, num_warps=4, **_sizes(taps),
        )  # fmt: skip
    return dx, parts.sum(0).to(taps.dtype)


@_backward.register_fake
def _empty_backward(x, taps, d_out):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, taps))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(*ctx.saved_tensors, d_out)


_forward.register_autograd(_autograd, setup_context=_setup_context)
