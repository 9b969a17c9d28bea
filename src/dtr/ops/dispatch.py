"""The recurrences as mixers call them: the backend is chosen once per process and device, then used everywhere."""

from __future__ import annotations

import torch

from dtr.ops.backend import GATED_DELTA, GATED_LINEAR, Backend, choose_backend
from dtr.ops.backend import gated_delta_rule as _gated_delta_rule
from dtr.ops.backend import gated_linear_attention as _gated_linear_attention

_requested = "auto"
_chosen: dict[tuple[str, str, int, torch.dtype], str] = {}


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


@torch.compiler.assume_constant_result
def _name(op: str, device_type: str, head_dim: int, dtype: torch.dtype) -> str:
    key = (op, device_type, head_dim, dtype)
    if key not in _chosen:
        # A kernel that was asked for may not exist for every recurrence; auto then takes what does.
        requested = "auto" if _requested in ("triton", "amx") and op == GATED_LINEAR else _requested
        _chosen[key] = choose_backend(requested, device_type, op=op, head_dim=head_dim, dtype=dtype).name
    return _chosen[key]
