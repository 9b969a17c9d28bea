"""The gated delta rule (Gated DeltaNet) in three forms: token by token, in chunks, one step.

Source: arXiv 2412.06464, eq. 10; the chunked form is its section 3.3 with the WY products of arXiv 2406.06484.
Changed: the state is [K, V] (the papers write the transpose), and decay acts before the write within a token:

    S_t = exp(g_t) S_{t-1};  S_t += beta_t k_t (v_t - k_t^T S_t)^T;  o_t = scale q_t^T S_t

Shapes: B batch, T tokens, H heads, G = B * H sequences, N chunks, C tokens of a chunk, K key dim, V value dim.
g is the log of the decay and must be <= 0, beta the write strength, usually within [0, 1]. k should have unit length,
which is up to the caller. States and decays are float32 (float64 where an input is); o has the dtype of v.
"""

from __future__ import annotations

from typing import Any

import torch

from dtr.ops.chunking import (
    chunk_length,
    from_chunks,
    full_precision,
    pair_decays,
    start_state,
    state_dtype,
    to_chunks,
)

CACHE_ELEMENTS_PER_THREAD = 2**18
"""On a CPU, elements of the queries that are worked on at once, for each thread."""
MAX_LAPACK_THREADS = 2
"""Threads up to which LAPACK inverts: in two fifths of the time of halving on one core, but on only one."""


