"""A `GatedDeltaNet` in vLLM by fused kernels: one launch for a prompt's chunks of all sequences, one for all steps.

Shapes: T packed tokens, B sequences, D hidden dim, H heads, K head dim.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from dtr.mixers import Mixer
from dtr.mixers.gated_deltanet import GatedDeltaNet
from dtr.ops import decoding
from dtr.ops.chunk_layout import ChunkLayout
from dtr.ops.packed_prompts import delta_sequences
from dtr.ops.projections import DeltaProjection, HeadNorms, Norm

_ALIGNED_ROWS = 64
_HEAD_DIMS = (16, 32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float32)
PLAIN = False
"""Whether devices without kernels take this path too, by plain operations; for tests."""


class DeltaPath:
    """The mixer's input projections side by side in one matrix, of which its own weights become parts.

    Args:
        mixer: its weights may be loaded later.
    """

    def __init__(self, mixer: GatedDeltaNet) -> None:
        self._mixer, g = mixer, mixer.geometry
        norms = None
        if g.qk_norm:
            norms = HeadNorms(query=mixer.q_norm.weight, key=mixer.k_norm.weight, eps=g.norm_eps)
        like = mixer.q_proj.weight.detach()
        width, num_gates = mixer.num_heads * g.head_dim, 2 * mixer.num_heads
        self._mixes = slice(4 * width, (6 if mixer.quadratic else 4) * width)
        num_rows = self._mixes.stop + num_gates + -(self._mixes.stop + num_gates) % _ALIGNED_ROWS
        self.projection = DeltaProjection(
            # The decoder layer's own norm runs before.
            norm=Norm(weight=like.new_ones(g.hidden_dim), eps=0.0),
            weight=like.new_zeros(num_rows, g.hidden_dim),
            bias=like.new_zeros(num_rows),
            num_heads=mixer.num_heads,
            head_dim=g.head_dim,
            norms=norms,
            has_head_bias=g.qkv_bias,
            quadratic=mixer.quadratic,
        )
        heads = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj]
        for first, parts in ((0, heads), (self._mixes.stop, [mixer.decay_proj, mixer.write_proj])):
            for part in parts:
                self._join(part, slice(first, first + len(part.weight)))
                first += len(part.weight)

    def _join(self, part: nn.Linear, rows: slice) -> None:
        # No second copy: what is loaded into the mixer is loaded here.
        assert self.projection.bias is not None, "the gates have biases"
        part.weight = nn.Parameter(self.projection.weight[rows], requires_grad=False)
        if part.bias is not None:
            part.bias = nn.Parameter(self.projection.bias[rows], requires_grad=False)

    @classmethod
    def of(cls, mixer: Mixer, like: torch.Tensor) -> DeltaPath | None:
        """The fast path of a mixer that the kernels know on the device and in the type of `like`, else None."""
        if type(mixer) is not GatedDeltaNet or mixer.conv_tokens or mixer.window or not (PLAIN or like.is_cuda):
            return None
        return cls(mixer) if mixer.geometry.head_dim in _HEAD_DIMS and like.dtype in _DTYPES else None

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Derive from the loaded weights what is not among them: the mixes of quadratic features."""
        m, p = self._mixer, self.projection
        if not m.quadratic:
            return
        assert p.bias is not None, "the gates have biases"
        width, first = m.num_heads * m.geometry.head_dim, self._mixes.start
        for features, projection in ((m.q_quadratic, m.q_proj), (m.k_quadratic, m.k_proj)):
            mix = features.joined(projection)
            p.weight[first : first + width] = mix.weight
            if mix.bias is not None:
                p.bias[first : first + width] = mix.bias
            first += width
        self.projection = dataclasses.replace(p, mixes=(m.q_quadratic.mix_weight(), m.k_quadratic.mix_weight()))

    def step(
        self,
        hidden_BD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        positions_B: torch.Tensor,
        states: torch.Tensor,
        slots_B: torch.Tensor,
        is_new_B: torch.Tensor,
    ) -> torch.Tensor:
        """One token of each sequence; angles are those of all positions. Waits for nothing."""
        p, o = self.projection, self._mixer.o_proj
        rows = F.linear(hidden_BD, p.weight, p.bias)[:, : p.num_rows]
        shared = decoding.SharedStates(slot_B=slots_B, is_new_B=is_new_B, position_B=positions_B)
        heads = decoding.delta_step(rows, *angles, states, p.norms, quadratic=p.quadratic, shared=shared)
        out = F.linear(heads, o.weight, o.bias)
        first = self._mixer.first_token
        return out if first is None else torch.where(is_new_B[:, None], first.value(hidden_BD).to(out.dtype), out)

    def read(
        self,
        hidden_TD: torch.Tensor,
        output_TD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        states: torch.Tensor,
        slots_P: torch.Tensor,
        is_new_P: torch.Tensor,
        layout: ChunkLayout,
    ) -> None:
        """Longer parts of P sequences, all in one go; angles are those of the tokens. Waits for nothing."""
        o = self._mixer.o_proj
        initial = states[slots_P].masked_fill(is_new_P[:, None, None, None], 0.0)
        heads, last = delta_sequences(hidden_TD, self.projection, *angles, layout, initial)
        states[slots_P] = last
        output_TD.copy_(F.linear(heads, o.weight, o.bias))
        first = self._mixer.first_token
        if first is not None:
            at = layout.first_token
            value = first.value(hidden_TD[at]).to(output_TD.dtype)
            output_TD[at] = torch.where(is_new_P[:, None], value, output_TD[at])
