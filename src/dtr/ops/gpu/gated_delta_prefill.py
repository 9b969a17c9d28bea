"""The gated delta rule over a prompt in Triton: no gradients, and parallel over the prompt too.

The chunks of a sequence follow on each other, which leaves most of a GPU idle when one long prompt has a few heads. So
the prompt is cut into segments that run at once. What a segment makes of its first state is affine, S -> M S + N: N is
its last state from zero, M that from the identity with all values zero. One pass finds both, a short loop over the
segments gives each its true first state, and a second pass the outputs. |M| <= 1 as |k| = 1 and beta <= 1.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N chunks of C = 64 tokens, P segments.
"""

from __future__ import annotations

import torch
import triton

from dtr.ops.gpu.gated_delta_kernels import chunk_inverse, chunk_output, state_scan
from dtr.ops.gpu.gated_delta_triton import CHUNK_TOKENS, check_inputs, inverse_warps, num_stages, scan_block
from dtr.ops.gpu.segments import PackedStates, Segments, scan_segments

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
    packed: PackedStates | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_delta_triton.chunked` from a state of zeros; `segments` defaults to `num_segments`.

    With `packed`, B is 1 and the tokens are those of several sequences, whose last states (P, H, K, V) are given.
    """
    check_inputs(q_BTHK, k_BTHK, v_BTHV)
    q, k, g, beta = (x.contiguous() for x in (q_BTHK, k_BTHK, g_BTH, beta_BTH))
    (B, T, H, K), V = q.shape, v_BTHV.shape[-1]
    # Values may be a part of wider rows, which are not copied.
    width = v_BTHV.stride(1) // V
    rows_in_a_row = B == 1 or v_BTHV.stride(0) == T * width * V
    is_part = rows_in_a_row and v_BTHV.stride()[1:] == (width * V, V, 1)
    v, W = (v_BTHV, width) if is_part else (v_BTHV.contiguous(), H)
    BH, N = B * H, triton.cdiv(T, CHUNK_TOKENS)
    cut = Segments.of_chunks(N, segments or num_segments(BH, N)) if packed is None else packed.segments
    inverses = q.new_empty(BH, N, CHUNK_TOKENS, CHUNK_TOKENS)
    cum = q.new_empty(BH, N, CHUNK_TOKENS, dtype=torch.float32)
    o, updates, states = q.new_empty(B, T, H, V), q.new_empty(B, T, H, V), q.new_empty(BH, N, K, V)

    def scan(initial: torch.Tensor | None, last: torch.Tensor) -> None:
        columns = last.shape[-1]
        BV = min(V, K, scan_block(BH * cut.num_segments, columns))
        state_scan[(BH, columns // BV, cut.num_segments)](
            k, v, beta, cum, inverses, initial, updates, states, last, cut.bounds, T, cut.length_chunks, H, W=W, K=K,
            V=V, C=CHUNK_TOKENS, BV=BV, HAS_INITIAL=initial is not None, AFFINE=columns > V,
            HAS_BOUNDS=cut.bounds is not None, num_warps=4, num_stages=num_stages(q),
        )  # fmt: skip

    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        chunk_inverse[(BH, N)](k, g, beta, cum, inverses, T, H, K=K, num_warps=inverse_warps(k))
        last = scan_segments(scan, cut, q.new_empty(BH, K, V, dtype=torch.float32), packed)
        BO = min(V, 64)
        chunk_output[(BH, N, V // BO)](
            q, k, updates, cum, states, o, scale, T, H, K=K, V=V, C=CHUNK_TOKENS, BV=BO, num_warps=4
        )
    return o, last.reshape(-1, H, K, V)
