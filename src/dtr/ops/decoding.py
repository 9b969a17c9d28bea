"""What one decoding step and a prefill do between the matrix products, each with a plain PyTorch form and a kernel.

The kernels (`decoding_triton.py`, `attend_triton.py` and, for prompts, others) run on CUDA. The plain forms are what
they are tested against, and run elsewhere. A step takes one token per sequence. It changes states, keys and values in
place, at addresses that stay the same, so that it can be recorded as a CUDA graph.

Shapes: B sequences, T tokens of a prompt, S slots of a key/value cache, H query heads, G key/value heads, K head dim,
V value dim (= K), R rows.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from dtr.ops.dispatch import gated_delta_rule
from dtr.ops.gated_delta import step as gated_delta_step
from dtr.ops.projections import DeltaProjection, GatedProjection, HeadNorms
from dtr.ops.quadratic_features import quadratic_features
from dtr.ops.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class SharedStates:
    """Where the sequences of a step have their states in a cache that holds those of others too."""

    slot_B: torch.Tensor
    """int64, each sequence's place in the cache."""
    is_new_B: torch.Tensor
    """bool, whether the sequence starts here, so that what its slot holds counts for nothing."""
    position_B: torch.Tensor
    """int64, each token's place in its sequence."""


def delta_step(
    rows: torch.Tensor,
    cos_BK: torch.Tensor,
    sin_BK: torch.Tensor,
    state_BHKV: torch.Tensor,
    norms: HeadNorms | None = None,
    *,
    quadratic: bool = False,
    shared: SharedStates | None = None,
) -> torch.Tensor:
    """One token of a `GatedDeltaNet` layer between its input projections and its output projection.

    Args:
        rows: (B, 4 H K + 2 H), the projections side by side: q, k, v, output gate, decay, write strength; with
            `quadratic` the mixes of q and k (H K each) lie before the decay.
        cos_BK: cosines of each sequence's position, first half equal to the second; `sin_BK` likewise.
        state_BHKV: float32; replaced in place.
        norms: norms of queries and keys, where the family has them.
        quadratic: whether queries and keys have quadratic features.
        shared: of a cache with slots for more sequences; cosines and sines are then those of all positions.

    Returns:
        (B, H K), the gated heads, in the type of `rows`.
    """
    if kernels := _kernels(rows):
        return kernels.delta_step(rows, cos_BK, sin_BK, state_BHKV, norms, quadratic, shared)
    if shared is not None:
        cos_BK, sin_BK = cos_BK[shared.position_B], sin_BK[shared.position_B]
        own = state_BHKV[shared.slot_B].masked_fill(shared.is_new_B[:, None, None, None], 0.0)
        out = delta_step(rows, cos_BK, sin_BK, own, norms, quadratic=quadratic)
        state_BHKV[shared.slot_B] = own
        return out
    batch, heads, dim, _ = state_BHKV.shape
    wide, narrow = rows.float().split([rows.shape[1] - 2 * heads, 2 * heads], dim=1)
    q, k, v, gate, *mixes = wide.view(batch, -1, heads, dim).unbind(1)
    decay, write = narrow.chunk(2, dim=1)
    if quadratic:
        q, k = (quadratic_features(x, mix) for x, mix in zip((q, k), mixes))
    q, k = _rotated(q, k, cos_BK, sin_BK, norms)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out, state = gated_delta_step(q, k, v, -F.softplus(decay), torch.sigmoid(write), state_BHKV, scale=1.0)
    state_BHKV.copy_(state)
    return (2 * torch.sigmoid(gate) * out).flatten(1).to(rows.dtype)


