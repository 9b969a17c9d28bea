"""Gated DeltaNet in the shape of the teacher's attention.

Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), eq. 10. What differs: no short
convolution and no output norm (both would keep the module from starting near the teacher), rotary positions on queries
and keys, a state per query head, output gate 2 sigmoid(.) that starts as the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.mixers.decaying import DecayingMixer
from dtr.ops.backend import GATED_DELTA
from dtr.ops.dispatch import gated_delta_rule


class GatedDeltaNet(DecayingMixer):
    """S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T with a per-head decay a_t and write strength b_t.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        shape: options of `DecayingMixer` and `LinearMixer`.
    """

    operation = GATED_DELTA

    def __init__(self, geometry: HeadGeometry, layer_idx: int, **shape: Any) -> None:
        super().__init__(geometry, layer_idx, **shape)
        self.decay_proj = nn.Linear(geometry.hidden_dim, self.num_heads)
        self.write_proj = nn.Linear(geometry.hidden_dim, self.num_heads)

    @torch.no_grad()
    def reset_gates(self) -> None:
        rate = self.start_rates()
        nn.init.zeros_(self.decay_proj.weight)
        nn.init.zeros_(self.write_proj.weight)
        nn.init.zeros_(self.write_proj.bias)
        # softplus(bias) = rate, the inverse written so that small rates keep their digits.
        self.decay_proj.bias.copy_(torch.log(torch.expm1(rate)))

    def recur(
        self,
        hidden_BTD: torch.Tensor,
        q_BTHK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHK: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        state_BHKV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_decay_BTH = -F.softplus(self.decay_proj(hidden_BTD).float())
        write_BTH = torch.sigmoid(self.write_proj(hidden_BTD).float())
        if token_mask_BT1 is not None:
            log_decay_BTH, write_BTH = log_decay_BTH * token_mask_BT1, write_BTH * token_mask_BT1
        return gated_delta_rule(
            q_BTHK, k_BTHK, v_BTHK, log_decay_BTH, write_BTH, scale=1.0, state_BHKV=state_BHKV, backend=self.backend
        )
