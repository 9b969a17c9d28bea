"""How one layer mixes tokens while decoding and over a prompt, with its share of the cache at fixed addresses.

A teacher's attention, a `GatedDeltaNet` by fused kernels, and any other mixer through its own forward.

Shapes: B sequences, T tokens of a prompt, S slots, D hidden dim, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.hybrid.cache import RecurrentStateLayer
from dtr.inference.weights import stacked
from dtr.mixers.base import Mixer
from dtr.mixers.gated_deltanet import GatedDeltaNet
from dtr.ops import decoding
from dtr.ops.projections import DeltaProjection, HeadNorms, Norm

_ALIGNED_COLUMNS = 64
Attend = Callable[..., torch.Tensor]
"""`dtr.ops.decoding.attend`, or another function with its arguments."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What all layers need to know of a prompt."""

    rotary: tuple[torch.Tensor, torch.Tensor]
    """cos and sin, (B or 1, T, K) each."""
    token_mask_BT: torch.Tensor | None
    """0 where a token is padding; None where none is."""
    seen_B1TT: torch.Tensor | None
    """Which token sees which, where padding makes that differ from the causal order."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all layers need to know of one decoding step; tensors that the step's graph reads."""

    cos_BK: torch.Tensor
    sin_BK: torch.Tensor
    first_B: torch.Tensor
    """int32, each sequence's first slot that is no padding."""
    slot: torch.Tensor
    """int32 scalar, where this token's keys and values go."""


