"""Recurrences that decay per key channel in Triton, forward and backward, for one CUDA GPU.

    S_t = diag(exp(g_t)) S_{t-1};  S_t += beta_t k_t (v_t - k_t^T S_t)^T,  or without the delta rule k_t v_t^T;
    o_t = scale q_t^T S_t

Kimi Delta Attention (arXiv 2510.26692) and gated linear attention (arXiv 2312.06635) in chunks of C = 32 tokens. With
c the running sum of g inside a chunk and m half its total, a chunk has

    reads q exp(c - m),  probes k exp(c - m),  writes k exp(m - c),

so that read_i.write_j = sum_d q_id k_jd exp(c_id - c_jd) for j <= i; above the diagonal products may be infinite, and
are dropped. With S' = exp(m) S the state at the chunk's start, decayed to where c is m, the chunk writes
u = (I + A)^-1 beta (v - probes S'), A_ij = beta_i probe_i.write_j for j < i, or just u = v, and leaves the state
exp(m) (S' + writes^T u). Changed from the papers: they divide by decays from the chunk's start, in sub-chunks of 16
tokens. From its middle exponents stay within 16 |g|, and g is at least `MIN_LOG_DECAY`: a lower one counts as that
bound and gets no gradient.

In bfloat16 reads, probes, writes, S', u, gradients of them and the inverse are rounded before they are multiplied, sums
are float32. bfloat16 has the range of float32.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N chunks of C tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from dtr.ops.chunking import MIN_LOG_DECAY
from dtr.ops.gpu.channel_decay_gradients import chunk_gradients, state_scan_backward
from dtr.ops.gpu.channel_decay_kernels import chunk_factors, chunk_inverse, chunk_output, state_scan
from dtr.ops.gpu.gated_delta_triton import check_inputs, inverse_warps, num_stages, scan_block

CHUNK_TOKENS = 32


def chunked(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor | None,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in v's dtype and float32 final state; differentiable in every tensor argument.

    g is the log of the decay, at most 0; without beta there is no delta rule, with it k has about unit length; scale
    defaults to K ** -0.5. Runs without a graph break under torch.compile and can be captured in a CUDA graph after one
    warm-up call. Raises DeviceError where `gated_delta_triton.supports` is false.
    """
    check_inputs(q_BTHK, k_BTHK, v_BTHV, "channel_decay_triton.chunked")
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale)
    o_BTHV, final_BHKV, *_ = _forward(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, state_BHKV, scale)
    return o_BTHV, final_BHKV


