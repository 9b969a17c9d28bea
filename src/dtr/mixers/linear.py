"""What linear mixers share that keep the teacher's projections and rotary positions and have an output gate.

They differ in how they decay and write their state, which is all that a subclass of `LinearMixer` says.

Shapes: B batch, T tokens, D hidden dim, H heads, K head dim, V value dim (= K), C channels of all heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from dtr.arch import HeadGeometry
from dtr.errors import RecipeError
from dtr.mixers.base import HeadNorm, Mixer, check_flag, check_number
from dtr.mixers.first_token import FirstToken
from dtr.mixers.quadratic import QuadraticFeatures
from dtr.ops.dispatch import short_convolution
from dtr.ops.rotary import rotate, rotate_to_unit_length
from dtr.ops.short_convolution import RealTokens
from dtr.ops.window_attention import attend_window, kept_bytes

WINDOW_BIAS = 2.0
"""At the start a window gives sigmoid(2) = 88 % of the output, as most of attention lies in it."""


class LinearMixer(Mixer):
    """Linear attention shaped like the teacher's: one state per query head, rotary positions kept.

    Keys and values of grouped heads are repeated to all heads when weights are copied, so that each head may learn its
    own (HALO, arXiv 2601.22156, table 3). Queries and keys are L2-normalised, which keeps the state bounded, unless a
    subclass says otherwise. The output gate is 2 sigmoid(Wx + b) and starts as the identity.

    Subclasses add the parameters of their gates and implement `recur`.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        conv_tokens: tokens that a causal depthwise convolution on queries, keys and values sees, before rotary
            positions; it starts as the identity and has no activation. 0 leaves it out.
        head_copies: states that stand in for each query head; they start as copies with different half-lives, their
            outputs averaged.
        quadratic: give queries and keys of the state quadratic features (`quadratic.py`), at the same size. Their
            lengths are lost, so it needs a kind that has them of unit length anyway.
        window: last tokens that softmax attention by the same queries and keys also sees; each token decides, head by
            head, how much of its output comes from there and how much from the state. 0 leaves it out.
        sinks: first tokens that the window keeps in sight.
        exact_first: give the first token of a sequence what the teacher's attention gives there, exactly. The largest
            activations of a model grow on that token, and few tokens train it.
    """

    # The configuration that is recommended and measured (docs/measurements.md): against one state without features it
    # has a quarter less error, for a quarter more of a training step.
    options_when_new: ClassVar[dict[str, Any]] = {"exact_first": True, "head_copies": 2, "quadratic": True}
    has_unit_keys = True
    """Whether `recur` gets queries and keys of length 1."""

    def __init__(
        self,
        geometry: HeadGeometry,
        layer_idx: int,
        *,
        conv_tokens: int = 0,
        head_copies: int = 1,
        quadratic: bool = False,
        window: int = 0,
        sinks: int = 4,
        exact_first: bool = False,
    ) -> None:
        super().__init__(geometry, layer_idx)
        g = geometry
        check_number("conv_tokens", conv_tokens, 0)
        check_number("head_copies", head_copies, 1)
        check_number("window", window, 0)
        check_number("sinks", sinks, 0)
        check_flag("quadratic", quadratic)
        check_flag("exact_first", exact_first)
        if quadratic and not self.has_unit_keys:
            raise RecipeError(
                "mixer.options.quadratic",
                got="it for a kind that reads lengths of queries and keys",
                expected="a kind with queries and keys of unit length, such as gated_deltanet",
            )
        self.conv_tokens, self.head_copies, self.quadratic = conv_tokens, head_copies, quadratic
        self.window, self.sinks, self.is_pure_linear = window, sinks, not window
        self.num_heads = g.num_heads * head_copies
        inner_dim = self.num_heads * g.head_dim
        self._make_projections(inner_dim)
        self.gate_proj = nn.Linear(g.hidden_dim, inner_dim)
        self.exact_first = exact_first
        self.first_token = FirstToken(g) if exact_first else None
        if quadratic:
            self.q_quadratic = QuadraticFeatures(self.num_heads, g.head_dim)
            self.k_quadratic = QuadraticFeatures(self.num_heads, g.head_dim)
        if conv_tokens:
            self.conv_taps = nn.Parameter(torch.empty(3 * inner_dim, conv_tokens))
        if window:
            self.window_proj = nn.Linear(g.hidden_dim, self.num_heads)
        if g.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(g.head_dim, g.norm_eps), HeadNorm(g.head_dim, g.norm_eps)

    def _make_projections(self, inner_dim: int) -> None:
        g = self.geometry
        self.q_proj = nn.Linear(g.hidden_dim, inner_dim, bias=g.qkv_bias)
        self.k_proj = nn.Linear(g.hidden_dim, inner_dim, bias=g.qkv_bias)
        self.v_proj = nn.Linear(g.hidden_dim, inner_dim, bias=g.qkv_bias)
        self.o_proj = nn.Linear(inner_dim, g.hidden_dim, bias=g.o_bias)

    @property
    def output_projection(self) -> nn.Linear:
        return self.o_proj

    def state_bytes(self, bytes_per_element: int) -> int:
        inner_dim = self.num_heads * self.geometry.head_dim
        past = 3 * inner_dim * (self.conv_tokens - 1) if self.conv_tokens else 0
        kept = kept_bytes(self.window, self.sinks, inner_dim, bytes_per_element) if self.window else 0
        return 4 * inner_dim * self.geometry.head_dim + past * bytes_per_element + kept

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Copy the teacher's projections and start the output gate as the identity.

        Args:
            attention: the Hugging Face attention module that this mixer will stand in for.
        """
        repeats = self.geometry.num_heads // self.geometry.num_kv_heads
        for name, times in (("q_proj", 1), ("k_proj", repeats), ("v_proj", repeats)):
            ours, theirs = getattr(self, name), getattr(attention, name)
            for part in ("weight", "bias"):
                if getattr(ours, part) is not None:
                    one = self._repeat_heads(getattr(theirs, part), times)
                    getattr(ours, part).copy_(torch.cat([one] * self.head_copies))
        self.o_proj.weight.copy_(torch.cat([attention.o_proj.weight / self.head_copies] * self.head_copies, dim=1))
        if self.o_proj.bias is not None:
            self.o_proj.bias.copy_(attention.o_proj.bias)
        if self.geometry.qk_norm:
            self.q_norm.weight.copy_(attention.q_norm.weight)
            self.k_norm.weight.copy_(attention.k_norm.weight)
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.zeros_(self.gate_proj.bias)
        if self.quadratic:
            nn.init.zeros_(self.q_quadratic.weight)
            nn.init.zeros_(self.k_quadratic.weight)
        if self.conv_tokens:
            nn.init.zeros_(self.conv_taps)
            self.conv_taps[:, -1] = 1.0
        if self.window:
            nn.init.zeros_(self.window_proj.weight)
            nn.init.constant_(self.window_proj.bias, WINDOW_BIAS)
        if self.first_token is not None:
            self.first_token.start_from(attention)
        self.reset_gates()

    def reset_gates(self) -> None:
        """Set the start values of the subclass's own parameters."""
        raise NotImplementedError

    def recur(
        self,
        hidden_BTD: torch.Tensor,
        q_BTHK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHK: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        state_BHKV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The recurrence: heads' output (B, T, H, K) and the state after the last token.

        A token whose mask is 0 must leave the state as it is.
        """
        raise NotImplementedError

    def mix(
        self,
        hidden_BTD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        token_mask_BT: torch.Tensor | None,
        memory: Any,
        starting_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `Mixer.mix`."""
        g, (batch, num_tokens) = self.geometry, hidden_BTD.shape[:2]
        heads = (batch, num_tokens, self.num_heads, g.head_dim)
        mask = None if token_mask_BT is None else token_mask_BT[..., None]
        q, k, v = self.q_proj(hidden_BTD), self.k_proj(hidden_BTD), self.v_proj(hidden_BTD)
        past_inputs = None if memory is None else memory.read_conv()
        q, k, v, conv_inputs = self.mix_tokens(hidden_BTD, q, k, v, mask, past_inputs)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)
        starts_here = memory is None or memory.read() is None
        near: torch.Tensor | None = None
        kept: tuple[torch.Tensor, ...] = ()
        if self.window:
            past = None if memory is None else memory.read_window()
            near_q, near_k = (rotate(x, *angles) for x in self._normed(q, k))
            near, kept = attend_window(near_q, near_k, v, token_mask_BT, past, window=self.window, sinks=self.sinks)
        q, k = self._turned(q, k, angles)
        out, state = self.recur(hidden_BTD, q, k, v, mask, None if memory is None else memory.read())
        if memory is not None:
            memory.write(state, num_tokens, conv_inputs, kept)
        if near is not None:
            share = torch.sigmoid(self.window_proj(hidden_BTD)).unsqueeze(-1)
            out = share * near + (1 - share) * out

        gate = 2 * torch.sigmoid(self.gate_proj(hidden_BTD)).view(heads)
        out = self.o_proj((out * gate).flatten(2))
        if self.first_token is not None and (starts_here or starting_rows is not None):
            out = self.first_token(hidden_BTD, out, token_mask_BT, None if starts_here else starting_rows)
        return out

    def _turned(
        self, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as `recur` gets them."""
        if self.quadratic:
            if not self.geometry.qk_norm:
                by = self.backend
                return self.q_quadratic(q_BTHK, angles, by), self.k_quadratic(k_BTHK, angles, by)
            q_BTHK, k_BTHK = self.q_quadratic(q_BTHK), self.k_quadratic(k_BTHK)
        turn = rotate_to_unit_length if self.has_unit_keys else rotate
        q, k = (turn(x, *angles) for x in self._normed(q_BTHK, k_BTHK))
        return q, k

    def _normed(self, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.q_norm(q_BTHK), self.k_norm(k_BTHK)) if self.geometry.qk_norm else (q_BTHK, k_BTHK)

    def mix_tokens(
        self,
        hidden_BTD: torch.Tensor,
        q_BTC: torch.Tensor,
        k_BTC: torch.Tensor,
        v_BTC: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        past_inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values after a convolution, if there is one, and the inputs that later tokens need."""
        if not self.conv_tokens:
            return q_BTC, k_BTC, v_BTC, None
        real = None if token_mask_BT1 is None else RealTokens(token_mask_BT1[..., 0])
        pasts = [None] * 3 if past_inputs is None else past_inputs.chunk(3, dim=-1)
        # Each by itself: joined and cut apart again they would be copied.
        parts = zip((q_BTC, k_BTC, v_BTC), self.conv_taps.chunk(3), pasts)
        mixed = [short_convolution(x, taps, past, real, backend=self.backend) for x, taps, past in parts]
        q, k, v = (out for out, _ in mixed)
        return q, k, v, torch.cat([inputs for _, inputs in mixed], dim=-1)
