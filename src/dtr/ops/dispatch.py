"""The recurrences as mixers call them, and what else has a kernel: the backend is chosen once per process and device,
then used everywhere."""

from __future__ import annotations

import torch

from dtr.ops.backend import (
    CHANNEL_DELTA,
    CONVOLUTION,
    GATED_DELTA,
    GATED_LINEAR,
    QUADRATIC,
    Backend,
    backend_of,
    choose_backend,
    kernel,
)
from dtr.ops.quadratic_features import mix_of_heads, quadratic_features
from dtr.ops.recurrences import channel_delta_rule as _channel_delta_rule
from dtr.ops.recurrences import gated_delta_rule as _gated_delta_rule
from dtr.ops.recurrences import gated_linear_attention as _gated_linear_attention
from dtr.ops.rotary import rotate_to_unit_length
from dtr.ops.short_convolution import short_convolution as _short_convolution

_requested = "auto"
_chosen: dict[tuple[str, str, int | None, torch.dtype], str] = {}


def use_backend(
    requested: str, device_type: str, *, head_dim: int | None = None, dtype: torch.dtype | None = None
) -> Backend:
    """Ask for a backend for the rest of this process; returns what the gated delta rule will run with, and why.

    Args:
        requested: as for `choose_backend`.
        device_type: as `torch.device.type`.
        head_dim: of the model that will run, once it is known.
        dtype: likewise.

    Raises:
        DeviceError: `requested` is unknown or cannot run here.
    """
    global _requested
    choice = choose_backend(requested, device_type, head_dim=head_dim, dtype=dtype)
    _requested = requested
    _chosen.clear()
    return choice


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule (see `dtr.ops.gated_delta`) by the chosen backend: o [B, T, H, V] and the last state."""
    name = _name(GATED_DELTA, q_BTHK.device.type, q_BTHK.shape[-1], v_BTHV.dtype)
    return _gated_delta_rule(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, scale=scale, state=state_BHKV, backend=name)


def gated_linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated linear attention (see `dtr.ops.gated_linear`) by the chosen backend: o [B, T, H, V] and the last state."""
    name = _name(GATED_LINEAR, q_BTHK.device.type, q_BTHK.shape[-1], v_BTHV.dtype)
    return _gated_linear_attention(q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=scale, state=state_BHKV, backend=name)


def channel_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta rule with a decay per key channel (see `dtr.ops.channel_delta`) by the chosen backend: o [B, T, H, V]
    and the last state."""
    name = _name(CHANNEL_DELTA, q_BTHK.device.type, q_BTHK.shape[-1], v_BTHV.dtype)
    return _channel_delta_rule(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, state=state_BHKV, backend=name)


def rotated_quadratic_features(
    x_BTHK: torch.Tensor, weight_HKK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor, *, step_size: float
) -> torch.Tensor:
    """Quadratic features with the mix of `weight` times `step_size`, rotated by their angles and of unit length."""
    # A single token is decoding, where plain operations are what a compiler can fuse with all else.
    if x_BTHK.shape[1] > 1 and _name(QUADRATIC, x_BTHK.device.type, x_BTHK.shape[-1], x_BTHK.dtype) == "triton":
        return kernel("triton", QUADRATIC)(x_BTHK, weight_HKK, cos_BTK, sin_BTK, step_size=step_size)
    mix = mix_of_heads(x_BTHK, weight_HKK, step_size=step_size)
    return rotate_to_unit_length(quadratic_features(x_BTHK, mix), cos_BTK, sin_BTK)


def short_convolution(
    x_BTC: torch.Tensor, taps_CW: torch.Tensor, past: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dtr.ops.short_convolution` without bias, its output in the type of x."""
    num_past = taps_CW.shape[1] - 1
    fits = past is None and x_BTC.shape[1] >= num_past
    if fits and _name(CONVOLUTION, x_BTC.device.type, None, x_BTC.dtype) == "triton":
        return kernel("triton", CONVOLUTION)(x_BTC, taps_CW), x_BTC[:, x_BTC.shape[1] - num_past :]
    out, inputs = _short_convolution(x_BTC, taps_CW, None, past)
    return out.to(x_BTC.dtype), inputs


@torch.compiler.assume_constant_result
def _name(op: str, device_type: str, head_dim: int | None, dtype: torch.dtype) -> str:
    key = (op, device_type, head_dim, dtype)
    if key not in _chosen:
        _chosen[key] = backend_of(op, _requested, device_type, head_dim=head_dim, dtype=dtype).name
    return _chosen[key]
