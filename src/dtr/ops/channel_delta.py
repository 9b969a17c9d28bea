"""The delta rule with a decay per key channel (Kimi Delta Attention): token by token, in chunks, one step.

Source: "Kimi Linear" (arXiv 2510.26692). The chunked form differs from the paper's: scores are made pair of blocks by
pair of blocks, so that no decay is ever divided by another.

    S_t = diag(exp(g_t)) S_{t-1};  S_t += beta_t k_t (v_t - k_t^T S_t)^T;  o_t = q_t^T S_t

Shapes: B batch, T tokens, H heads, G = B * H sequences, N chunks, C tokens of a chunk, K key dim, V value dim.
g is the log of the decay and must be <= 0; k should have unit length. States and decays are float32 (float64 where an
input is); o has the dtype of v.
"""

from __future__ import annotations

import torch

from dtr.ops.chunking import chunk_length, from_chunks, full_precision, start_state, state_dtype, to_chunks


def step(
    q_BHK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g_BHK: torch.Tensor,
    beta_BH: torch.Tensor,
    state_BHKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; returns o [B, H, V] and the new state [B, H, K, V]. The given state is left as it was."""
    dtype = state_dtype(q_BHK, k_BHK, v_BHV, g_BHK, beta_BH, state_BHKV)
    with full_precision(q_BHK):
        q, k, v, g, beta = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, g_BHK, beta_BH))
        state = state_BHKV.to(dtype) * g.exp().unsqueeze(-1)
        written = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
        state = state + k.unsqueeze(-1) * written.unsqueeze(-2)
        o = (q.unsqueeze(-2) @ state).squeeze(-2)
    return o.to(v_BHV.dtype), state


def naive(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    state_BHKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: `step` for each token. Returns o [B, T, H, V] and the last state [B, H, K, V]."""
    state = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH))
    outputs = []
    for t in range(q_BTHK.shape[1]):
        o, state = step(q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], g_BTHK[:, t], beta_BTH[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def chunked(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    state_BHKV: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in chunks of `chunk_size` tokens, a power of two from 16 up: time O(T), one loop over T / C chunks.

    With c the running sum of g in a chunk, S the state before it and kappa(x, y)_ij = sum_d x_id y_jd exp(c_id - c_jd):
    u = (I + strict lower part of beta kappa(k, k))^-1 beta (v - (k exp(c)) S) is what the chunk writes,
    o = (q exp(c)) S + kappa(q, k) u, and the state after it is exp(c_C) S + (k exp(c_C - c))^T u.

    Takes any T >= 1; a single token with a state takes `step`. Returns o [B, T, H, V] and the last state [B, H, K, V].
    """
    if q_BTHK.shape[1] == 1 and state_BHKV is not None:
        o, last = step(q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], g_BTHK[:, 0], beta_BTH[:, 0], state_BHKV)
        return o.unsqueeze(1), last
    first = start_state(state_BHKV, k_BTHK, v_BTHV, state_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH))
    num_tokens, num_heads = q_BTHK.shape[1:3]
    size = chunk_length(num_tokens, chunk_size)
    q, k, v, g, beta = (to_chunks(x, size, first.dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH))
    with full_precision(q_BTHK):
        scores, from_start, to_end = _pair_scores(torch.stack([q, k]), k, g)
        read, overlap = scores.unbind(0)
        eye = torch.eye(size, dtype=first.dtype, device=q.device).expand_as(overlap)
        unit_lower = eye + overlap.tril(-1) * beta.unsqueeze(-1)
        inverse = torch.linalg.solve_triangular(unit_lower, eye, upper=False, unitriangular=True)
        decay = from_start.exp()
        k_start, q_start, k_end, kept = k * decay, q * decay, k * to_end.exp(), decay[..., -1, :].unsqueeze(-1)
        state, outputs = first.flatten(0, 1), []
        for n in range(k.shape[1]):
            written = inverse[:, n] @ (beta[:, n].unsqueeze(-1) * (v[:, n] - k_start[:, n] @ state))
            outputs.append(q_start[:, n] @ state + read[:, n] @ written)
            state = kept[:, n] * state + k_end[:, n].mT @ written
        o = torch.stack(outputs, dim=1)
    return from_chunks(o, num_tokens, num_heads).to(v_BTHV.dtype), state.view_as(first)


def _pair_scores(
    readers: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kappa(readers, k) [R, G, N, C, C], zero above the diagonal; sums of g up to each token and after it [G, N, C, K].

    Blocks of 1, 2, 4, ... tokens are joined in pairs; the right one reads the left one through the border between them.
    """
    x, y, from_start, to_end = (each.unsqueeze(-2) for each in (readers, k, g, torch.zeros_like(g)))
    scores = (x * y).sum(-1, keepdim=True)
    while scores.shape[-1] < k.shape[-2]:
        (left_y, right_y), (_, right_x) = _pairs(y), _pairs(x)
        (left_start, right_start), (left_end, right_end) = _pairs(from_start), _pairs(to_end)
        across = (right_x * right_start.exp()) @ (left_y * left_end.exp()).mT
        left, right = _pairs(scores)
        scores = torch.cat([torch.cat([left, torch.zeros_like(left)], -1), torch.cat([across, right], -1)], dim=-2)
        from_start = torch.cat([left_start, right_start + left_start[..., -1:, :]], dim=-2)
        to_end = torch.cat([left_end + right_start[..., -1:, :], right_end], dim=-2)
        x, y = torch.cat(_pairs(x), dim=-2), torch.cat([left_y, right_y], dim=-2)
    return scores.squeeze(-3), from_start.squeeze(-3), to_end.squeeze(-3)


def _pairs(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right blocks of each pair along dim -3."""
    return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