def step(
    q_BHK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g_BH: torch.Tensor,
    beta_BH: torch.Tensor,
    state_BHKV: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; returns o [B, H, V] and the new state [B, H, K, V]. The given state is left as it was."""
    dtype = state_dtype(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, state_BHKV)
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q_BHK):
        q, k, v, g, beta = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, g_BH, beta_BH))
        state = state_BHKV.to(dtype) * g.exp()[..., None, None]
        written = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
        state = state + k.unsqueeze(-1) * written.unsqueeze(-2)
        o = scale * (q.unsqueeze(-2) @ state).squeeze(-2)
    return o.to(v_BHV.dtype), state


def naive(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: `step` for each token. Returns o [B, T, H, V] and the last state [B, H, K, V]."""
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    outputs = []
    for t in range(q_BTHK.shape[1]):
        o, state = step(q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], g_BTH[:, t], beta_BTH[:, t], state, scale=scale)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def chunked(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk_size` tokens, a power of two from 16 up: time O(T), one loop over T / C chunks.

    Takes any T >= 1; differentiable once in every input. Returns o [B, T, H, V] and the last state [B, H, K, V].
    """
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    num_chunk_tokens = chunk_length(q_BTHK.shape[1], chunk_size)
    tensors = [q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state]
    num_rows = _rows_at_once(q_BTHK)
    if num_rows >= len(q_BTHK):
        return _in_chunks(*tensors, scale, num_chunk_tokens)
    parts = [_in_chunks(*rows, scale, num_chunk_tokens) for rows in zip(*(x.split(num_rows) for x in tensors))]
    return torch.cat([o for o, _ in parts]), torch.cat([last for _, last in parts])


def _rows_at_once(q_BTHK: torch.Tensor) -> int:
    """How much of the batch to work on together: all of it, but on a CPU only what fits a cache.

    Intermediate results then reuse memory that is already mapped. Measured on two cores at B = 8, T = 512, H = 9,
    K = V = 64: a quarter less time.
    """
    if torch.compiler.is_compiling() or q_BTHK.device.type != "cpu":
        return len(q_BTHK)
    return max(1, CACHE_ELEMENTS_PER_THREAD * torch.get_num_threads() // q_BTHK[0].numel())


def _in_chunks(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunked` with the state, the scale and the number of tokens in a chunk given."""
    *inputs, state, scale, num_chunk_tokens = args
    num_tokens, num_heads = inputs[0].shape[1:3]
    dtypes = [_product_dtype(inputs[2], state)] * 3 + [state.dtype] * 2
    chunks = (to_chunks(x, num_chunk_tokens, dtype, chunks_first=True) for x, dtype in zip(inputs, dtypes))
    o, last = _Chunked.apply(*chunks, state.flatten(0, 1), scale)
    return from_chunks(o, num_tokens, num_heads, chunks_first=True).to(inputs[2].dtype), last.view_as(state)


def _product_dtype(v: torch.Tensor, state: torch.Tensor) -> torch.dtype:
    """Type in which matrices are multiplied: the state's, but on a CPU that of bfloat16 values.

    Sums are float32 then too, and so is all that is no product. Measured on one core with AMX: a product of 144 blocks
    of 64 x 64 takes 0.3 instead of 0.6 to 1.1 ms.
    """
    is_low = v.device.type == "cpu" and v.dtype == torch.bfloat16 and state.dtype == torch.float32
    return v.dtype if is_low else state.dtype


def unit_lower_inverse(a_CC: torch.Tensor) -> torch.Tensor:
    """Inverse of I + (the part of `a` strictly below the diagonal), [..., C, C], C a power of two.

    Stable where all entries of `a` are near 1 (correlated keys), unlike a product of powers of `a`.
    """
    if a_CC.device.type == "cpu" and _has_few_threads():
        identity = torch.eye(a_CC.shape[-1], dtype=a_CC.dtype)
        return torch.linalg.solve_triangular(a_CC, identity, upper=False, unitriangular=True)
    return inverse_by_halving(a_CC)


@torch.compiler.assume_constant_result
def _has_few_threads() -> bool:
    return torch.get_num_threads() <= MAX_LAPACK_THREADS


def inverse_by_halving(a_CC: torch.Tensor) -> torch.Tensor:
    """`unit_lower_inverse` in log2(C) batched products.

    The inverse of [[X, 0], [Z, Y]] is [[X', 0], [-Y' Z X', Y']], from single elements up to the whole.
    """
    size = a_CC.shape[-1]
    inverse = torch.zeros_like(a_CC)
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1)
    half = 1
    while half < size:
        z = _diagonal_blocks(a_CC, half)[..., 1, :, 0, :]
        blocks = _diagonal_blocks(inverse, half)
        # Written through the view. Inverses of single elements are 1, so the first level is a copy.
        blocks[..., 1, :, 0, :] = -z if half == 1 else -(blocks[..., 1, :, 1, :] @ z @ blocks[..., 0, :, 0, :])
        half *= 2
    return inverse


def _diagonal_blocks(a_CC: torch.Tensor, half: int) -> torch.Tensor:
    """View [..., C / (2 half), 2, half, 2, half] of the square blocks on the diagonal."""
    split = (a_CC.shape[-1] // (2 * half), 2, half)
    return a_CC.unflatten(-1, split).unflatten(-4, split).diagonal(dim1=-6, dim2=-3).movedim(-1, -5)


class _Chunked(torch.autograd.Function):
    """All chunks of all sequences at once, but for one loop that hands the state on.

    Per chunk, with c the running sum of g, E_ij = exp(c_i - c_j) for j <= i, and S the state before it:
    A_ij = beta_i (k_i . k_j) E_ij below the diagonal; the vectors written are X = (I + A)^-1 beta (v - exp(c) k S);
    o = scale (exp(c) q S + (q k^T * E) X); the state after it is exp(c_C) S + (exp(c_C - c) k)^T X.

    The backward is written out, as autograd would keep several times the memory and differentiate through the
    inverse. It rests on two identities: with z the gradient of beta (v - exp(c) k S), that of A is -z X^T; and c_i
    only ever multiplies what token i reads with (q_i, and k_i in its part as reader) and divides what is read from it
    (k_i in its part as key of the memory), so that dc = q . dq + k . dk_reader - k . dk_memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [N, G, C, K], v [N, G, C, V], g, beta [N, G, C], state [G, K, V]."""
        low = q.dtype
        with full_precision(q):
            beta = beta.unsqueeze(-1)
            decay = pair_decays(g)
            from_start, to_end = g.cumsum(-1).exp().unsqueeze(-1), decay[..., -1, :].unsqueeze(-1)
            # LAPACK writes columns side by side, which torch.compile does not know of the inverse that it keeps:
            # without the format its backward pass read memory that nobody had written.
            inverse = unit_lower_inverse(torch.mul(k @ k.mT, decay).mul_(beta))
            inverse = inverse.to(low, memory_format=torch.contiguous_format)
            scores = (q @ k.mT).mul_(decay)
            asked, k_reads = (v * beta).to(low), (k * (from_start * beta)).to(low)
            k_writes = (k * to_end).to(low).mT
            starts, written = [], []
            for n in range(len(k)):
                starts.append(state.to(low))
                written.append(inverse[n] @ torch.baddbmm(asked[n], k_reads[n], starts[-1], alpha=-1))
                state = torch.addcmul(k_writes[n] @ written[-1], state, from_start[n, :, -1:])
            states, x = torch.stack(starts), torch.stack(written)
            # Not in place: traced by torch 2.11, an output of an in-place operation gets no gradient.
            o = (q * (from_start * scale)).to(low) @ states + (scores @ x).mul_(scale)
        ctx.save_for_backward(q, k, v, beta, decay, from_start, inverse, scores, states, x)
        ctx.scale = scale
        return o, state

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, beta, decay, from_start, inverse, scores, states, x = ctx.saved_tensors
        grad_o, grad_state, low = grads[0].contiguous() * ctx.scale, grads[1], q.dtype
        to_end = decay[..., -1, :].unsqueeze(-1)
        with full_precision(q):
            k_reads, k_writes = (k * (from_start * beta)).to(low).mT, (k * to_end).to(low)
            grad_x, grad_starts = scores.mT @ grad_o, (q * from_start).to(low).mT @ grad_o
            z_list, ends = [], []
            for n in reversed(range(len(k))):
                ends.append(grad_state.to(low))
                z_list.append(inverse[n].mT @ torch.baddbmm(grad_x[n], k_writes[n], ends[-1]))
                read = torch.baddbmm(grad_starts[n], k_reads[n], z_list[-1], alpha=-1)
                grad_state = torch.addcmul(read, grad_state, from_start[n, :, -1:])
            z, grad_ends = torch.stack(z_list[::-1]), torch.stack(ends[::-1])

            grad_scores = (grad_o @ x.mT).mul_(decay)
            # Products with float32 numbers are float32: the decay's gradient is a small difference of what follows.
            dq = torch.mul(grad_o @ states.mT, from_start).add_(grad_scores @ k)
            grad_a = (z @ x.mT).mul_(decay)
            grad_a.diagonal(dim1=-2, dim2=-1).zero_()
            # Per unit of beta at first.
            dk_reader = torch.mul(z @ states.mT, -from_start).sub_(grad_a @ k)
            dot_reader = (k * dk_reader).sum(-1, keepdim=True)
            dbeta = dot_reader + (v * z).sum(-1, keepdim=True, dtype=beta.dtype)
            dk_memory = torch.mul(x @ grad_ends.mT, to_end)
            # c_C multiplies the old state and everything that is written into the new one.
            kept = (states * grad_ends).sum((-2, -1), dtype=beta.dtype)
            grad_kept = from_start[..., -1, 0] * kept + (k * dk_memory).sum((-2, -1))
            dk_memory.add_(grad_scores.mT @ q).sub_(grad_a.mul_(beta).mT @ k)
            dc = beta * dot_reader + (q * dq - k * dk_memory).sum(-1, keepdim=True)
            dc[..., -1, 0] += grad_kept
            dg = dc.squeeze(-1).flip(-1).cumsum(-1).flip(-1)
            dk = torch.addcmul(dk_memory, dk_reader, beta)
        return dq.to(low), dk.to(low), (z * beta).to(low), dg, dbeta.squeeze(-1), grad_state, None
