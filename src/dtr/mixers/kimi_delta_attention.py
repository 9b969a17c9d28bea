"""Kimi Delta Attention in the shape of the teacher's attention.

Source: "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692). What differs: rotary
positions are kept, no output norm, the short convolution is an option, output gate 2 sigmoid(.) that starts as the
identity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.mixers.base import check_number
from dtr.mixers.decaying import DecayingMixer
from dtr.ops.backend import CHANNEL_DELTA
from dtr.ops.chunking import MIN_LOG_DECAY
from dtr.ops.dispatch import channel_delta_rule


class KimiDeltaAttention(DecayingMixer):
    """S_t = A_t S_{t-1} + b_t k_t (v_t - (A_t S_{t-1})^T k_t)^T, A_t = diag(a_t): Gated DeltaNet, a decay per channel.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        gate_rank: rank of the decay gate's projection.
        shape: options of `DecayingMixer` and `LinearMixer`.
    """

    operation = CHANNEL_DELTA
    # At the bound a decay learns nothing.
    shortest_half_life_tokens = math.log(2) / -MIN_LOG_DECAY

    def __init__(
        self,
        geometry: HeadGeometry,
        layer_idx: int,
        *,
        gate_rank: int = 64,
        **shape: Any,
    ) -> None:
        super().__init__(geometry, layer_idx, **shape)
        check_number("gate_rank", gate_rank, 1)
        self.decay_down_proj = nn.Linear(geometry.hidden_dim, gate_rank, bias=False)
        self.decay_up_proj = nn.Linear(gate_rank, self.num_heads * geometry.head_dim)
        self.write_proj = nn.Linear(geometry.hidden_dim, self.num_heads)

    @torch.no_grad()
    def reset_gates(self) -> None:
        rate = self.start_rates()
        nn.init.normal_(self.decay_down_proj.weight, std=self.geometry.hidden_dim**-0.5)
        nn.init.zeros_(self.decay_up_proj.weight)
        self.decay_up_proj.bias.copy_(torch.log(torch.expm1(rate)).repeat_interleave(self.geometry.head_dim))
        nn.init.zeros_(self.write_proj.weight)
        nn.init.zeros_(self.write_proj.bias)

    def recur(
        self,
        hidden_BTD: torch.Tensor,
        q_BTHK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHK: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        state_BHKV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decay = self.decay_up_proj(self.decay_down_proj(hidden_BTD)).float()
        log_decay_BTHK = (-F.softplus(decay)).clamp(min=MIN_LOG_DECAY).view(k_BTHK.shape)
        write_BTH = torch.sigmoid(self.write_proj(hidden_BTD).float())
        if token_mask_BT1 is not None:
            log_decay_BTHK, write_BTH = log_decay_BTHK * token_mask_BT1.unsqueeze(-1), write_BTH * token_mask_BT1
        return channel_delta_rule(
            q_BTHK, k_BTHK, v_BTHK, log_decay_BTHK, write_BTH, state_BHKV=state_BHKV, backend=self.backend
        )
