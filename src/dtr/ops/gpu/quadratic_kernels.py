"""Triton kernels of rotated quadratic features; `quadratic_triton.py` launches them and holds the maths.

Sequences are cut into blocks of 64 tokens, N in all; a program takes one head and every P-th block. A head is kept as
its two halves, which rotation pairs, with the cosines and sines of the first half: both halves have the same in the
layout of the Llama family. Operands of products are whole tiles: in bfloat16 products over fewer than 64 features came
out wrong on an H100. For transposed products see `gated_delta_kernels.py`.

Shapes: B batch, T tokens, H heads, K head dim, BT tokens of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtr.ops.gpu.gated_delta_kernels import _dot, _transposed
from dtr.ops.quadratic_features import EPS
from dtr.ops.rotary import MIN_NORM

_EPS = tl.constexpr(EPS)
_MIN_NORM = tl.constexpr(MIN_NORM)


@triton.jit
def _load_halves(corner, seen, K: tl.constexpr):
    """Both halves (BT, K / 2) in float32 of the heads whose first halves lie at `corner`."""
    first = tl.load(corner, mask=seen, other=0.0).to(tl.float32)
    return first, tl.load(corner + K // 2, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(ptr, step_size, dtype: tl.constexpr):
    return (tl.load(ptr).to(tl.float32) * step_size).to(dtype)


@triton.jit
def _row_sum(first, second):
    return tl.sum(first + second, axis=1)[:, None]


@triton.jit
def _corner(n, T, stride_batch, stride_token, BT: tl.constexpr):
    """Offset of block n's first token. A scalar in 64 bits, so that offsets inside a block can be 32-bit."""
    blocks = tl.cdiv(T, BT)
    return (n // blocks).to(tl.int64) * stride_batch + (n % blocks * BT).to(tl.int64) * stride_token


@triton.jit(do_not_specialize=["N", "T"])
def features_forward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, N, T, x_batch, x_token, x_head, angle_batch, angle_token, step_size,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid (H, P): out (B, T, H, K), contiguous."""
    h, i, f, c = tl.program_id(0).to(tl.int64), tl.arange(0, BT), tl.arange(0, K), tl.arange(0, K // 2)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Loaded transposed: (K in, K / 2 out) for each half of the mix.
    at_weight = weight_ptr + h * (K * K) + c[None, :] * K + f[:, None]
    weight_x = _load_weight(at_weight, step_size, dtype)
    weight_y = _load_weight(at_weight + K * K // 2, step_size, dtype)
    for n in range(tl.program_id(1), N, tl.num_programs(1)):
        seen = (n % tl.cdiv(T, BT) * BT + i < T)[:, None]
        at_x = x_ptr + h * x_head + _corner(n, T, x_batch, x_token, BT) + (i * x_token)[:, None]
        whole = tl.load(at_x + f[None, :], mask=seen, other=0.0)
        x, y = _load_halves(at_x + c[None, :], seen, K)
        at_angle, angle = _corner(n, T, angle_batch, angle_token, BT), (i * angle_token)[:, None] + c[None, :]
        cos = tl.load(cos_ptr + at_angle + angle, mask=seen, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at_angle + angle, mask=seen, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(_row_sum(x * x, y * y) / K + _EPS)
        x *= inverse * (1.0 + inverse * _dot(whole, weight_x))
        y *= inverse * (1.0 + inverse * _dot(whole, weight_y))
        x, y = x * cos - y * sin, y * cos + x * sin
        scale = 1.0 / tl.maximum(tl.sqrt(_row_sum(x * x, y * y)), _MIN_NORM)
        at_out = out_ptr + h * K + _corner(n, T, T * H * K, H * K, BT) + (i * (H * K))[:, None] + c[None, :]
        tl.store(at_out, (x * scale).to(dtype), mask=seen)
        tl.store(at_out + K // 2, (y * scale).to(dtype), mask=seen)


@triton.jit(do_not_specialize=["N", "T"])
def features_backward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, d_out_ptr, dx_ptr, dweight_ptr, N, T, x_batch, x_token, x_head, angle_batch,
    angle_token, step_size, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid (H, P): dx (B, T, H, K), and what each program adds to the gradient of the weight, (P, H, K, K).

    With n one over the root mean square, m the mix and s = n x, features are u = s (1 + n m). Given du: dm = n du s,
    ds = du (1 + n m), dn = ds.x + du.(s m), dx = n ds + A^T dm - (n^3 dn / K) x, dA = dm x^T.
    """
    h, i, f, c = tl.program_id(0).to(tl.int64), tl.arange(0, BT), tl.arange(0, K), tl.arange(0, K // 2)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight_ptr += h * (K * K)
    at_weight = weight_ptr + c[None, :] * K + f[:, None]
    weight_x = _load_weight(at_weight, step_size, dtype)
    weight_y = _load_weight(at_weight + K * K // 2, step_size, dtype)
    at_weight = weight_ptr + f[:, None] * K + c[None, :]
    back_x = _load_weight(at_weight, step_size, dtype)
    back_y = _load_weight(at_weight + K // 2, step_size, dtype)
    # On its side, so that it is x^T, which is loaded, that is transposed and not dm.
    dweight = tl.zeros([K, K], dtype=tl.float32)
    for n in range(tl.program_id(1), N, tl.num_programs(1)):
        valid = n % tl.cdiv(T, BT) * BT + i < T
        seen = valid[:, None]
        at_x = x_ptr + h * x_head + _corner(n, T, x_batch, x_token, BT) + (i * x_token)[:, None]
        at_whole = at_x + f[None, :]
        whole = tl.load(at_whole, mask=seen, other=0.0)
        x, y = _load_halves(at_x + c[None, :], seen, K)
        at_angle, angle = _corner(n, T, angle_batch, angle_token, BT), (i * angle_token)[:, None] + c[None, :]
        cos = tl.load(cos_ptr + at_angle + angle, mask=seen, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at_angle + angle, mask=seen, other=0.0).to(tl.float32)
        at_out, out = h * K + _corner(n, T, T * H * K, H * K, BT), (i * (H * K))[:, None] + c[None, :]
        dx, dy = _load_halves(d_out_ptr + at_out + out, seen, K)

        inverse = 1.0 / tl.sqrt(_row_sum(x * x, y * y) / K + _EPS)
        mix_x, mix_y = _dot(whole, weight_x), _dot(whole, weight_y)
        plus_x, plus_y = 1.0 + inverse * mix_x, 1.0 + inverse * mix_y
        feature_x, feature_y = inverse * x * plus_x, inverse * y * plus_y
        # Rotation keeps lengths only if cos^2 + sin^2 = 1, which scaled variants of the angles do not have.
        out_x, out_y = feature_x * cos - feature_y * sin, feature_y * cos + feature_x * sin
        scale = 1.0 / tl.maximum(tl.sqrt(_row_sum(out_x * out_x, out_y * out_y)), _MIN_NORM)
        along = _row_sum(out_x * dx, out_y * dy) * scale * scale
        dx, dy = (dx - out_x * along) * scale, (dy - out_y * along) * scale
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin

        dmix_x, dmix_y = inverse * inverse * dx * x, inverse * inverse * dy * y
        dx, dy = dx * plus_x, dy * plus_y
        # dn, where du.(s m) is that of dm and m over n.
        slope = _row_sum(dx * x, dy * y) + _row_sum(dmix_x * mix_x, dmix_y * mix_y) / inverse
        slope *= inverse * inverse * inverse / K
        dmix = tl.reshape(tl.permute(tl.join(dmix_x, dmix_y), (0, 2, 1)), [BT, K]).to(dtype)
        dweight += _dot(_transposed(whole, at_whole, valid), dmix)
        dx = inverse * dx - slope * x + _dot(dmix, back_x)
        dy = inverse * dy - slope * y + _dot(dmix, back_y)
        tl.store(dx_ptr + at_out + out, dx.to(dtype), mask=seen)
        tl.store(dx_ptr + at_out + out + K // 2, dy.to(dtype), mask=seen)
    at_dweight = dweight_ptr + (tl.program_id(1) * H + h) * (K * K) + f[None, :] * K + f[:, None]
    tl.store(at_dweight, dweight * step_size)
