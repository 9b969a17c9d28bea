"""Triton kernels for decoding and prefill; `decoding.py` says what each computes and holds the plain forms.

All arithmetic is float32 on inputs of any type, rounded once at the end. One program handles one head of one token.
`attend_triton.py` has the attention.

Shapes: B sequences, T tokens, S slots, H query heads, G key/value heads, K head dim, V value dim, R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dtr.ops.quadratic_features import EPS

if TYPE_CHECKING:
    from dtr.ops.decoding import SharedStates
    from dtr.ops.projections import HeadNorms

QUADRATIC_EPS = tl.constexpr(EPS)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) without overflow; as torch, x itself above 20."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _rotated_head(
    x_ptr, cos_ptr, sin_ptr, norm_ptr, eps, K: tl.constexpr, HAS_NORM: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """One head (K,) in float32: quadratic features with the mix MIX elements on, RMS norm, both if asked; rotated."""
    i = tl.arange(0, K)
    partner = (i + K // 2) % K
    x, other = tl.load(x_ptr + i).to(tl.float32), tl.load(x_ptr + partner).to(tl.float32)
    if MIX:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + QUADRATIC_EPS)
        x *= inverse * (1.0 + inverse * tl.load(x_ptr + MIX + i).to(tl.float32))
        other *= inverse * (1.0 + inverse * tl.load(x_ptr + MIX + partner).to(tl.float32))
    if HAS_NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + eps)
        x *= inverse * tl.load(norm_ptr + i).to(tl.float32)
        other *= inverse * tl.load(norm_ptr + partner).to(tl.float32)
    cos, sin = tl.load(cos_ptr + i).to(tl.float32), tl.load(sin_ptr + i).to(tl.float32)
    return x * cos + tl.where(i < K // 2, -other, other) * sin


@triton.jit
def _unit(x):
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, axis=0)), 1e-12)


@triton.jit
def _delta_step(
    rows_ptr, cos_ptr, sin_ptr, state_ptr, slot_ptr, new_ptr, position_ptr, out_ptr, q_norm_ptr, k_norm_ptr, eps,
    rows_stride, state_stride, H: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, HAS_NORM: tl.constexpr,
    QUADRATIC: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Grid (B H, K / BV): read and write BV columns of one head's state once.

    SHARED: the state is that of a slot, angles those of a position, and a new sequence's state is taken for zero.
    """
    b, h, first = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H, tl.program_id(1) * BV
    row = rows_ptr + b * rows_stride
    width: tl.constexpr = H * K
    # Mixes of q and k follow the output gate.
    mix: tl.constexpr = 4 * width if QUADRATIC else 0
    gates: tl.constexpr = 6 * width if QUADRATIC else 4 * width
    slot, position = b, b
    if SHARED:
        slot, position = tl.load(slot_ptr + b).to(tl.int64), tl.load(position_ptr + b).to(tl.int64)
    cos_ptr += position * K
    sin_ptr += position * K
    q = _unit(_rotated_head(row + h * K, cos_ptr, sin_ptr, q_norm_ptr, eps, K, HAS_NORM, mix))
    k = _unit(_rotated_head(row + width + h * K, cos_ptr, sin_ptr, k_norm_ptr, eps, K, HAS_NORM, mix))
    j = first + tl.arange(0, BV)
    v = tl.load(row + 2 * width + h * K + j).to(tl.float32)
    gate = 2.0 * _sigmoid(tl.load(row + 3 * width + h * K + j).to(tl.float32))
    decay = tl.exp(-_softplus(tl.load(row + gates + h).to(tl.float32)))
    write = _sigmoid(tl.load(row + gates + H + h).to(tl.float32))

    tile = state_ptr + slot * state_stride + h * K * K + tl.arange(0, K)[:, None] * K + j[None, :]
    if SHARED:
        # Not multiplied: what an earlier sequence left there may be infinite.
        goes_on = tl.load(new_ptr + b).to(tl.int32) == 0
        state = tl.where(goes_on, tl.load(tile), 0.0) * decay
    else:
        state = tl.load(tile) * decay
    # Both sums over the state as it came in, so that neither waits for the other: q (S + k w^T) = q S + (q k) w^T.
    read, out = tl.sum(k[:, None] * state, axis=0), tl.sum(q[:, None] * state, axis=0)
    written = write * (v - read)
    tl.store(tile, state + k[:, None] * written[None, :])
    out = gate * (out + tl.sum(q * k, axis=0) * written)
    tl.store(out_ptr + b * width + h * K + j, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _rotate_and_store(
    rows_ptr, cos_ptr, sin_ptr, q_ptr, keys_ptr, values_ptr, slot_ptr, q_norm_ptr, k_norm_ptr, eps, rows_stride, S,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Grid (B, H + 2 G): one head of queries, keys or values."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr = rows_ptr + b * rows_stride + head * K
    i = tl.arange(0, K)
    slot = tl.load(slot_ptr)
    cos_ptr += b * K
    sin_ptr += b * K
    if head < H:
        q = _rotated_head(x_ptr, cos_ptr, sin_ptr, q_norm_ptr, eps, K, HAS_NORM, 0)
        tl.store(q_ptr + (b * H + head) * K + i, q.to(q_ptr.dtype.element_ty))
    elif head < H + G:
        k = _rotated_head(x_ptr, cos_ptr, sin_ptr, k_norm_ptr, eps, K, HAS_NORM, 0)
        tl.store(keys_ptr + ((b * G + head - H) * S + slot) * K + i, k.to(keys_ptr.dtype.element_ty))
    else:
        tl.store(values_ptr + ((b * G + head - H - G) * S + slot) * K + i, tl.load(x_ptr + i))


@triton.jit(do_not_specialize=["num_rows", "T"])
def _rotate_heads(
    x_ptr, mix_ptr, cos_ptr, sin_ptr, norm_ptr, out_ptr, eps, num_rows, T, x_stride, mix_batch_stride,
    mix_token_stride, mix_head_stride, cos_batch_stride, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_NORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (R / BLOCK): heads (B T H, K), tokens `x_stride` apart; cos and sin are (B or 1, T, K).

    HAS_MIX: quadratic features with these mixes (B, T, H, K) come first.
    """
    r, i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K)
    partner = (i + K // 2) % K
    valid = (r < num_rows)[:, None]
    token = r // H
    at = token.to(tl.int64)[:, None] * x_stride + (r % H)[:, None] * K
    x = tl.load(x_ptr + at + i[None, :], mask=valid, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + at + partner[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_MIX:
        mix_ptr += ((token // T).to(tl.int64) * mix_batch_stride + (token % T).to(tl.int64) * mix_token_stride)[:, None]
        mix_ptr += ((r % H).to(tl.int64) * mix_head_stride)[:, None]
        inverse = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / K + QUADRATIC_EPS))[:, None]
        x *= inverse * (1.0 + inverse * tl.load(mix_ptr + i[None, :], mask=valid, other=0.0).to(tl.float32))
        mix = tl.load(mix_ptr + partner[None, :], mask=valid, other=0.0).to(tl.float32)
        other *= inverse * (1.0 + inverse * mix)
    if HAS_NORM:
        inverse = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / K + eps))[:, None]
        x *= inverse * tl.load(norm_ptr + i).to(tl.float32)[None, :]
        other *= inverse * tl.load(norm_ptr + partner).to(tl.float32)[None, :]
    angle = ((token // T).to(tl.int64) * cos_batch_stride + (token % T) * K)[:, None] + i[None, :]
    cos = tl.load(cos_ptr + angle, mask=valid, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=valid, other=0.0).to(tl.float32)
    x = x * cos + tl.where(i < K // 2, -1.0, 1.0)[None, :] * other * sin
    if UNIT:
        x /= tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)[:, None]
    tl.store(out_ptr + r.to(tl.int64)[:, None] * K + i[None, :], x.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def _delta_gates(
    rows_ptr, mask_ptr, decay_ptr, strength_ptr, stride, num_tokens, H: tl.constexpr, BH: tl.constexpr,
    BT: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / BT): rows of H logits of decays and H of write strengths, tokens `stride` apart; BH >= H."""
    t, h = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BH)
    seen = (t < num_tokens)[:, None] & (h < H)[None, :]
    at = rows_ptr + t.to(tl.int64)[:, None] * stride + h[None, :]
    decay = -_softplus(tl.load(at, mask=seen, other=0.0).to(tl.float32))
    strength = _sigmoid(tl.load(at + H, mask=seen, other=0.0).to(tl.float32))
    if HAS_MASK:
        is_text = (tl.load(mask_ptr + t, mask=t < num_tokens, other=0) > 0)[:, None]
        decay, strength = tl.where(is_text, decay, 0.0), tl.where(is_text, strength, 0.0)
    out = t.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(decay_ptr + out, decay, mask=seen)
    tl.store(strength_ptr + out, strength, mask=seen)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_product(
    gate_ptr, x_ptr, out_ptr, gate_stride, x_stride, num_rows, C, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (R, C / BLOCK)."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + c, mask=c < C, other=0.0).to(tl.float32)
    opened = _sigmoid(gate)
    if SILU:
        opened *= gate
    else:
        opened *= 2.0
    tl.store(out_ptr + row * C + c, (opened * x).to(out_ptr.dtype.element_ty), mask=c < C)


def delta_step(
    rows: torch.Tensor,
    cos_BK: torch.Tensor,
    sin_BK: torch.Tensor,
    state_BHKV: torch.Tensor,
    norms: HeadNorms | None,
    quadratic: bool,
    shared: SharedStates | None = None,
) -> torch.Tensor:
    B, (_, H, K, _) = len(rows), state_BHKV.shape
    assert state_BHKV.stride()[1:] == (K * K, K, 1), "the state is changed in place"
    assert rows.stride(1) == 1, "a row's projections lie side by side"
    out = rows.new_empty(B, H * K)
    # Without slots nothing is read there.
    places = (rows, rows, rows)
    if shared is not None:
        places = (shared.slot_B, shared.is_new_B.view(torch.uint8), shared.position_B)
    # The fewer sequences there are to fill the GPU, the finer the split.
    BV = K if B * H >= 1024 else max(16, K // 4)
    q_norm, k_norm, eps = _norm_arguments(norms, rows)
    with torch.cuda.device_of(rows):
        _delta_step[(B * H, K // BV)](
            rows, cos_BK.contiguous(), sin_BK.contiguous(), state_BHKV, *places, out, q_norm, k_norm, eps,
            rows.stride(0), state_BHKV.stride(0), H=H, K=K, BV=BV, HAS_NORM=norms is not None, QUADRATIC=quadratic,
            SHARED=shared is not None, num_warps=4,
        )  # fmt: skip
    return out


def rotate_and_store(
    rows: torch.Tensor,
    cos_BK: torch.Tensor,
    sin_BK: torch.Tensor,
    keys_BGSK: torch.Tensor,
    values_BGSK: torch.Tensor,
    slot: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    B, G, S, K = keys_BGSK.shape
    assert keys_BGSK.is_contiguous(), "the cache is changed in place"
    assert values_BGSK.is_contiguous(), "the cache is changed in place"
    assert rows.stride(1) == 1, "a row's projections lie side by side"
    H = rows.shape[1] // K - 2 * G
    q = rows.new_empty(B, H, K)
    q_norm, k_norm, eps = _norm_arguments(norms, rows)
    with torch.cuda.device_of(rows):
        _rotate_and_store[(B, H + 2 * G)](
            rows, cos_BK.contiguous(), sin_BK.contiguous(), q, keys_BGSK, values_BGSK, slot, q_norm, k_norm, eps,
            rows.stride(0), S, H=H, G=G, K=K, HAS_NORM=norms is not None, num_warps=1,
        )  # fmt: skip
    return q


def rotate_heads(
    x_BTHK: torch.Tensor,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    unit_length: bool,
    mix_BTHK: torch.Tensor | None = None,
) -> torch.Tensor:
    B, T, H, K = x_BTHK.shape
    mix = x_BTHK if mix_BTHK is None else mix_BTHK
    assert mix.stride(3) == 1, "features lie side by side"
    # Heads may be a part of wider rows.
    is_row = x_BTHK.stride(3) == 1 and x_BTHK.stride(2) == K and (B == 1 or x_BTHK.stride(0) == T * x_BTHK.stride(1))
    x = x_BTHK if is_row else x_BTHK.contiguous()
    cos, sin = cos_BTK.contiguous(), sin_BTK.contiguous()
    out = x.new_empty(x.shape)
    num_rows = x.numel() // K
    block = max(1, 4096 // K)
    with torch.cuda.device_of(x):
        _rotate_heads[(triton.cdiv(num_rows, block),)](
            x, mix, cos, sin, x if norm_weight is None else norm_weight, out, eps, num_rows, T, x.stride(1),
            *mix.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, H=H, K=K, BLOCK=block,
            HAS_MIX=mix_BTHK is not None, HAS_NORM=norm_weight is not None, UNIT=unit_length, num_warps=4,
        )  # fmt: skip
    return out


def delta_gates(rows_BTG: torch.Tensor, token_mask_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, num_gates = rows_BTG.shape
    rows = rows_BTG.contiguous()
    mask = rows if token_mask_BT is None else token_mask_BT.contiguous()
    log_decay, strength = (rows.new_empty(B, T, num_gates // 2, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(rows):
        _delta_gates[(triton.cdiv(B * T, 64),)](
            rows, mask, log_decay, strength, num_gates, B * T, H=num_gates // 2,
            BH=triton.next_power_of_2(num_gates // 2), BT=64, HAS_MASK=token_mask_BT is not None, num_warps=4,
        )  # fmt: skip
    return log_decay, strength


def gated_product(gate: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    assert gate.stride(1) == x.stride(1) == 1, "rows may be strided, columns not"
    R, C = x.shape
    out = x.new_empty(R, C)
    block = min(1024, triton.next_power_of_2(C))
    with torch.cuda.device_of(x):
        _gated_product[(R, triton.cdiv(C, block))](
            gate, x, out, gate.stride(0), x.stride(0), R, C, BLOCK=block, SILU=activation == "silu", num_warps=4
        )
    return out


def _norm_arguments(norms: HeadNorms | None, otherwise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    return (otherwise, otherwise, 0.0) if norms is None else (norms.query, norms.key, norms.eps)
