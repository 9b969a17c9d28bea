"""Gated Linear Attention in the shape of the teacher's attention.

Source: "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635), eq. 3 and section
4.4 (low-rank decay gate, temperature 16). What differs: rotary positions and L2-normalised queries and keys, no output
norm, a write strength per head, output gate 2 sigmoid(.) that starts as the identity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.mixers.decaying import DecayingMixer
from dtr.ops.backend import GATED_LINEAR
from dtr.ops.chunking import MIN_LOG_DECAY
from dtr.ops.dispatch import gated_linear_attention

TEMPERATURE = 16.0


class GatedLinearAttention(DecayingMixer):
    """S_t = diag(a_t) S_{t-1} + b_t k_t v_t^T with a decay a_t per key channel.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        gate_rank: rank of the decay gate's projection.
        shape: options of `DecayingMixer` and `LinearMixer`.
    """

    operation = GATED_LINEAR
    # Writes start as strong as the decay, and are less than 1.
    shortest_half_life_tokens = math.log(2)

    def __init__(
        self,
        geometry: HeadGeometry,
        layer_idx: int,
        *,
        gate_rank: int = 16,
        **shape: Any,
    ) -> None:
        super().__init__(geometry, layer_idx, **shape)
        inner_dim = self.num_heads * geometry.head_dim
        self.decay_down_proj = nn.Linear(geometry.hidden_dim, gate_rank, bias=False)
        self.decay_up_proj = nn.Linear(gate_rank, inner_dim)
        self.write_proj = nn.Linear(geometry.hidden_dim, self.num_heads)

    @torch.no_grad()
    def reset_gates(self) -> None:
        g = self.geometry
        log_decay = self.start_rates()
        nn.init.normal_(self.decay_down_proj.weight, std=g.hidden_dim**-0.5)
        nn.init.zeros_(self.decay_up_proj.weight)
        # logsigmoid(bias) / TEMPERATURE = -log_decay, solved for the bias.
        bias = -torch.log(torch.expm1(TEMPERATURE * log_decay))
        self.decay_up_proj.bias.copy_(bias.repeat_interleave(g.head_dim))
        nn.init.zeros_(self.write_proj.weight)
        # Writes as strong as the decay, so that a state starts as a weighted mean of values, as attention's output is.
        self.write_proj.bias.copy_(torch.logit(log_decay))

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
        log_decay_BTHK = (F.logsigmoid(decay) / TEMPERATURE).clamp(min=MIN_LOG_DECAY).view(k_BTHK.shape)
        write_BTH = torch.sigmoid(self.write_proj(hidden_BTD))
        if token_mask_BT1 is not None:
            log_decay_BTHK = log_decay_BTHK * token_mask_BT1.unsqueeze(-1)
            write_BTH = write_BTH * token_mask_BT1
        k_BTHK = k_BTHK * write_BTH.to(k_BTHK.dtype).unsqueeze(-1)
        return gated_linear_attention(
            q_BTHK, k_BTHK, v_BTHK, log_decay_BTHK, scale=1.0, state_BHKV=state_BHKV, backend=self.backend
        )
