"""Triton kernels for the attention of one token; `decoding.attend` says what they compute and holds the plain form.

One program handles one key/value head of one sequence and a part of its slots, as in Flash-Decoding (Dao et al. 2023):
parts leave their running maximum, sum and weighted values, which a second kernel merges. All query heads of a group
share the keys that were read. All arithmetic is float32, rounded once at the end.

Shapes: B sequences, S slots, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SLOTS = 64
"""Slots of the cache that a program reads at once."""
_MIN_ROWS = 16
"""Fewest rows that tensor cores multiply; groups of fewer query heads are padded."""
_MAX_PARTS = 64


@triton.jit
def _attend_part(
    q_ptr, keys_ptr, values_ptr, first_ptr, last_ptr, out_ptr, top_ptr, sum_ptr, scale, S, H: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid (B G, parts): all query heads of one group over one part of the slots. WHOLE: there is one part only."""
    times: tl.constexpr = H // G
    bg, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b = (bg // G).to(tl.int64)
    first, last = tl.load(first_ptr + b), tl.load(last_ptr)
    length = tl.cdiv(tl.cdiv(last + 1, num_parts), SLOTS) * SLOTS
    begin, end = part * length, tl.minimum((part + 1) * length, last + 1)
    begin = tl.maximum(begin, first // SLOTS * SLOTS)

    r, i, s = tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, SLOTS)
    heads = bg.to(tl.int64) * times + r
    q = tl.load(q_ptr + heads[:, None] * K + i[None, :], mask=(r < times)[:, None], other=0.0)
    top = tl.full([ROWS], -1.0e30, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    out = tl.zeros([ROWS, K], dtype=tl.float32)
    corner = bg.to(tl.int64) * S * K
    for start in range(begin, end, SLOTS):
        slots = start + s
        seen = (slots >= first) & (slots < end)
        at = corner + slots.to(tl.int64)[:, None] * K + i[None, :]
        keys = tl.load(keys_ptr + at, mask=seen[:, None], other=0.0)
        values = tl.load(values_ptr + at, mask=seen[:, None], other=0.0)
        scores = scale * tl.dot(q, tl.trans(keys), input_precision="tf32x3")
        scores = tl.where(seen[None, :], scores, -1.0e30)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp(top - higher)
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="tf32x3")
        top = higher
    keep = (r < times)[:, None]
    if WHOLE:
        tl.store(out_ptr + heads[:, None] * K + i[None, :], (out / total[:, None]).to(q.dtype), mask=keep)
    else:
        place = heads * num_parts + part
        tl.store(top_ptr + place, top, mask=r < times)
        tl.store(sum_ptr + place, total, mask=r < times)
        tl.store(out_ptr + place[:, None] * K + i[None, :], out, mask=keep)


@triton.jit
def _merge_parts(part_ptr, top_ptr, sum_ptr, out_ptr, NUM: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr):
    """Grid (B H): one head's parts, NUM of them, padded to PARTS."""
    head = tl.program_id(0).to(tl.int64)
    p, i = tl.arange(0, PARTS), tl.arange(0, K)
    top = tl.load(top_ptr + head * NUM + p, mask=p < NUM, other=-1.0e30)
    shrink = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(shrink * tl.load(sum_ptr + head * NUM + p, mask=p < NUM, other=0.0), axis=0)
    parts = tl.load(part_ptr + (head * NUM + p)[:, None] * K + i[None, :], mask=(p < NUM)[:, None], other=0.0)
    out = tl.sum(shrink[:, None] * parts, axis=0) / total
    tl.store(out_ptr + head * K + i, out.to(out_ptr.dtype.element_ty))


def attend(
    q_BHK: torch.Tensor,
    keys_BGSK: torch.Tensor,
    values_BGSK: torch.Tensor,
    first_B: torch.Tensor,
    last: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    (B, H, K), (_, G, S, _) = q_BHK.shape, keys_BGSK.shape
    q = q_BHK.contiguous()
    # Parts are fixed when a step is recorded: enough of them to fill the GPU, each with a few blocks of slots.
    parts = max(1, min(_MAX_PARTS, triton.cdiv(16 * _num_processors(q), B * G), triton.cdiv(S, 4 * _SLOTS)))
    out = torch.empty_like(q)
    sizes = {"H": H, "G": G, "K": K, "ROWS": max(_MIN_ROWS, triton.next_power_of_2(H // G)), "SLOTS": _SLOTS}
    with torch.cuda.device_of(q):
        if parts == 1:
            _attend_part[(B * G, 1)](
                q, keys_BGSK, values_BGSK, first_B, last, out, out, out, scale, S, WHOLE=True, num_warps=4,
                num_stages=3, **sizes,
            )  # fmt: skip
            return out
        partial = q.new_empty(B, H, parts, K, dtype=torch.float32)
        top, total = (q.new_empty(B, H, parts, dtype=torch.float32) for _ in range(2))
        _attend_part[(B * G, parts)](
            q, keys_BGSK, values_BGSK, first_B, last, partial, top, total, scale, S, WHOLE=False, num_warps=4,
            num_stages=3, **sizes,
        )  # fmt: skip
        _merge_parts[(B * H,)](partial, top, total, out, NUM=parts, PARTS=triton.next_power_of_2(parts), K=K)
    return out


def _num_processors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