def rotate_and_store(
    rows: torch.Tensor,
    cos_BK: torch.Tensor,
    sin_BK: torch.Tensor,
    keys_BGSK: torch.Tensor,
    values_BGSK: torch.Tensor,
    slot: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Rotate one token's queries and keys, and put its keys and values into the cache.

    Args:
        rows: (B, (H + 2 G) K), the projections side by side: q, k, v.
        cos_BK: cosines of each sequence's position; `sin_BK` likewise.
        keys_BGSK: keys so far; slot `slot` is written in place, as in `values_BGSK`.
        slot: int32 scalar on the device.
        norms: norms of queries and keys, where the family has them.

    Returns:
        (B, H, K), the queries.
    """
    if kernels := _kernels(rows):
        return kernels.rotate_and_store(rows, cos_BK, sin_BK, keys_BGSK, values_BGSK, slot, norms)
    batch, groups, _, dim = keys_BGSK.shape
    q, k, v = rows.split([rows.shape[1] - 2 * groups * dim, groups * dim, groups * dim], dim=1)
    q, k, v = (x.reshape(batch, -1, dim) for x in (q, k, v))
    q, k = _rotated(q.float(), k.float(), cos_BK, sin_BK, norms)
    for cache, new in ((keys_BGSK, k), (values_BGSK, v)):
        cache.index_copy_(2, slot.long().view(1), new.to(cache.dtype).unsqueeze(2))
    return q.to(rows.dtype)


def attend(
    q_BHK: torch.Tensor,
    keys_BGSK: torch.Tensor,
    values_BGSK: torch.Tensor,
    first_B: torch.Tensor,
    last: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of one token to the slots `first_B` to `last`, both included; head h reads group h // (H / G).

    Args:
        q_BHK: queries.
        keys_BGSK: keys; slots outside the range are not read. `values_BGSK` likewise.
        first_B: int32, each sequence's first slot that is no padding.
        last: int32 scalar on the device, the slot of the current token.
        scale: factor of the scores.

    Returns:
        (B, H, K) in the type of the queries.
    """
    if kernels := _kernels(q_BHK, "attend_triton"):
        return kernels.attend(q_BHK, keys_BGSK, values_BGSK, first_B, last, scale=scale)
    times = q_BHK.shape[1] // keys_BGSK.shape[1]
    keys, values = (x.repeat_interleave(times, dim=1).float() for x in (keys_BGSK, values_BGSK))
    scores = scale * (keys @ q_BHK.float().unsqueeze(-1)).squeeze(-1)
    slots = torch.arange(keys.shape[2], device=keys.device)
    seen = (slots >= first_B[:, None]) & (slots <= last)
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    # A slot that was never written may hold anything, and 0 times infinity is not 0.
    values = values.masked_fill(~seen[:, None, :, None], 0.0)
    return (weights.unsqueeze(-2) @ values).squeeze(-2).to(q_BHK.dtype)


def rotate_heads(
    x_BTHK: torch.Tensor,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    unit_length: bool = False,
    mix_BTHK: torch.Tensor | None = None,
) -> torch.Tensor:
    """A prompt's queries or keys: quadratic features with `mix_BTHK`, the family's norm if any, rotary positions, unit
    length if asked. No gradients."""
    if kernels := _kernels(x_BTHK):
        return kernels.rotate_heads(x_BTHK, cos_BTK, sin_BTK, norm_weight, eps, unit_length, mix_BTHK)
    x = (x_BTHK if mix_BTHK is None else quadratic_features(x_BTHK, mix_BTHK)).float()
    if norm_weight is not None:
        x = F.rms_norm(x, x.shape[-1:], norm_weight.float(), eps)
    x = rotate(x, cos_BTK.float(), sin_BTK.float())
    return (F.normalize(x, dim=-1) if unit_length else x).to(x_BTHK.dtype)


def delta_prompt(
    hidden_BTD: torch.Tensor,
    projection: DeltaProjection,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    token_mask_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt through a `GatedDeltaNet` layer, norm included, as far as its output projection.

    Args:
        hidden_BTD: hidden states before the norm.
        projection: the norm and the layer's input projections.
        cos_BTK: cosines of each token's position, (B or 1, T, K); `sin_BTK` likewise.
        token_mask_BT: 0 where a token is padding, which leaves the state as it is.

    Returns:
        The gated heads (B, T, H K) in the type of the hidden states, and the last state (B, H, K, V) in float32.
    """
    kernels = _kernels(hidden_BTD, "delta_prompt_triton")
    if kernels and kernels.supports(hidden_BTD, projection.head_dim):
        return kernels.prompt(hidden_BTD, projection, cos_BTK, sin_BTK, token_mask_BT=token_mask_BT)
    return delta_prompt_in_parts(hidden_BTD, projection, cos_BTK, sin_BTK, token_mask_BT=token_mask_BT)


def delta_prompt_in_parts(
    hidden_BTD: torch.Tensor,
    projection: DeltaProjection,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    token_mask_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `delta_prompt`, one operation after the other, each by its kernel where there is one."""
    t = delta_tokens(projection.norm(hidden_BTD), projection, cos_BTK, sin_BTK, token_mask_BT)
    rows = (t.q_BTHK, t.k_BTHK, t.v_BTHK, t.log_decay_BTH, t.strength_BTH)
    if kernels := _kernels(t.q_BTHK, "gated_delta_prefill"):
        out, state = kernels.prefill(*rows, scale=1.0)
    else:
        out, state = gated_delta_rule(*rows, scale=1.0, backend=projection.backend)
    out = gated_product(t.gate_BTC.flatten(0, 1), out.flatten(0, 1).flatten(1), activation="identity_gate")
    return out.view(t.gate_BTC.shape), state


@dataclass(frozen=True, kw_only=True)
class DeltaTokens:
    """What each token of a `GatedDeltaNet` layer has by itself."""

    q_BTHK: torch.Tensor
    """Rotated and of unit length, as `k_BTHK`."""
    k_BTHK: torch.Tensor
    v_BTHK: torch.Tensor
    gate_BTC: torch.Tensor
    """Of the output, before the sigmoid; C = H K."""
    log_decay_BTH: torch.Tensor
    """float32, as `strength_BTH`; both 0 where a token is padding, which leaves the state as it is."""
    strength_BTH: torch.Tensor


def delta_tokens(
    hidden_BTD: torch.Tensor,
    projection: DeltaProjection,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    token_mask_BT: torch.Tensor | None = None,
) -> DeltaTokens:
    """Project hidden states, whose norm has run, and make of the rows what the recurrence takes."""
    num_heads, dim, norms = projection.num_heads, projection.head_dim, projection.norms
    width, gates = num_heads * dim, slice(projection.num_head_rows, projection.num_rows)
    num_wide = 4 * width if projection.mixes is not None else projection.num_head_rows
    weight, bias = projection.weight, projection.bias
    assert bias is not None, "the gates have biases"
    wide = F.linear(hidden_BTD, weight[:num_wide], bias[:num_wide]).split(width, dim=-1)
    log_decay, strength = delta_gates(F.linear(hidden_BTD, weight[gates], bias[gates]), token_mask_BT)
    q, k, v, _, *mixes = (x.unflatten(-1, (num_heads, dim)) for x in wide)
    if projection.mixes is not None:
        mixes = [(x.transpose(1, 2) @ own.mT).transpose(1, 2) for x, own in zip((q, k), projection.mixes)]
    eps = 0.0 if norms is None else norms.eps
    weights = (None, None) if norms is None else (norms.query, norms.key)
    q, k = (
        rotate_heads(x, cos_BTK, sin_BTK, norm_weight=own, eps=eps, unit_length=True, mix_BTHK=mix)
        for x, own, mix in zip((q, k), weights, mixes or (None, None))
    )
    return DeltaTokens(
        q_BTHK=q,
        k_BTHK=k,
        v_BTHK=v,
        gate_BTC=wide[3],
        log_decay_BTH=log_decay,
        strength_BTH=strength,
    )


def delta_gates(rows_BTG: torch.Tensor, token_mask_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decays and write strengths (B, T, H), float32, of rows with the logits of both; both 0 for padding."""
    if kernels := _kernels(rows_BTG):
        return kernels.delta_gates(rows_BTG, token_mask_BT)
    decay, write = rows_BTG.float().chunk(2, dim=-1)
    log_decay, strength = -F.softplus(decay), torch.sigmoid(write)
    if token_mask_BT is not None:
        log_decay, strength = (x * token_mask_BT[..., None] for x in (log_decay, strength))
    return log_decay, strength


def gated_product(gate: torch.Tensor, x: torch.Tensor, *, activation: str) -> torch.Tensor:
    """`silu(gate) * x` or `2 sigmoid(gate) * x` ("identity_gate"), rounded once; (R, C) each, rows may be strided."""
    assert activation in ("silu", "identity_gate"), activation
    if kernels := _kernels(x):
        return kernels.gated_product(gate, x, activation)
    opened = F.silu(gate.float()) if activation == "silu" else 2 * torch.sigmoid(gate.float())
    return (opened * x.float()).to(x.dtype)


def gated_pair(x_RD: torch.Tensor, projection: GatedProjection) -> torch.Tensor:
    """`silu(gate) * up` (R, C) of the norm of x."""
    norm, weight, bias = projection.norm, projection.weight, projection.bias
    kernels = _kernels(x_RD, "mlp_triton")
    if kernels and kernels.supports(x_RD, weight, bias):
        if streaming := kernels.streaming(x_RD, weight):
            return streaming.gated_pair(x_RD, projection.streamed_rows, norm.eps)
        return kernels.gated_pair(x_RD, projection.scaled_weight, norm.eps)
    gate, up = F.linear(norm(x_RD), weight, bias).chunk(2, dim=-1)
    return gated_product(gate, up, activation="silu")


def add_linear(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`hidden += x @ weight^T + bias` in place and rounded once; both contiguous, (..., D) and (..., C)."""
    total = hidden.view(-1, hidden.shape[-1])
    total.addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    if bias is not None:
        total += bias


def _rotated(
    q_BHK: torch.Tensor, k_BGK: torch.Tensor, cos_BK: torch.Tensor, sin_BK: torch.Tensor, norms: HeadNorms | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if norms is not None:
        q_BHK = F.rms_norm(q_BHK, q_BHK.shape[-1:], norms.query.float(), norms.eps)
        k_BGK = F.rms_norm(k_BGK, k_BGK.shape[-1:], norms.key.float(), norms.eps)
    cos, sin = cos_BK.float()[:, None], sin_BK.float()[:, None]
    q, k = (rotate(x.unsqueeze(1), cos, sin).squeeze(1) for x in (q_BHK, k_BGK))
    return q, k


def _kernels(x: torch.Tensor, module: str = "decoding_triton") -> Any:
    """The module with the kernels where they can run on `x`, else None."""
    if x.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"dtr.ops.gpu.{module}")
