"""Gated linear attention (GLA) in three forms: token by token, in chunks, one step.

Source: arXiv 2312.06635, eq. 3 with a decay for each key channel, and its section 4 for the chunked form. Changed: the
scores within a chunk come from halving it again and again (see `_Chunked`) instead of one level of sub-chunks, which
needs no pairwise [C, C, K] tensor and never takes exp of a positive number.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T;  o_t = scale q_t^T S_t

Shapes: B batch, T tokens, H heads, G = B * H sequences, N chunks, C tokens of a chunk, K key dim, V value dim.
g is the log of the decay and must be <= 0. States and decays are float32 (float64 where an input is); o has the dtype
of v.
"""

from __future__ import annotations

from typing import Any

import torch

from dtr.ops.chunking import chunk_length, from_chunks, full_precision, start_state, state_dtype, to_chunks


def step(
    q_BHK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g_BHK: torch.Tensor,
    state_BHKV: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; returns o [B, H, V] and the new state [B, H, K, V]. The given state is left as it was."""
    dtype = state_dtype(q_BHK, k_BHK, v_BHV, g_BHK, state_BHKV)
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q_BHK):
        q, k, v, g = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, g_BHK))
        state = state_BHKV.to(dtype) * g.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)
        o = scale * (q.unsqueeze(-2) @ state).squeeze(-2)
    return o.to(v_BHV.dtype), state


def naive(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: `step` for each token. Returns o [B, T, H, V] and the last state [B, H, K, V]."""
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHK))
    outputs = []
    for t in range(q_BTHK.shape[1]):
        o, state = step(q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], g_BTHK[:, t], state, scale=scale)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def chunked(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    *,
    scale: float | None = None,
    state_BHKV: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk_size` tokens, a power of two from 16 up: time O(T), one loop over T / C chunks.

    Takes any T >= 1; differentiable once in every input. Returns o [B, T, H, V] and the last state [B, H, K, V].
    """
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHK))
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    num_chunk_tokens = chunk_length(q_BTHK.shape[1], chunk_size)
    inputs = [to_chunks(x, num_chunk_tokens, state.dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK)]
    o, last = _Chunked.apply(*inputs, state.flatten(0, 1), scale)
    return from_chunks(o, q_BTHK.shape[1], q_BTHK.shape[2]).to(v_BTHV.dtype), last.view_as(state)


class _Chunked(torch.autograd.Function):
    """All chunks of all sequences at once, but for one loop that hands the state on.

    Within a chunk, blocks of 1, 2, 4, ... tokens are joined in pairs. Every token of the right block reads every token
    of the left one through the border between them, so its score is one matmul of q * exp(g summed from the border up
    to the reader) and k * exp(g summed from the writer to the border). `from_start` and `to_end` hold these sums for
    the current blocks; at the end the block is the chunk, and they link it to the states.

    The backward is written out to recompute these factors instead of keeping them. g_t scales what is read at t or
    later and was written before t, so dg is the sum from the end of q * dq - k * dk, without the tokens' reads of
    themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        state: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k, g [G, N, C, K], v [G, N, C, V], state [G, K, V]."""
        with full_precision(q):
            o = (q * k).sum(-1, keepdim=True) * v
            from_start, to_end, half = g.clone(), torch.zeros_like(g), 1
            while half < g.shape[-2]:
                reads = _right(q, half) * _right(from_start, half).exp()
                writes = _left(k, half) * _left(to_end, half).exp()
                _right(o, half).add_(reads @ writes.mT @ _left(v, half))
                _join(from_start, to_end, half)
                half *= 2
            kept = from_start[..., -1, :].exp().unsqueeze(-1)
            added = (k * to_end.exp()).mT @ v
            starts = []
            for n in range(k.shape[1]):
                starts.append(state)
                state = torch.addcmul(added[:, n], state, kept[:, n])
            states = torch.stack(starts, dim=1)
            # Not in place: traced by torch 2.11, an output of an in-place operation gets no gradient.
            o = o.add_((q * from_start.exp_()) @ states) * scale
        ctx.save_for_backward(q, k, v, g, states)
        ctx.scale = scale
        return o, state

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, states = ctx.saved_tensors
        grad_o, grad_state = grads[0].contiguous() * ctx.scale, grads[1]
        with full_precision(q):
            dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            from_start, to_end, half = g.clone(), torch.zeros_like(g), 1
            while half < g.shape[-2]:
                read_decay, write_decay = _right(from_start, half).exp(), _left(to_end, half).exp()
                reads, writes = _right(q, half) * read_decay, _left(k, half) * write_decay
                grad_right = _right(grad_o, half)
                _left(dv, half).add_((writes @ reads.mT) @ grad_right)
                grad_scores = grad_right @ _left(v, half).mT
                _right(dq, half).add_((grad_scores @ writes).mul_(read_decay))
                _left(dk, half).add_((grad_scores.mT @ reads).mul_(write_decay))
                _join(from_start, to_end, half)
                half *= 2
            from_start.exp_()
            to_end.exp_()
            kept = from_start[..., -1, :].unsqueeze(-1)
            grad_starts, ends = (q * from_start).mT @ grad_o, []
            for n in reversed(range(k.shape[1])):
                ends.append(grad_state)
                grad_state = torch.addcmul(grad_starts[:, n], grad_state, kept[:, n])
            grad_ends = torch.stack(ends[::-1], dim=1)
            dq.add_((grad_o @ states.mT).mul_(from_start))
            dk_state = (v @ grad_ends.mT).mul_(to_end)
            dv.add_((k * to_end) @ grad_ends)
            dc = q * dq - k * dk.add_(dk_state)
            # The decay over the whole chunk acts on the old state and on all that is written into the new one.
            dc[..., -1, :] += (states * grad_ends).sum(-1) * kept.squeeze(-1) + (k * dk_state).sum(-2)
            dg = dc.flip(-2).cumsum_(-2).flip(-2)
            # Each token's read of itself.
            grad_self = (grad_o * v).sum(-1, keepdim=True)
            dv.addcmul_((q * k).sum(-1, keepdim=True), grad_o)
        return dq.addcmul_(grad_self, k), dk.addcmul_(grad_self, q), dv, dg, grad_state, None


def _left(x: torch.Tensor, half: int) -> torch.Tensor:
    """View [G, N, C / (2 half), half, .] of the left block of each pair in [G, N, C, .]."""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _right(x: torch.Tensor, half: int) -> torch.Tensor:
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def _join(from_start: torch.Tensor, to_end: torch.Tensor, half: int) -> None:
    """Turn sums of g within blocks of `half` tokens into those within pairs of blocks, in place.

    `from_start` runs from the block's start through the token, `to_end` from after the token to the block's end. Sums
    are added and never subtracted, as a difference would lose its digits next to one strong decay.
    """
    _left(to_end, half).add_(_right(from_start, half)[..., -1:, :])
    _right(from_start, half).add_(_left(from_start, half)[..., -1:, :])
