"""The chunked gated delta rule in Triton, forward and backward, for one CUDA GPU.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - k_t^T exp(g_t) S_{t-1})^T,    o_t = scale * q_t^T S_t

Gated DeltaNet, arXiv 2412.06464; chunked form after its section 3.3 and arXiv 2406.06484. With S the state at a
chunk's start, cum the running sum of g, and A_ij = beta_i exp(cum_i - cum_j) k_i.k_j for j < i, the chunk writes
u = (I + A)^-1 r, r = beta (v - exp(cum) k S). Changed from the papers: the WY factors, whose difference cancels, are
never formed, and the inverse needs no gradient of its own, as with dr = (I + A)^-T du that of A is -dr u^T.

In bfloat16 S, u, dr and the inverse are rounded before they are multiplied, sums are float32. Where all keys of a chunk
are nearly equal, a state is an alternating sum of up to 64 rounded u, which costs up to a factor of 8 in precision.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N chunks of C = 64 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from dtr.errors import DeviceError
from dtr.ops.backend import TRITON_DTYPES, TRITON_HEAD_DIMS
from dtr.ops.gpu.device import runs_on
from dtr.ops.gpu.gated_delta_gradients import chunk_gradients, state_scan_backward
from dtr.ops.gpu.gated_delta_kernels import chunk_inverse, chunk_output, state_scan

CHUNK_TOKENS = 64


def supports(q_BTHK: torch.Tensor, v_BTHV: torch.Tensor) -> bool:
    """Whether the kernels can run: CUDA (or Triton's interpreter), bf16 or fp32, K and V one of 16, 32, 64, 128."""
    same = q_BTHK.dtype == v_BTHV.dtype and q_BTHK.device == v_BTHV.device
    return (
        runs_on(q_BTHK)
        and same
        and q_BTHK.dtype in TRITON_DTYPES
        and {q_BTHK.shape[-1], v_BTHV.shape[-1]} <= set(TRITON_HEAD_DIMS)
    )


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
    """Output in v's dtype and float32 final state; differentiable in every tensor argument.

    g is the log of the decay, at most 0; beta lies in [0, 1] and k has about unit length; scale defaults to K ** -0.5.
    Runs without a graph break under torch.compile and can be captured in a CUDA graph after one warm-up call. What it
    keeps for the backward pass is per chunk and head one K x V state and one C x C inverse, and the (B, T, H, V)
    updates, all in q's dtype. Raises DeviceError where `supports` is false.
    """
    check_inputs(q_BTHK, k_BTHK, v_BTHV)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale)
    o_BTHV, final_BHKV, *_ = _forward(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV, scale)
    return o_BTHV, final_BHKV


def check_inputs(
    q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHV: torch.Tensor, caller: str = "gated_delta_triton.chunked"
) -> None:
    """Raises DeviceError, in the name of `caller`, where `supports` is false or the keys have a type of their own."""
    if not supports(q_BTHK, v_BTHV) or k_BTHK.dtype != q_BTHK.dtype:
        dims = f"K={q_BTHK.shape[-1]}, V={v_BTHV.shape[-1]}"
        raise DeviceError(
            caller,
            got=f"{dims}, {q_BTHK.dtype}/{k_BTHK.dtype}/{v_BTHV.dtype} on {q_BTHK.device}",
            expected=f"K and V in {TRITON_HEAD_DIMS}, q, k and v all bfloat16 or all float32, on a CUDA device",
            hint="Use the plain PyTorch form in dtr.ops instead.",
        )


def scan_block(num_sequences: int, value_dim: int) -> int:
    """Value columns per program of a scan: the fewer sequences there are to fill the GPU, the finer the split."""
    widest = 64 if num_sequences >= 256 else 32 if num_sequences >= 48 else 16
    return min(value_dim, widest)


def inverse_warps(q: torch.Tensor) -> int:
    """Warps for the inverse of a chunk: one has no barriers to wait at, but in float32 too few registers."""
    return 1 if q.dtype == torch.bfloat16 else 2


def num_stages(q: torch.Tensor) -> int:
    """Loads of a scan run one chunk ahead, except in float32, where shared memory would run out at K = V = 128."""
    return 2 if q.dtype == torch.bfloat16 else 1


