"""The chunked gated delta rule on a CPU with AMX, forward and backward, by our kernel in C++ (gated_delta_amx.cpp).

It computes what `gated_delta.chunked` does there, and keeps sums in float32 where that rounds some to bfloat16. What
it saves is trips through memory: the plain form makes some sixty of them, this one reads its inputs and writes its
output.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N chunks of C = 64 tokens.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from dtr.ops.backend import AMX_HEAD_DIMS
from dtr.ops.cpu.native import load_library

CHUNK_TOKENS = 64
_TENSORS = (
    "q", "k", "v", "g", "beta", "state", "o", "final", "states", "x", "inverses",
    "grad_o", "grad_final", "dq", "dk", "dv", "dg", "dbeta", "dstate",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of the C++ file, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in "BTH"),
    )


@functools.cache
def refusal() -> str | None:
    """Why the kernel cannot run on this machine; None where it can. Builds it at the first call, in a few seconds."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    if not {"amx_bf16", "avx512_bf16"} <= set(flags):
        return "our CPU kernel needs a processor with AMX"
    try:
        permitted = _library().gated_delta_amx_permitted()
    except OSError as error:
        return f"our CPU kernel is not built: {error}"
    return None if permitted else "the system does not let our CPU kernel use AMX"


@functools.cache
def _library() -> ctypes.CDLL:
    return load_library("gated_delta_amx", ("amx_matrices.h",))


def chunked(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in bfloat16 and float32 final state; differentiable once in every tensor argument.

    q, k and v are bfloat16, K = V one of `AMX_HEAD_DIMS`, and `refusal()` is None. Without a break under torch.compile.
    """
    assert q_BTHK.dtype == k_BTHK.dtype == v_BTHV.dtype == torch.bfloat16, "bfloat16 is what AMX multiplies"
    assert q_BTHK.shape[-1] == v_BTHV.shape[-1] and q_BTHK.shape[-1] in AMX_HEAD_DIMS, q_BTHK.shape  # noqa: PT018
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale)
    state = None if state_BHKV is None else state_BHKV.float()
    o, final, *_ = _forward(q_BTHK, k_BTHK, v_BTHV, g_BTH.float(), beta_BTH.float(), state, scale)
    return o, final


def _run(backward: bool, scale: float, tensors: dict[str, torch.Tensor | None]) -> None:
    """`tensors` by their names in C++, all contiguous."""
    q, v = tensors["q"], tensors["v"]
    assert q is not None
    assert v is not None
    assert all(x is None or x.is_contiguous() for x in tensors.values())
    pointers = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
    B, T, H, K = q.shape
    call = _Call(**pointers, scale=scale, B=B, T=T, H=H)
    known = _library().gated_delta_amx_run(
        ctypes.byref(call), K, v.shape[-1], int(backward), min(torch.get_num_threads(), max(1, B * H))
    )
    assert known, f"no kernel for K = {K}, V = {v.shape[-1]}"


@torch.library.custom_op(
    "dtr_amx::gated_delta_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(q, k, v, g, beta, state, scale):  # type: ignore[no-untyped-def]
    """(o, final state, and for the backward pass: chunk states, what was written, inverses)."""
    outputs = _empty_forward(q, k, v, g, beta, state, scale)
    given = dict(zip(_TENSORS, (x if x is None else x.contiguous() for x in (q, k, v, g, beta, state))))
    _run(False, scale, given | dict(zip(_TENSORS[6:11], outputs)))
    return outputs


@_forward.register_fake
def _empty_forward(q, k, v, g, beta, state, scale):  # type: ignore[no-untyped-def]
    (B, T, H, K), V = q.shape, v.shape[-1]
    N = (T + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    return (
        v.new_empty((B, T, H, V)),
        q.new_empty((B, H, K, V), dtype=torch.float32),
        q.new_empty((B, H, N, K, V)),
        q.new_empty((B, H, N, CHUNK_TOKENS, V)),
        q.new_empty((B, H, N, CHUNK_TOKENS, CHUNK_TOKENS)),
    )


@torch.library.custom_op(
    "dtr_amx::gated_delta_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor states, Tensor x, Tensor inverses,"
    " Tensor grad_o, Tensor? grad_final, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(q, k, v, g, beta, states, x, inverses, grad_o, grad_final, scale):  # type: ignore[no-untyped-def]
    """Gradients of q, k, v, g, beta and the initial state."""
    outputs = _empty_backward(q, k, v, g, beta, states, x, inverses, grad_o, grad_final, scale)
    names = (*_TENSORS[:5], *_TENSORS[8:13])
    inputs = (q, k, v, g, beta, states, x, inverses, grad_o, grad_final)
    given = dict(zip(names, (t if t is None else t.contiguous() for t in inputs)))
    _run(True, scale, given | dict(zip(_TENSORS[13:], outputs)))
    return outputs


@_backward.register_fake
def _empty_backward(q, k, v, g, beta, states, x, inverses, grad_o, grad_final, scale):  # type: ignore[no-untyped-def]
    (B, _, H, K), V = q.shape, v.shape[-1]
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, g, beta))
    return (*like, q.new_empty((B, H, K, V), dtype=torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, g, beta, state, scale = inputs
    ctx.save_for_backward(q, k, v, g, beta, *output[2:])
    ctx.scale, ctx.has_state = scale, state is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _autograd(ctx: Any, grad_o: torch.Tensor | None, grad_final: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_o is None:
        grad_o = torch.zeros_like(ctx.saved_tensors[2])
    *grads, dstate = _backward(*ctx.saved_tensors, grad_o, grad_final, ctx.scale)
    return (*grads, dstate if ctx.has_state else None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
