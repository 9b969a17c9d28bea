"""Mamba-2 in the exact form of the Granite 4 hybrids, shaped like the teacher's attention.

Source: "Transformers are SSMs" (arXiv 2405.21060), section 7, as GraniteMoeHybrid builds it: one input projection, a
causal convolution over 4 tokens with SiLU on x, B and C, a decay and a step size per head, a skip D, a gated RMS norm.
Weights carry the names and shapes used there, so that export is a copy. What differs is the start: C, B and x are the
teacher's queries, keys and values, the output projection is its own. Rotary positions have no place in this form.

Shapes: B batch, T tokens, D hidden dim, H heads, P head dim, G groups of heads that share B and C, N state dim (= P).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.errors import RecipeError
from dtr.mixers.native import (
    CONV_TOKENS,
    SCORE_SCALE,
    VALUE_SCALE,
    CausalConv1d,
    NativeMixer,
    fit_channel_scales,
    start_taps,
)
from dtr.ops.short_convolution import RealTokens
from dtr.ops.state_space import chunked

GATE_BIAS = 1.0
"""The output gate at the start, before SiLU. Any constant will do, as the norm takes it out again."""


class GatedNorm(nn.Module):
    """RMS norm of x SiLU(gate) within groups of channels, with a weight."""

    def __init__(self, num_channels: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.num_groups, self.eps = num_groups, eps

    def forward(self, x_BTC: torch.Tensor, gate_BTC: torch.Tensor) -> torch.Tensor:
        x = (x_BTC.float() * F.silu(gate_BTC.float())).unflatten(-1, (self.num_groups, -1))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.flatten(-2).to(x_BTC.dtype)


class Mamba2(NativeMixer):
    """S_t = exp(-dt_t a) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t with a rate a and a step size dt_t per head.

    Args:
        geometry: shape of the attention that is replaced; head dim and number of heads are kept.
        layer_idx: its place in the model, where the cache keeps its state.
        num_groups: number of groups of heads, each with one B, one C and a norm of its own; default one per head.
        min_half_life_tokens: half-life of the fastest head's memory at the start.
        max_half_life_tokens: half-life of the slowest head's memory at the start; heads are spaced geometrically.
    """

    needs_calibration = True

    def __init__(
        self,
        geometry: HeadGeometry,
        layer_idx: int,
        *,
        num_groups: int | None = None,
        min_half_life_tokens: float = 4.0,
        max_half_life_tokens: float = 512.0,
    ) -> None:
        super().__init__(geometry, layer_idx)
        g = geometry
        self.num_groups = g.num_heads if num_groups is None else num_groups
        if self.num_groups < 1 or g.num_heads % self.num_groups:
            raise RecipeError(
                "mixer.options.num_groups",
                got=str(num_groups),
                expected=f"a divisor of the {g.num_heads} heads",
                hint="Leave it out for one group per head.",
            )
        self.half_lives = (min_half_life_tokens, max_half_life_tokens)
        self.inner_dim, self.group_dim = g.num_heads * g.head_dim, self.num_groups * g.head_dim
        self.conv_dim = self.inner_dim + 2 * self.group_dim
        # Rows: gate, x, B, C, dt. Only the gate's have a bias (apart, as a padded token must send nothing on).
        self.in_proj = nn.Linear(g.hidden_dim, self.inner_dim + self.conv_dim + g.num_heads, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(self.inner_dim))
        self.conv1d = CausalConv1d(self.conv_dim, self.conv_dim, CONV_TOKENS, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(g.num_heads))
        self.A_log = nn.Parameter(torch.empty(g.num_heads))
        self.D = nn.Parameter(torch.empty(g.num_heads))
        self.norm = GatedNorm(self.inner_dim, self.num_groups, g.norm_eps)
        self.out_proj = nn.Linear(self.inner_dim, g.hidden_dim)

    @classmethod
    def misfit(cls, geometry: HeadGeometry) -> str:
        return "norms on queries and keys" if geometry.qk_norm else ""

    @property
    def output_projection(self) -> nn.Linear:
        return self.out_proj

    def state_bytes(self, bytes_per_element: int) -> int:
        return super().state_bytes(bytes_per_element) + (CONV_TOKENS - 1) * self.conv1d.in_channels * bytes_per_element

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Copy the teacher's projections; convolution and gate start as near to doing nothing as SiLU lets them.

        Args:
            attention: the Hugging Face attention module that this mixer will stand in for.
        """
        g = self.geometry
        repeats = g.num_heads // g.num_kv_heads
        nn.init.zeros_(self.in_proj.weight)
        nn.init.zeros_(self.conv1d.weight)
        assert self.conv1d.bias is not None
        rows, taps, shift = self.in_proj.weight[self.inner_dim :], self.conv1d.weight[:, 0, -1], self.conv1d.bias
        first = 0
        for source, times, size, num_groups in (
            (attention.v_proj, repeats, VALUE_SCALE, g.num_heads),
            (attention.k_proj, repeats, SCORE_SCALE, self.num_groups),
            (attention.q_proj, 1, SCORE_SCALE, self.num_groups),
        ):
            weight, bias = self._mean_heads(source.weight, times, num_groups), source.bias
            part = slice(first, first + len(weight))
            first = part.stop
            rows[part] = weight
            taps[part] = start_taps(weight, g.head_dim, size)
            shift[part] = 0.0 if bias is None else taps[part] * self._mean_heads(bias, times, num_groups)
        nn.init.constant_(self.gate_bias, GATE_BIAS)
        self._start_recurrence()
        self.out_proj.weight.copy_(attention.o_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        if attention.o_proj.bias is not None:
            self.out_proj.bias.copy_(attention.o_proj.bias)

    def _start_recurrence(self) -> None:
        """A step size of 1 and half-lives spaced geometrically over the heads, the same for every token; no skip."""
        fast, slow = (math.log2(x) for x in self.half_lives)
        rate = math.log(2) / torch.logspace(fast, slow, self.geometry.num_heads, base=2.0)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(1.0)))
        self.A_log.copy_(rate.log())
        nn.init.zeros_(self.D)

    @torch.no_grad()
    def calibrate(self, hidden_BTD: torch.Tensor, target_BTD: torch.Tensor) -> None:
        """Set the norm's weight to the least-squares fit of the target."""
        nn.init.ones_(self.norm.weight)
        heads = self._heads(hidden_BTD, None, None)[0]
        self.norm.weight.copy_(fit_channel_scales(heads, self.out_proj.weight, target_BTD - self.out_proj.bias))

    def _heads(
        self, hidden_BTD: torch.Tensor, token_mask_BT1: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The normed heads side by side (B, T, H P), the last state (B, H, N, P) and the convolution's last inputs."""
        g = self.geometry
        gate, xbc, dt = self.in_proj(hidden_BTD).split([self.inner_dim, self.conv_dim, g.num_heads], dim=-1)
        real = None if token_mask_BT1 is None else RealTokens(token_mask_BT1[..., 0])
        past = None if memory is None else memory.read_conv()
        xbc, conv_inputs = self.conv1d(xbc, past, real)
        xbc = F.silu(xbc)
        widths = [self.inner_dim, self.group_dim, self.group_dim]
        x, b, c = (part.unflatten(-1, (-1, g.head_dim)) for part in xbc.split(widths, dim=-1))
        dt = F.softplus((dt + self.dt_bias).float())
        if token_mask_BT1 is not None:
            dt = dt * token_mask_BT1
        heads_per_group = g.num_heads // self.num_groups
        y, state = chunked(
            c.repeat_interleave(heads_per_group, dim=2),
            b.repeat_interleave(heads_per_group, dim=2),
            x * dt.unsqueeze(-1).to(x.dtype),
            -self.A_log.float().exp() * dt,
            state_BHKV=None if memory is None else memory.read(),
        )
        y = y + self.D.unsqueeze(-1) * x
        return self.norm(y.flatten(2), gate + self.gate_bias), state, conv_inputs

    def _mean_heads(self, weight: torch.Tensor, times: int, num_groups: int) -> torch.Tensor:
        """The teacher's rows, repeated to all heads as grouped-query attention does, then averaged within groups."""
        per_head = self._repeat_heads(weight.float(), times).unflatten(0, (num_groups, -1, self.geometry.head_dim))
        return per_head.mean(1).flatten(0, 1)