def _contiguous(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _scan_block(num_sequences: int, v: torch.Tensor) -> int:
    """Value columns per program of a scan. Chunks are half as long as Gated DeltaNet's, so each column more saves more.

    In bfloat16 on an H100 64 columns took a quarter to a third off the scans of 128 and 144 sequences, and made those
    of 36 slower. In float32 they run out of registers.
    """
    many = num_sequences >= 128 and v.dtype == torch.bfloat16
    return min(v.shape[-1], 64) if many else scan_block(num_sequences, v.shape[-1])


@torch.library.custom_op(
    "dtr_triton::channel_decay_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor? state, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(q, k, v, g, beta, state, scale):  # type: ignore[no-untyped-def]
    """(o, final state, and for the backward pass: reads, writes, half totals, chunk states, probes, u, inverses).

    Without beta the last three are empty: u is v.
    """
    q, k, v, g, beta, state = _contiguous(q, k, v, g, beta, state)
    o, final, reads, writes, halves, states, *of_delta = _empty_forward(q, k, v, g, beta, state, scale)
    probes, updates, inverses = (None, v, None) if beta is None else of_delta
    (B, T, H, K), V = q.shape, v.shape[-1]
    BH, N = B * H, halves.shape[1]
    DELTA = beta is not None
    dims = {"H": H, "K": K, "C": CHUNK_TOKENS}
    BV, BO = _scan_block(BH, v), min(V, 64)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        chunk_factors[(BH, N)](
            q, k, g, reads, probes, writes, halves, T, LOWEST=MIN_LOG_DECAY, DELTA=DELTA,
            num_warps=4, **dims,
        )  # fmt: skip
        if DELTA:
            chunk_inverse[(BH, N)](probes, writes, beta, inverses, T, num_warps=inverse_warps(k), **dims)
        state_scan[(BH, V // BV)](
            probes, writes, halves, v, beta, inverses, state, updates, states, final, T, V=V, BV=BV,
            HAS_INITIAL=state is not None, DELTA=DELTA, num_warps=4, num_stages=num_stages(q), **dims,
        )  # fmt: skip
        chunk_output[(BH, N, V // BO)](reads, writes, updates, states, o, scale, T, V=V, BV=BO, num_warps=4, **dims)
    return o, final, reads, writes, halves, states, *of_delta


@_forward.register_fake
def _empty_forward(q, k, v, g, beta, state, scale):  # type: ignore[no-untyped-def]
    (B, T, H, K), V = q.shape, v.shape[-1]
    BH, N = B * H, (T + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    chunk = (BH, N, CHUNK_TOKENS)
    return (
        v.new_empty((B, T, H, V)),
        q.new_empty((B, H, K, V), dtype=torch.float32),
        q.new_empty((*chunk, K)),
        q.new_empty((*chunk, K)),
        q.new_empty((BH, N, K), dtype=torch.float32),
        q.new_empty((BH, N, K, V)),
        *(
            q.new_empty((0,) if beta is None else shape)
            for shape in ((*chunk, K), (B, T, H, V), (*chunk, CHUNK_TOKENS))
        ),
    )


@torch.library.custom_op(
    "dtr_triton::channel_decay_backward",
    mutates_args=(),
    schema="(Tensor v, Tensor g, Tensor? beta, Tensor reads, Tensor writes, Tensor halves, Tensor states,"
    " Tensor probes, Tensor updates, Tensor inverses, Tensor d_o, Tensor? d_final, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(v, g, beta, reads, writes, halves, states, probes, updates, inverses, d_o, d_final, scale):  # type: ignore[no-untyped-def]
    """Gradients of q, k, v, g, beta (empty without it) and the initial state."""
    v, g, beta, d_o, d_final = _contiguous(v, g, beta, d_o, d_final)
    DELTA = beta is not None
    if not DELTA:
        probes, updates, inverses = None, v, None
    (B, T, H, K), V = g.shape, v.shape[-1]
    BH, N = B * H, halves.shape[1]
    # Float32 takes twice the registers.
    widest = 64 if v.dtype == torch.bfloat16 else 32
    BK, BG, BV = min(K, widest), min(V, widest // 2), _scan_block(BH, v)
    dq, dk, dv = v.new_empty(g.shape), v.new_empty(g.shape), torch.empty_like(v)
    dg = torch.empty_like(g, dtype=torch.float32)
    dresidual = torch.empty_like(v) if DELTA else None
    dbeta = g.new_empty((K // BK, B, T, H) if DELTA else (1, 0), dtype=torch.float32)
    dstates = torch.empty_like(states)
    dinitial = g.new_empty((B, H, K, V), dtype=torch.float32)
    dims = {"H": H, "K": K, "V": V, "C": CHUNK_TOKENS, "DELTA": DELTA}
    with torch.cuda.device_of(v):
        state_scan_backward[(BH, V // BV)](
            reads, probes, writes, halves, beta, inverses, d_o, d_final, dresidual, dv, dstates, dinitial, scale, T,
            BV=BV, HAS_DFINAL=d_final is not None, num_warps=4, num_stages=num_stages(v), **dims,
        )  # fmt: skip
        chunk_gradients[(BH, N, K // BK)](
            v, g, beta, reads, probes, writes, updates, states, d_o, dresidual, dstates, dq, dk, dg, dbeta, scale, T,
            BK=BK, BV=BG, LOWEST=MIN_LOG_DECAY, num_warps=4, num_stages=num_stages(v),
            **dims,
        )  # fmt: skip
    dbeta = dbeta[0] if len(dbeta) == 1 else dbeta.sum(0)
    return dq, dk, dv, dg.to(g.dtype), dbeta if beta is None else dbeta.to(beta.dtype), dinitial


@_backward.register_fake
def _empty_backward(v, g, beta, reads, writes, halves, states, probes, updates, inverses, d_o, d_final, scale):  # type: ignore[no-untyped-def]
    (B, _, H, K), V = g.shape, v.shape[-1]
    shape, dtype = ((0,), torch.float32) if beta is None else (beta.shape, beta.dtype)
    return (
        v.new_empty(g.shape),
        v.new_empty(g.shape),
        v.new_empty(v.shape),
        g.new_empty(g.shape),
        g.new_empty(shape, dtype=dtype),
        v.new_empty((B, H, K, V), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, v, g, beta, state, scale = inputs
    ctx.save_for_backward(v, g, beta, *output[2:])
    ctx.scale, ctx.state_dtype = scale, None if state is None else state.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _autograd(ctx: Any, d_o: torch.Tensor | None, d_final: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    v, _, beta, *_rest = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(v)
    dq, dk, dv, dg, dbeta, dinitial = _backward(*ctx.saved_tensors, d_o, d_final, ctx.scale)
    dstate = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return dq, dk, dv, dg, None if beta is None else dbeta, dstate, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
