"""The gated delta rule over a prompt in Triton: no gradients, and parallel over the prompt too.

The chunks of a sequence follow on each other, which leaves most of a GPU idle when one long prompt has a few heads. So
the prompt is cut into segments that run at once. What a segment makes of its first state is affine, S -> M S + N: N is
its last state from zero, M that from the identity with all values zero. A short loop over the segments then gives each
its true first state, and a second pass over all of them the outputs. |M| <= 1 as |k| = 1 and beta <= 1.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N chunks of C = 64 tokens, P segments.
"""

from __future__ import annotations

import torch
import triton

from dtr.ops.chunking import full_precision
from dtr.ops.gated_delta_kernels import chunk_inverse, chunk_output, state_scan
from dtr.ops.gated_delta_triton import CHUNK_TOKENS, check_inputs, num_stages, scan_block

_MIN_SEGMENT_CHUNKS = 8
_MAX_SEGMENTS = 16
_FULL = 256
"""Sequences times heads from which on the scan fills a GPU by itself."""


def num_segments(num_sequences: int, num_chunks: int) -> int:
    """Segments to cut a prompt into: as many as fill the GPU, none shorter than eight chunks."""
    return max(1, min(_MAX_SEGMENTS, _FULL // num_sequences, num_chunks // _MIN_SEGMENT_CHUNKS))


@torch.no_grad()
def prefill(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float,
    segments: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_delta_triton.chunked` from a state of zeros; `segments` defaults to `num_segments`."""
    check_inputs(q_BTHK, k_BTHK, v_BTHV)
    q, k, v, g, beta = (x.contiguous() for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    (B, T, H, K), V = q.shape, v.shape[-1]
    BH, N = B * H, triton.cdiv(T, CHUNK_TOKENS)
    length = triton.cdiv(N, segments or num_segments(BH, N))
    P = triton.cdiv(N, length)
    inverses = q.new_empty(BH, N, CHUNK_TOKENS, CHUNK_TOKENS)
    cum = q.new_empty(BH, N, CHUNK_TOKENS, dtype=torch.float32)
    o, updates, states = torch.empty_like(v), torch.empty_like(v), q.new_empty(BH, N, K, V)

    def scan(initial: torch.Tensor | None, *, columns: int, has_values: bool, keep: bool) -> torch.Tensor:
        """One pass over all segments at once; the last states (BH, P, K, columns)."""
        final = q.new_empty(BH, P, K, columns, dtype=torch.float32)
        BV = scan_block(BH * P, columns)
        state_scan[(BH, columns // BV, P)](
            k, v, beta, cum, inverses, initial, updates, states, final, T, length, H, K=K, V=columns, C=CHUNK_TOKENS,
            BV=BV, HAS_INITIAL=initial is not None, HAS_VALUES=has_values, KEEP=keep, num_warps=4,
            num_stages=num_stages(q),
        )  # fmt: skip
        return final

    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        chunk_inverse[(BH, N)](k, g, beta, cum, inverses, T, H, K=K, num_warps=2)
        initial = None
        if P > 1:
            identity = torch.eye(K, device=q.device).expand(BH, P, K, K).contiguous()
            written = scan(None, columns=V, has_values=True, keep=False)
            kept = scan(identity, columns=K, has_values=False, keep=False)
            initial = _first_states(kept, written)
        final = scan(initial, columns=V, has_values=True, keep=True)[:, -1]
        BO = min(V, 64)
        chunk_output[(BH, N, V // BO)](
            q, k, updates, cum, states, o, scale, T, H, K=K, V=V, C=CHUNK_TOKENS, BV=BO, num_warps=4
        )
    return o, final.reshape(B, H, K, V)


def _first_states(kept_GPKK: torch.Tensor, written_GPKV: torch.Tensor) -> torch.Tensor:
    """The first state of every segment (G, P, K, V), the first of all being zero."""
    states = [torch.zeros_like(written_GPKV[:, 0])]
    with full_precision(written_GPKV):
        for p in range(written_GPKV.shape[1] - 1):
            states.append(torch.baddbmm(written_GPKV[:, p], kept_GPKK[:, p], states[-1]))
    return torch.stack(states, dim=1)
