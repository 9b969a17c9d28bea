"""Gated DeltaNet in the exact form of Qwen3.5, shaped like the teacher's attention.

Source: "Gated Delta Networks" (arXiv 2412.06464), eq. 10 and its figure 1, as Qwen3.5 builds it: a causal convolution
over 4 tokens with SiLU on queries, keys and values, L2-normalised queries and keys, a norm over each head's output and
then a SiLU gate. Weights carry the names and shapes used there, so that export is a copy. What differs is the start:
the teacher's projections; and each query head has a key and a value head of its own. There are no biases and no rotary
positions in this form.

Shapes: B batch, T tokens, D hidden dim, H heads, K head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.mixers.base import HeadNorm
from dtr.mixers.native import (
    CONV_TOKENS,
    SCORE_SCALE,
    VALUE_SCALE,
    CausalConv1d,
    NativeMixer,
    fit_channel_scales,
    start_taps,
)
from dtr.ops.backend import GATED_DELTA
from dtr.ops.dispatch import gated_delta_rule
from dtr.ops.short_convolution import RealTokens

L2_EPS = 1e-6
"""Added to the sum of squares of a query or key, as kernels of this form do."""
GATE_START = 1.0
"""The output gate at the start, before SiLU."""


class Qwen35GatedDeltaNet(NativeMixer):
    """S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T; a_t = exp(-A softplus(.)), b_t = sigmoid(.) per head.

    Args:
        geometry: shape of the attention that is replaced; head dim and number of heads are kept.
        layer_idx: its place in the model, where the cache keeps its state.
        min_half_life_tokens: half-life of the fastest head's memory at the start.
        max_half_life_tokens: half-life of the slowest head's memory at the start; heads are spaced geometrically.
    """

    needs_calibration = True

    operation = GATED_DELTA

    def __init__(
        self,
        geometry: HeadGeometry,
        layer_idx: int,
        *,
        min_half_life_tokens: float = 8.0,
        max_half_life_tokens: float = 1024.0,
    ) -> None:
        super().__init__(geometry, layer_idx)
        g = geometry
        self.half_lives = (min_half_life_tokens, max_half_life_tokens)
        inner_dim = g.num_heads * g.head_dim
        self.in_proj_qkv = nn.Linear(g.hidden_dim, 3 * inner_dim, bias=False)
        self.in_proj_z = nn.Linear(g.hidden_dim, inner_dim, bias=False)
        self.in_proj_b = nn.Linear(g.hidden_dim, g.num_heads, bias=False)
        self.in_proj_a = nn.Linear(g.hidden_dim, g.num_heads, bias=False)
        self.conv1d = CausalConv1d(3 * inner_dim, 3 * inner_dim, CONV_TOKENS, groups=3 * inner_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(g.num_heads))
        self.A_log = nn.Parameter(torch.empty(g.num_heads))
        self.norm = HeadNorm(g.head_dim, g.norm_eps)
        self.out_proj = nn.Linear(inner_dim, g.hidden_dim, bias=False)

    @classmethod
    def misfit(cls, geometry: HeadGeometry) -> str:
        return "biases" if geometry.qkv_bias or geometry.o_bias else ""

    def state_bytes(self, bytes_per_element: int) -> int:
        return super().state_bytes(bytes_per_element) + (CONV_TOKENS - 1) * self.conv1d.in_channels * bytes_per_element

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Copy the teacher's projections; biases have no place. The output gate is shut until `calibrate` opens it.

        Args:
            attention: the Hugging Face attention module that this mixer will stand in for.
        """
        g = self.geometry
        repeats = g.num_heads // g.num_kv_heads
        weights = [
            self._repeat_heads(attention.q_proj.weight.float(), 1),
            self._repeat_heads(attention.k_proj.weight.float(), repeats),
            self._repeat_heads(attention.v_proj.weight.float(), repeats),
        ]
        sizes = (SCORE_SCALE, SCORE_SCALE, VALUE_SCALE)
        taps = [start_taps(weight, g.head_dim, size) for weight, size in zip(weights, sizes, strict=True)]
        if g.qk_norm:
            taps[0] = taps[0] * attention.q_norm.weight.repeat(g.num_heads)
            taps[1] = taps[1] * attention.k_norm.weight.repeat(g.num_heads)
        self.in_proj_qkv.weight.copy_(torch.cat(weights))
        nn.init.zeros_(self.conv1d.weight)
        self.conv1d.weight[:, 0, -1] = torch.cat(taps)
        for module in (self.in_proj_z, self.in_proj_b, self.in_proj_a):
            nn.init.zeros_(module.weight)
        fast, slow = (math.log2(x) for x in self.half_lives)
        rate = math.log(2) / torch.logspace(fast, slow, g.num_heads, base=2.0)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(1.0)))
        self.A_log.copy_(rate.log())
        nn.init.ones_(self.norm.weight)
        self.out_proj.weight.copy_(attention.o_proj.weight)

    @torch.no_grad()
    def calibrate(self, hidden_BTD: torch.Tensor, target_BTD: torch.Tensor) -> None:
        """Open the gate evenly, then scale the output projection's columns to the least-squares fit of the target.

        A gate without a bias is even only along a direction of the hidden states on which all tokens agree: the
        least-squares solution of hidden u = 1.
        """
        hidden = hidden_BTD.flatten(0, 1).double()
        gram = hidden.mT @ hidden
        gram.diagonal().add_(1e-3 * gram.diagonal().mean())
        direction = torch.linalg.solve(gram, hidden.sum(0))
        self.in_proj_z.weight.copy_((GATE_START * direction).expand_as(self.in_proj_z.weight))
        heads = self._heads(hidden_BTD, None, None)[0]
        self.out_proj.weight.mul_(fit_channel_scales(heads, self.out_proj.weight, target_BTD))

    def _heads(
        self, hidden_BTD: torch.Tensor, token_mask_BT1: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gated heads side by side (B, T, H K), the last state (B, H, K, K) and the convolution's last inputs."""
        qkv = self.in_proj_qkv(hidden_BTD)
        real = None if token_mask_BT1 is None else RealTokens(token_mask_BT1[..., 0])
        past = None if memory is None else memory.read_conv()
        qkv, conv_inputs = self.conv1d(qkv, past, real)
        q, k, v = (part.unflatten(-1, (-1, self.geometry.head_dim)) for part in F.silu(qkv).chunk(3, dim=-1))
        write_BTH = torch.sigmoid(self.in_proj_b(hidden_BTD)).float()
        log_decay_BTH = -self.A_log.float().exp() * F.softplus(self.in_proj_a(hidden_BTD).float() + self.dt_bias)
        if token_mask_BT1 is not None:
            write_BTH, log_decay_BTH = write_BTH * token_mask_BT1, log_decay_BTH * token_mask_BT1
        state = None if memory is None else memory.read()
        out, state = gated_delta_rule(
            _unit(q), _unit(k), v, log_decay_BTH, write_BTH, state_BHKV=state, backend=self.backend
        )
        gate = F.silu(self.in_proj_z(hidden_BTD).float()).view(out.shape)
        return (self.norm(out) * gate).to(out.dtype).flatten(2), state, conv_inputs


def _unit(x_BTHK: torch.Tensor) -> torch.Tensor:
    return x_BTHK * torch.rsqrt(x_BTHK.square().sum(-1, keepdim=True) + L2_EPS)
