"""The recurrences as mixers call them, and what else has a kernel, each by the backend that its caller asks for.

Each recurrence takes what its plain form takes and gives what that gives: o [B, T, H, V] and the last state
[B, H, K, V].
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dtr.ops.backend import (
    CHANNEL_DELTA,
    CONVOLUTION,
    GATED_DELTA,
    GATED_DELTA_STEP,
    GATED_LINEAR,
    QUADRATIC,
    backend_of,
    load,
)
from dtr.ops.channel_delta import chunked as channel_delta_chunked
from dtr.ops.gated_delta import chunked as gated_delta_chunked
from dtr.ops.gated_delta import step as gated_delta_step
from dtr.ops.gated_linear import chunked as gated_linear_chunked
from dtr.ops.gated_linear import step as gated_linear_step
from dtr.ops.quadratic_features import mix_of_heads, quadratic_features
from dtr.ops.rotary import rotate_to_unit_length
from dtr.ops.short_convolution import RealTokens, with_past
from dtr.ops.short_convolution import short_convolution as _short_convolution


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_delta.chunked` by a backend as `backend_of` takes it; a single token with a state takes `step`."""
    backend = chosen_backend(GATED_DELTA, backend, v_BTHV.device.type, q_BTHK.shape[-1], v_BTHV.dtype)
    if q_BTHK.shape[1] == 1 and state_BHKV is not None:
        q, k, v, g, beta = (x[:, 0] for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
        # The kernel has no gradients, and plain operations are what a compiler can fuse.
        plain = backend != "triton" or torch.is_grad_enabled() or torch.compiler.is_compiling()
        step = gated_delta_step if plain else load(GATED_DELTA_STEP, backend)
        o, last = step(q, k, v, g, beta, state_BHKV, scale=scale)
        return o.unsqueeze(1), last
    # Our kernel for CPUs has square states only.
    if backend == "torch" or (backend == "amx" and q_BTHK.shape[-1] != v_BTHV.shape[-1]):
        return gated_delta_chunked(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, scale=scale, state_BHKV=state_BHKV)
    # Kernels want one dtype; queries and keys may have been normalised in a wider one than the values'.
    q, k = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    if backend in ("triton", "amx"):
        return load(GATED_DELTA, backend)(q, k, v_BTHV, g_BTH, beta_BTH, scale=scale, state_BHKV=state_BHKV)
    return load(GATED_DELTA, backend)(q, k, v_BTHV, g_BTH.float(), beta_BTH, **_fla_options(scale, state_BHKV))


def gated_linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_linear.chunked` by a backend as `backend_of` takes it; a single token with a state takes `step`."""
    backend = chosen_backend(GATED_LINEAR, backend, v_BTHV.device.type, q_BTHK.shape[-1], v_BTHV.dtype)
    if q_BTHK.shape[1] == 1 and state_BHKV is not None:
        q, k, v, g = (x[:, 0] for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK))
        o, last = gated_linear_step(q, k, v, g, state_BHKV, scale=scale)
        return o.unsqueeze(1), last
    if backend == "torch":
        return gated_linear_chunked(q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=scale, state_BHKV=state_BHKV)
    q, k = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    if backend == "triton":
        return load(GATED_LINEAR, backend)(q, k, v_BTHV, g_BTHK, None, scale=scale, state_BHKV=state_BHKV)
    return load(GATED_LINEAR, backend)(q, k, v_BTHV, g_BTHK.float(), **_fla_options(scale, state_BHKV))


def channel_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    state_BHKV: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`channel_delta.chunked` by a backend as `backend_of` takes it; a single token with a state takes `step`."""
    backend = chosen_backend(CHANNEL_DELTA, backend, v_BTHV.device.type, q_BTHK.shape[-1], v_BTHV.dtype)
    if backend == "torch" or (q_BTHK.shape[1] == 1 and state_BHKV is not None):
        return channel_delta_chunked(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, state_BHKV=state_BHKV)
    q, k = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    return load(CHANNEL_DELTA, backend)(q, k, v_BTHV, g_BTHK, beta_BTH, scale=1.0, state_BHKV=state_BHKV)


def rotated_quadratic_features(
    x_BTHK: torch.Tensor,
    weight_HKK: torch.Tensor,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    step_size: float,
    backend: str = "auto",
) -> torch.Tensor:
    """Quadratic features with the mix of `weight` times `step_size`, rotated by their angles and of unit length."""
    # A single token is decoding, where plain operations are what a compiler can fuse with all else.
    by_kernel = x_BTHK.shape[1] > 1 and (
        chosen_backend(QUADRATIC, backend, x_BTHK.device.type, x_BTHK.shape[-1], x_BTHK.dtype) == "triton"
    )
    if by_kernel:
        return load(QUADRATIC, "triton")(x_BTHK, weight_HKK, cos_BTK, sin_BTK, step_size=step_size)
    mix = mix_of_heads(x_BTHK, weight_HKK, step_size=step_size)
    return rotate_to_unit_length(quadratic_features(x_BTHK, mix), cos_BTK, sin_BTK)


def short_convolution(
    x_BTC: torch.Tensor,
    taps_CW: torch.Tensor,
    past: torch.Tensor | None,
    real: RealTokens | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dtr.ops.short_convolution` without bias, its output in the type of x."""
    num_past = taps_CW.shape[1] - 1
    fits = past is None and x_BTC.shape[1] >= num_past
    if fits and chosen_backend(CONVOLUTION, backend, x_BTC.device.type, None, x_BTC.dtype) == "triton":
        run = load(CONVOLUTION, "triton")
        if real is None:
            return run(x_BTC, taps_CW), x_BTC[:, x_BTC.shape[1] - num_past :]
        x_BTC = real.align(x_BTC)
        return real.put_back(run(x_BTC, taps_CW)), real.last(with_past(x_BTC, None, num_past), num_past)
    out, inputs = _short_convolution(x_BTC, taps_CW, None, past, real)
    return out.to(x_BTC.dtype), inputs


@torch.compiler.assume_constant_result
def chosen_backend(op: str, requested: str, device_type: str, head_dim: int | None, dtype: torch.dtype) -> str:
    """The name that `backend_of` gives, looked up once for the same arguments; a constant in compiled code."""
    return _backend_name(op, requested, device_type, head_dim, dtype)


@functools.cache
def _backend_name(op: str, requested: str, device_type: str, head_dim: int | None, dtype: torch.dtype) -> str:
    return backend_of(op, requested, device_type, head_dim=head_dim, dtype=dtype).name


def _fla_options(scale: float | None, state: torch.Tensor | None) -> dict[str, Any]:
    return {"scale": scale, "initial_state": None if state is None else state.float(), "output_final_state": True}
