"""A prompt through a `GatedDeltaNet` layer, from hidden states before their norm to gated heads.

`delta_prompt_kernels.py` has the maths. The weight of the norm is part of the projections, and its division comes after
them: hidden states are read once more for its sake, but not written. A prompt of few sequences is cut into segments
that are scanned at once, as in `gated_delta_prefill.py`.

Shapes: B batch, T tokens, D hidden dim, H heads, K head dim, N chunks of 64 tokens, P segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch.nn import functional as F

from dtr.ops.gpu.delta_prompt_kernels import chunk_maps, prompt_scan, token_gates
from dtr.ops.gpu.segments import PackedStates, Segments, scan_segments

if TYPE_CHECKING:
    from dtr.ops.projections import DeltaProjection

_CHUNK_TOKENS = 64
_MIN_SEGMENT_CHUNKS = 8
_MAX_SEGMENTS = 16
_HEAD_DIM = 64
_GATE_TOKENS = 64
_GATE_COLUMNS = 64


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernels are cut for a machine."""

    map_registers: int | None = None
    """Most registers of a thread; fewer let more programs share a processor."""
    scan_columns: int = 64
    """Columns of a state that a program carries."""
    scan_warps: int = 4
    scan_stages: int = 4
    """Chunks that are on their way from memory."""
    full: int = 72
    """Sequences times heads from which on the prompt is not cut into segments."""
    segments: int | None = None
    """Segments, whatever there is to fill the GPU."""


DEFAULT = Tuning()


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a layer's tokens decide by themselves, in float32."""

    scale_BT: torch.Tensor
    """One over the root mean square of each token's hidden state."""
    gates_2BHT: torch.Tensor
    """Log decays and write strengths."""


def supports(hidden_BTD: torch.Tensor, head_dim: int) -> bool:
    """Whether `prompt` takes these inputs.

    Larger heads do not fit into registers. Products over fewer than 64 features in bfloat16 came out wrong on an H100.
    """
    D = hidden_BTD.shape[2]
    return head_dim == _HEAD_DIM and hidden_BTD.dtype == torch.bfloat16 and D % _GATE_COLUMNS == 0