@torch.library.custom_op(
    "dtr_triton::gated_delta_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(q, k, v, g, beta, state, scale):  # type: ignore[no-untyped-def]
    """(o, final state, and for the backward pass: updates u, chunk states, inverses, cum)."""
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    state = None if state is None else state.contiguous()
    o, final, updates, states, inverses, cum = _empty_forward(q, k, v, g, beta, state, scale)
    B, T, H, K = q.shape
    V, N, BH = v.shape[-1], triton.cdiv(T, CHUNK_TOKENS), B * H
    dims = {"K": K, "V": V, "C": CHUNK_TOKENS}
    BV, BO = scan_block(BH, V), min(V, 64)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        chunk_inverse[(BH, N)](k, g, beta, cum, inverses, T, H, K=K, num_warps=inverse_warps(k))
        state_scan[(BH, V // BV, 1)](
            k, v, beta, cum, inverses, state, updates, states, final, None, T, N, H, W=H, BV=BV,
            HAS_INITIAL=state is not None, AFFINE=False, HAS_BOUNDS=False, num_warps=4, num_stages=num_stages(q),
            **dims,
        )  # fmt: skip
        chunk_output[(BH, N, V // BO)](q, k, updates, cum, states, o, scale, T, H, BV=BO, num_warps=4, **dims)
    return o, final, updates, states, inverses, cum


@_forward.register_fake
def _empty_forward(q, k, v, g, beta, state, scale):  # type: ignore[no-untyped-def]
    (B, T, H, K), V = q.shape, v.shape[-1]
    BH, N = B * H, (T + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    return (
        v.new_empty((B, T, H, V)),
        q.new_empty((B, H, K, V), dtype=torch.float32),
        v.new_empty((B, T, H, V)),
        q.new_empty((BH, N, K, V)),
        q.new_empty((BH, N, CHUNK_TOKENS, CHUNK_TOKENS)),
        q.new_empty((BH, N, CHUNK_TOKENS), dtype=torch.float32),
    )


@torch.library.custom_op(
    "dtr_triton::gated_delta_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor updates, Tensor states, Tensor inverses,"
    " Tensor cum, Tensor d_o, Tensor? d_final, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(q, k, v, g, beta, updates, states, inverses, cum, d_o, d_final, scale):  # type: ignore[no-untyped-def]
    """Gradients of q, k, v, g, beta and the initial state."""
    q, k, v, beta, d_o = (x.contiguous() for x in (q, k, v, beta, d_o))
    d_final = None if d_final is None else d_final.contiguous()
    (B, T, H, K), V = q.shape, v.shape[-1]
    N, BH = inverses.shape[1], B * H
    # Shared memory: 128 x 128 float32 does not fit at 64 columns.
    BK = min(K, 64 if q.dtype == torch.bfloat16 else 32)
    dims = {"K": K, "V": V, "C": CHUNK_TOKENS}
    dq, dk, dv, dresidual = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)
    dstates = torch.empty_like(states)
    dinitial = q.new_empty((B, H, K, V), dtype=torch.float32)
    dg = q.new_empty((K // BK, B, T, H), dtype=torch.float32)
    dbeta = torch.empty_like(dg)
    BV = scan_block(BH, V)
    with torch.cuda.device_of(q):
        state_scan_backward[(BH, V // BV)](
            q, k, beta, cum, inverses, d_o, d_final, dresidual, dv, dstates, dinitial, scale, T, H,
            BV=BV, HAS_DFINAL=d_final is not None, num_warps=4, num_stages=num_stages(q), **dims,
        )  # fmt: skip
        chunk_gradients[(BH, N, K // BK)](
            q, k, v, beta, cum, updates, states, d_o, dresidual, dstates, dq, dk, dg, dbeta, scale, T, H,
            BK=BK, num_warps=4, **dims,
        )  # fmt: skip
    dg, dbeta = (x[0] if len(x) == 1 else x.sum(0) for x in (dg, dbeta))
    return dq, dk, dv, dg.to(g.dtype), dbeta.to(beta.dtype), dinitial


@_backward.register_fake
def _empty_backward(q, k, v, g, beta, updates, states, inverses, cum, d_o, d_final, scale):  # type: ignore[no-untyped-def]
    (B, _, H, K), V = q.shape, v.shape[-1]
    like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta))
    return (*like, q.new_empty((B, H, K, V), dtype=torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, g, beta, state, scale = inputs
    ctx.save_for_backward(q, k, v, g, beta, *output[2:])
    ctx.scale, ctx.state_dtype = scale, None if state is None else state.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _autograd(ctx: Any, d_o: torch.Tensor | None, d_final: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_o is None:
        d_o = torch.zeros_like(ctx.saved_tensors[2])
    *grads, dinitial = _backward(*ctx.saved_tensors, d_o, d_final, ctx.scale)
    return (*grads, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
