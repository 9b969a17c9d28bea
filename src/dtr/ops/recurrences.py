"""The recurrences by the name of a backend; `dispatch.py` chooses it.

Each takes what its plain form takes and gives what that gives: o [B, T, H, V] and the last state [B, H, K, V].
"""

from __future__ import annotations

from typing import Any

import torch

from dtr.ops.backend import CHANNEL_DELTA, GATED_DELTA, GATED_DELTA_STEP, GATED_LINEAR, kernel
from dtr.ops.channel_delta import chunked as channel_delta_chunked
from dtr.ops.gated_delta import chunked as gated_delta_chunked
from dtr.ops.gated_delta import step as gated_delta_step
from dtr.ops.gated_linear import chunked as gated_linear_chunked
from dtr.ops.gated_linear import step as gated_linear_step


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_delta.chunked` by `backend`, a name from `choose_backend`; a single token with a state takes `step`."""
    if q_BTHK.shape[1] == 1 and state is not None:
        q, k, v, g, beta = (x[:, 0] for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
        # The kernel has no gradients, and plain operations are what a compiler can fuse.
        plain = backend != "triton" or torch.is_grad_enabled() or torch.compiler.is_compiling()
        step = gated_delta_step if plain else kernel(backend, GATED_DELTA_STEP)
        o, state = step(q, k, v, g, beta, state, scale=scale)
        return o.unsqueeze(1), state
    # Our kernel for CPUs has square states only.
    if backend == "torch" or (backend == "amx" and q_BTHK.shape[-1] != v_BTHV.shape[-1]):
        return gated_delta_chunked(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, scale=scale, state_BHKV=state)
    # Kernels want one dtype; queries and keys may have been normalised in a wider one than the values'.
    q, k = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    if backend in ("triton", "amx"):
        return kernel(backend, GATED_DELTA)(q, k, v_BTHV, g_BTH, beta_BTH, scale=scale, state_BHKV=state)
    return kernel(backend, GATED_DELTA)(q, k, v_BTHV, g_BTH.float(), beta_BTH, **_fla_options(scale, state))


def gated_linear_attention(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_linear.chunked` by `backend`, a name from `choose_backend`; a single token with a state takes `step`."""
    if q_BTHK.shape[1] == 1 and state is not None:
        q, k, v, g = (x[:, 0] for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK))
        o, state = gated_linear_step(q, k, v, g, state, scale=scale)
        return o.unsqueeze(1), state
    if backend == "torch":
        return gated_linear_chunked(q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=scale, state_BHKV=state)
    q, k = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    if backend == "triton":
        return kernel(backend, GATED_LINEAR)(q, k, v_BTHV, g_BTHK, None, scale=scale, state_BHKV=state)
    return kernel(backend, GATED_LINEAR)(q, k, v_BTHV, g_BTHK.float(), **_fla_options(scale, state))


def channel_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`channel_delta.chunked` by `backend`, a name from `choose_backend`; a single token with a state takes `step`."""
    if backend == "torch" or (q_BTHK.shape[1] == 1 and state is not None):
        return channel_delta_chunked(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, state_BHKV=state)
    q, k = q_BTHK.to(v_BTHV.dtype), k_BTHK.to(v_BTHV.dtype)
    return kernel(backend, CHANNEL_DELTA)(q, k, v_BTHV, g_BTHK, beta_BTH, scale=1.0, state_BHKV=state)


def _fla_options(scale: float | None, state: torch.Tensor | None) -> dict[str, Any]:
    return {"scale": scale, "initial_state": None if state is None else state.float(), "output_final_state": True}