class AttentionBlock:
    """The teacher's attention with keys and values in preallocated slots."""

    def __init__(
        self, module: Any, norm: Norm, geometry: HeadGeometry, batch: int, num_slots: int, attend: Attend
    ) -> None:
        g, self._norm, self._attend = geometry, norm, attend
        self._weight, self._bias = stacked([module.q_proj, module.k_proj, module.v_proj])
        self._out = stacked([module.o_proj])
        self._norms = _norms(module, g)
        self._geometry, self._scale = g, g.head_dim**-0.5
        self.keys_BGSK, self.values_BGSK = (
            self._weight.new_zeros(batch, g.num_kv_heads, num_slots, g.head_dim) for _ in range(2)
        )

    def fill_randomly(self) -> None:
        """Contents of no meaning, to time a step without a prompt."""
        for slots in (self.keys_BGSK, self.values_BGSK):
            slots.normal_()

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of the slots that `num_tokens` tokens fill, of all sequences."""
        per_slot = self.keys_BGSK[:, :, 0].numel() * self.keys_BGSK.element_size()
        return 2 * per_slot * num_tokens

    def step(self, hidden_BD: torch.Tensor, at: Step) -> torch.Tensor:
        rows = F.linear(self._norm(hidden_BD), self._weight, self._bias)
        caches = self.keys_BGSK, self.values_BGSK
        q = decoding.rotate_and_store(rows, at.cos_BK, at.sin_BK, *caches, at.slot, self._norms)
        heads = self._attend(q, *caches, at.first_B, at.slot, scale=self._scale).flatten(1)
        return F.linear(heads, *self._out)

    def prefill(self, hidden_BTD: torch.Tensor, prompt: Prompt, rows: slice, *, only_last: bool) -> torch.Tensor:
        """See `Block`."""
        g, num_tokens = self._geometry, hidden_BTD.shape[1]
        heads = F.linear(self._norm(hidden_BTD), self._weight, self._bias).unflatten(-1, (-1, g.head_dim))
        q, k, v = heads.split([g.num_heads, g.num_kv_heads, g.num_kv_heads], dim=2)
        q, k = _rotate(q, k, prompt, self._norms)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self.keys_BGSK[rows, :, :num_tokens], self.values_BGSK[rows, :, :num_tokens] = k, v
        mask = prompt.seen_B1TT
        grouped = g.num_heads != g.num_kv_heads
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=grouped
        )
        return _add_output(hidden_BTD, out.transpose(1, 2).flatten(2), self._out, only_last)


class DeltaBlock:
    """A `GatedDeltaNet` between two matrix products, its state in place."""

    def __init__(self, mixer: GatedDeltaNet, norm: Norm, batch: int) -> None:
        g = mixer.geometry
        parts = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj]
        if mixer.quadratic:
            parts += [mixer.q_quadratic.joined(mixer.q_proj), mixer.k_quadratic.joined(mixer.k_proj)]
        weight, bias = stacked([*parts, mixer.decay_proj, mixer.write_proj])
        assert bias is not None, "the gates have biases"
        # Rows of an odd width would keep matrix products and loads off their fast, aligned forms.
        padding = -len(weight) % _ALIGNED_COLUMNS
        self.projection = DeltaProjection(
            norm=norm,
            weight=F.pad(weight, (0, 0, 0, padding)),
            bias=F.pad(bias, (0, padding)),
            num_heads=mixer.num_heads,
            head_dim=g.head_dim,
            norms=_norms(mixer, g),
            has_head_bias=g.qkv_bias,
            quadratic=mixer.quadratic,
            mixes=(mixer.q_quadratic.mix_weight(), mixer.k_quadratic.mix_weight()) if mixer.quadratic else None,
            backend=mixer.backend,
        )
        self._out = stacked([mixer.o_proj])
        self._first_token = mixer.first_token
        shape = (batch, mixer.num_heads, g.head_dim, g.head_dim)
        self.state_BHKV = weight.new_zeros(shape, dtype=torch.float32)

    def fill_randomly(self) -> None:
        self.state_BHKV.normal_(std=0.1)

    def num_bytes(self, num_tokens: int) -> int:
        return self.state_BHKV.numel() * self.state_BHKV.element_size()

    def step(self, hidden_BD: torch.Tensor, at: Step) -> torch.Tensor:
        p = self.projection
        rows = F.linear(p.norm(hidden_BD), p.weight, p.bias)[:, : p.num_rows]
        heads = decoding.delta_step(rows, at.cos_BK, at.sin_BK, self.state_BHKV, p.norms, quadratic=p.quadratic)
        return F.linear(heads, *self._out)

    def prefill(self, hidden_BTD: torch.Tensor, prompt: Prompt, rows: slice, *, only_last: bool) -> torch.Tensor:
        """See `Block`."""
        mask = prompt.token_mask_BT
        out, state = decoding.delta_prompt(hidden_BTD, self.projection, *prompt.rotary, token_mask_BT=mask)
        self.state_BHKV[rows] = state
        if self._first_token is None or only_last:
            return _add_output(hidden_BTD, out, self._out, only_last)
        at = self._first_token.place(mask)
        first = hidden_BTD[at]
        first = first + self._first_token.value(self.projection.norm(first))
        hidden_BTD = _add_output(hidden_BTD, out, self._out, only_last)
        hidden_BTD[at] = first
        return hidden_BTD


class MixerBlock:
    """Any other mixer, by its own forward; its state is replaced in place by `RecurrentStateLayer`."""

    def __init__(self, mixer: Mixer, norm: Norm, batch: int) -> None:
        self._mixer, self._norm = mixer, norm
        g, weight = mixer.geometry, next(mixer.parameters())
        # One token of zeros tells the shapes of what this mixer keeps.
        hidden, angles = (weight.new_zeros(1, 1, dim) for dim in (g.hidden_dim, g.head_dim))
        sample = RecurrentStateLayer()
        with torch.no_grad():
            mixer(hidden, (angles, angles), past_key_values=self._as_cache(sample))
        state, conv = (None if x is None else x.new_zeros(batch, *x.shape[1:]) for x in _held(sample))
        assert state is not None, "a token leaves a state"
        self._memory = RecurrentStateLayer()
        self._memory.write(state, 1, conv)

    def _as_cache(self, memory: RecurrentStateLayer) -> Any:
        return SimpleNamespace(layers={self._mixer.layer_idx: memory})

    def fill_randomly(self) -> None:
        """What is there will do: the time of a step does not depend on it."""

    def num_bytes(self, num_tokens: int) -> int:
        return sum(x.numel() * x.element_size() for x in _held(self._memory) if x is not None)

    def step(self, hidden_BD: torch.Tensor, at: Step) -> torch.Tensor:
        angles = at.cos_BK[:, None], at.sin_BK[:, None]
        hidden = self._norm(hidden_BD)[:, None]
        return self._mixer(hidden, angles, past_key_values=self._as_cache(self._memory))[0][:, 0]

    def prefill(self, hidden_BTD: torch.Tensor, prompt: Prompt, rows: slice, *, only_last: bool) -> torch.Tensor:
        """See `Block`."""
        memory = RecurrentStateLayer()
        out, _ = self._mixer(
            self._norm(hidden_BTD),
            prompt.rotary,
            past_key_values=self._as_cache(memory),
            token_mask=prompt.token_mask_BT,
        )
        for ours, theirs in zip(_held(self._memory), _held(memory)):
            if ours is not None and theirs is not None:
                ours[rows] = theirs
        return hidden_BTD[:, -1:] + out[:, -1:] if only_last else hidden_BTD + out


Block = AttentionBlock | DeltaBlock | MixerBlock
"""Both take hidden states before their norm. `step` mixes those of one token. `prefill` adds what it makes of a
prompt's (B, T, D) to them, perhaps in place; (B, 1, D) with `only_last`, where the last token's are enough and no text
has one token only."""


def make_block(module: Any, norm: Norm, geometry: HeadGeometry, batch: int, num_slots: int, attend: Attend) -> Block:
    """The block for a layer's attention or mixer and the norm before it."""
    # One that is held to another backend answers by its own forward: the fused kernels are Triton's.
    is_fused = type(module) is GatedDeltaNet and (not norm.weight.is_cuda or module.backend in ("auto", "triton"))
    if is_fused and not module.conv_tokens:
        return DeltaBlock(module, norm, batch)
    if isinstance(module, Mixer):
        return MixerBlock(module, norm, batch)
    return AttentionBlock(module, norm, geometry, batch, num_slots, attend)


def _add_output(
    hidden_BTD: torch.Tensor, heads_BTC: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor | None], only_last: bool
) -> torch.Tensor:
    """The output projection of all heads, added in place to hidden states, or to a copy of the last token's."""
    if only_last:
        hidden_BTD, heads_BTC = hidden_BTD[:, -1:].clone(), heads_BTC[:, -1:]
    decoding.add_linear(hidden_BTD, heads_BTC, *out)
    return hidden_BTD


def _norms(module: Any, geometry: HeadGeometry) -> HeadNorms | None:
    if not geometry.qk_norm:
        return None
    return HeadNorms(query=module.q_norm.weight, key=module.k_norm.weight, eps=geometry.norm_eps)


def _rotate(
    q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, prompt: Prompt, norms: HeadNorms | None
) -> tuple[torch.Tensor, torch.Tensor]:
    eps = 0.0 if norms is None else norms.eps
    weights = (None, None) if norms is None else (norms.query, norms.key)
    q, k = (
        decoding.rotate_heads(x, *prompt.rotary, norm_weight=weight, eps=eps)
        for x, weight in zip((q_BTHK, k_BTGK), weights)
    )
    return q, k


def _held(memory: RecurrentStateLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return memory.read(), memory.read_conv()
