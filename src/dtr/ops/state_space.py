"""The state space recurrence of Mamba-2 (SSD) in three forms: token by token, in chunks, one step.

Source: "Transformers are SSMs" (arXiv 2405.21060), eq. 1 with A a scalar per head, and its section 6 for the chunked
form. Names are those of linear attention: the paper's C is q, B is k, delta x is v, delta A is g; the skip D x is left
to the caller. The state is [K, V] (the paper writes the transpose):

    S_t = exp(g_t) S_{t-1} + k_t v_t^T;  o_t = q_t^T S_t

Shapes: B batch, T tokens, H heads, G = B * H sequences, N chunks, C tokens of a chunk, K state dim, V head dim.
g is the log of the decay and must be <= 0. States and decays are float32 (float64 where an input is); o has the dtype
of v.
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


def step(
    q_BHK: torch.Tensor, k_BHK: torch.Tensor, v_BHV: torch.Tensor, g_BH: torch.Tensor, state_BHKV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; returns o [B, H, V] and the new state [B, H, K, V]. The given state is left as it was."""
    dtype = state_dtype(q_BHK, k_BHK, v_BHV, g_BH, state_BHKV)
    with full_precision(q_BHK):
        q, k, v, g = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, g_BH))
        state = state_BHKV.to(dtype) * g.exp()[..., None, None] + k.unsqueeze(-1) * v.unsqueeze(-2)
        o = (q.unsqueeze(-2) @ state).squeeze(-2)
    return o.to(v_BHV.dtype), state


def naive(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    *,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: `step` for each token. Returns o [B, T, H, V] and the last state [B, H, K, V]."""
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTH))
    outputs = []
    for t in range(q_BTHK.shape[1]):
        o, state = step(q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], g_BTH[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def chunked(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    *,
    state_BHKV: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk_size` tokens, a power of two from 16 up: time O(T), one loop over T / C chunks.

    Takes any T >= 1; differentiable once in every input. A single token with a state takes `step`. Returns
    o [B, T, H, V] and the last state [B, H, K, V].
    """
    if q_BTHK.shape[1] == 1 and state_BHKV is not None:
        o, last = step(q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], g_BTH[:, 0], state_BHKV)
        return o.unsqueeze(1), last
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTH))
    num_tokens, num_heads = q_BTHK.shape[1:3]
    num_chunk_tokens = chunk_length(num_tokens, chunk_size)
    inputs = [to_chunks(x, num_chunk_tokens, state.dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH)]
    o, last = _Chunked.apply(*inputs, state.flatten(0, 1))
    return from_chunks(o, num_tokens, num_heads).to(v_BTHV.dtype), last.view_as(state)


class _Chunked(torch.autograd.Function):
    """All chunks of all sequences at once, but for one loop that hands the state on.

    Per chunk, with c the running sum of g, E_ij = exp(c_i - c_j) for j <= i, and S the state before it:
    o = exp(c) q S + (q k^T * E) v; the state after it is exp(c_C) S + (exp(c_C - c) k)^T v.

    The backward is written out, as autograd would keep several times the memory. c_i multiplies what token i reads with
    and divides what is read from it, so that dc = q . dq - k . dk.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [G, N, C, K], v [G, N, C, V], g [G, N, C], state [G, K, V]."""
        with full_precision(q):
            decay = pair_decays(g)
            from_start, to_end = g.cumsum(-1).exp().unsqueeze(-1), decay[..., -1, :].unsqueeze(-1)
            written, starts = (k * to_end).mT @ v, []
            for n in range(k.shape[1]):
                starts.append(state)
                state = torch.addcmul(written[:, n], state, from_start[:, n, -1:])
            states = torch.stack(starts, dim=1)
            # Not in place: traced by torch 2.11, an output of an in-place operation gets no gradient.
            o = (q * from_start) @ states + ((q @ k.mT) * decay) @ v
        ctx.save_for_backward(q, k, v, decay, from_start, states)
        return o, state

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, decay, from_start, states = ctx.saved_tensors
        grad_o, grad_state = grads[0].contiguous(), grads[1]
        to_end, kept = decay[..., -1, :].unsqueeze(-1), from_start[..., -1:, :]
        with full_precision(q):
            grad_starts, ends = (q * from_start).mT @ grad_o, []
            for n in reversed(range(k.shape[1])):
                ends.append(grad_state)
                grad_state = torch.addcmul(grad_starts[:, n], grad_state, kept[:, n])
            grad_ends = torch.stack(ends[::-1], dim=1)
            scores, grad_scores = (q @ k.mT).mul_(decay), (grad_o @ v.mT).mul_(decay)
            dv = (scores.mT @ grad_o).add_((k * to_end) @ grad_ends)
            dk_state = (v @ grad_ends.mT).mul_(to_end)
            dq = (grad_o @ states.mT).mul_(from_start).add_(grad_scores @ k)
            dk = (grad_scores.mT @ q).add_(dk_state)
            dc = (q * dq - k * dk).sum(-1)
            # The decay over the whole chunk acts on the old state and on all that is written into the new one.
            dc[..., -1] += kept[..., 0, 0] * (states * grad_ends).sum((-2, -1)) + (k * dk_state).sum((-2, -1))
            dg = dc.flip(-1).cumsum(-1).flip(-1)
        return dq, dk, dv, dg, grad_state
