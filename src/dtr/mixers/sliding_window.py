"""Softmax attention on a sliding window with sinks: the teacher's own attention, made blind to the middle.

Source: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), section 3.2. What differs: keys
keep the rotary positions of the whole text, as they were distilled with them. Not a linear mixer: on prompts shorter
than the window it is full attention, which reports say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtr.arch import HeadGeometry
from dtr.mixers.base import HeadNorm, Mixer, check_number
from dtr.ops.rotary import rotate
from dtr.ops.window_attention import attend_window, kept_bytes


class SlidingWindow(Mixer):
    """Attention to the last tokens and the first ones, with the teacher's projections and shared key/value heads.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its keys and values.
        window: tokens in sight, the current one among them.
        sinks: first tokens that stay in sight.
    """

    is_pure_linear = False

    def __init__(self, geometry: HeadGeometry, layer_idx: int, *, window: int = 64, sinks: int = 4) -> None:
        super().__init__(geometry, layer_idx)
        check_number("window", window, 1)
        check_number("sinks", sinks, 0)
        self.window, self.sinks = window, sinks
        g = geometry
        self.q_proj = nn.Linear(g.hidden_dim, g.num_heads * g.head_dim, bias=g.qkv_bias)
        self.k_proj = nn.Linear(g.hidden_dim, g.num_kv_heads * g.head_dim, bias=g.qkv_bias)
        self.v_proj = nn.Linear(g.hidden_dim, g.num_kv_heads * g.head_dim, bias=g.qkv_bias)
        self.o_proj = nn.Linear(g.num_heads * g.head_dim, g.hidden_dim, bias=g.o_bias)
        if g.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(g.head_dim, g.norm_eps), HeadNorm(g.head_dim, g.norm_eps)

    @property
    def output_projection(self) -> nn.Linear:
        return self.o_proj

    def state_bytes(self, bytes_per_element: int) -> int:
        return kept_bytes(
            self.window, self.sinks, self.geometry.num_kv_heads * self.geometry.head_dim, bytes_per_element
        )

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Copy the teacher's weights as they are.

        Args:
            attention: the Hugging Face attention module that this mixer will stand in for.
        """
        theirs = dict(attention.named_parameters())
        for name, weight in self.named_parameters():
            weight.copy_(theirs[name])

    def mix(
        self,
        hidden_BTD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        token_mask_BT: torch.Tensor | None,
        memory: Any,
        starting_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `Mixer.mix`."""
        g = self.geometry
        q, k, v = (proj(hidden_BTD).unflatten(-1, (-1, g.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if g.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        past = None if memory is None else memory.read_window()
        out, kept = attend_window(q, k, v, token_mask_BT, past, window=self.window, sinks=self.sinks)
        if memory is not None:
            memory.write(None, hidden_BTD.shape[1], window=kept)
        return self.o_proj(out.flatten(2))