@torch.no_grad()
def prompt(
    hidden_BTD: torch.Tensor,
    projection: DeltaProjection,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    token_mask_BT: torch.Tensor | None = None,
    tuning: Tuning = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `dtr.ops.decoding.delta_prompt`; `supports` says for what."""
    hidden = hidden_BTD.contiguous()
    head_rows, gate_rows = split_rows(projection)
    gates = read_gates(hidden, gate_rows, projection, token_mask_BT)
    rows = F.linear(hidden, head_rows)
    maps = map_chunks(rows, gates, projection, cos_BTK, sin_BTK, tuning)
    return scan_chunks(rows, gates, maps, projection, tuning)


def split_rows(projection: DeltaProjection) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, scaled by the norm's, of all that has a value per feature of a head, and of the gates (2 H, D)."""
    weight, first = projection.scaled_weight, projection.num_head_rows
    return weight[:first], weight[first : projection.num_rows]


def read_gates(
    hidden_BTD: torch.Tensor,
    rows_GD: torch.Tensor,
    projection: DeltaProjection,
    token_mask_BT: torch.Tensor | None = None,
) -> Gates:
    """What tokens decide by themselves; `rows_GD` from `split_rows`."""
    (B, T, D), H = hidden_BTD.shape, projection.num_heads
    assert projection.bias is not None, "the gates have biases"
    gates = Gates(
        scale_BT=hidden_BTD.new_empty(B, T, dtype=torch.float32),
        gates_2BHT=hidden_BTD.new_empty(2, B, H, T, dtype=torch.float32),
    )
    mask = hidden_BTD if token_mask_BT is None else token_mask_BT.contiguous()
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(hidden_BTD):
        token_gates[(triton.cdiv(T, _GATE_TOKENS), B)](
            hidden_BTD, rows_GD, projection.bias[projection.num_head_rows :], mask, gates.scale_BT, gates.gates_2BHT,
            projection.norm.eps, T, D=D, H=H, BG=max(16, triton.next_power_of_2(2 * H)), BT=_GATE_TOKENS,
            BD=min(D, _GATE_COLUMNS), HAS_MASK=token_mask_BT is not None, num_warps=4,
        )  # fmt: skip
    return gates


def map_chunks(
    rows_BTC: torch.Tensor,
    gates: Gates,
    projection: DeltaProjection,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    tuning: Tuning = DEFAULT,
) -> list[torch.Tensor]:
    """What each chunk makes of the state before it: P, N, X, Y (B H, N, ...) and the decay over it (B H, N)."""
    B, T, K, H = *rows_BTC.shape[:2], projection.head_dim, projection.num_heads
    N, C, norms = triton.cdiv(T, _CHUNK_TOKENS), _CHUNK_TOKENS, projection.norms
    maps = [rows_BTC.new_empty(B * H, N, *size) for size in ((K, K), (K, K), (C, K), (C, K))]
    maps.append(rows_BTC.new_empty(B * H, N, dtype=torch.float32))
    cos, sin = cos_BTK.contiguous(), sin_BTK.contiguous()
    eps, q_norm, k_norm = (0.0, rows_BTC, rows_BTC) if norms is None else (norms.eps, norms.query, norms.key)
    with torch.cuda.device_of(rows_BTC):
        chunk_maps[(B * H, N)](
            rows_BTC, projection.bias, gates.scale_BT, gates.gates_2BHT, cos, sin, q_norm, k_norm, eps, *maps, T,
            cos.stride(0) if len(cos) > 1 else 0, H=H, K=K, HAS_NORM=norms is not None,
            HAS_BIAS=projection.has_head_bias, QUADRATIC=projection.quadratic, num_warps=4,
            maxnreg=tuning.map_registers,
        )  # fmt: skip
    return maps


def scan_chunks(
    rows_BTC: torch.Tensor,
    gates: Gates,
    maps: list[torch.Tensor],
    projection: DeltaProjection,
    tuning: Tuning = DEFAULT,
    packed: PackedStates | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated outputs (B, T, H K) and the last state (B, H, K, K) in float32, from a state of zeros.

    With `packed`, B is 1 and the tokens are those of several sequences, whose last states (P, H, K, K) are given.
    """
    (B, T), H, (_, N, K, _) = rows_BTC.shape[:2], projection.num_heads, maps[0].shape
    out = rows_BTC.new_empty(B, T, H * K)
    cut = packed.segments if packed is not None else None
    if cut is None:
        cut = Segments.of_chunks(N, tuning.segments or _num_segments(B * H, N, tuning.full))
    columns, bounds = min(K, tuning.scan_columns), cut.bounds

    def scan(initial: torch.Tensor | None, last: torch.Tensor) -> None:
        prompt_scan[(last.shape[-1] // columns, B * H, cut.num_segments)](
            rows_BTC, projection.bias, gates.scale_BT, *maps, last if initial is None else initial, last, out,
            bounds, T, N, cut.length_chunks, H=H, K=K, BV=columns, HAS_INITIAL=initial is not None,
            AFFINE=last.shape[-1] > K, QUADRATIC=projection.quadratic, HAS_BOUNDS=bounds is not None,
            num_warps=tuning.scan_warps, num_stages=tuning.scan_stages,
        )  # fmt: skip

    with torch.cuda.device_of(rows_BTC):
        last = scan_segments(scan, cut, rows_BTC.new_empty(B * H, K, K, dtype=torch.float32), packed)
    return out, last.reshape(-1, H, K, K)


def _num_segments(num_sequences: int, num_chunks: int, full: int) -> int:
    return max(1, min(_MAX_SEGMENTS, full // num_sequences, num_chunks // _MIN_SEGMENT_CHUNKS))
