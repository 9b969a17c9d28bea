"""Retention in the shape of the teacher's attention: one fixed decay per head, as in RetNet and Lightning Attention.

Sources: "Retentive Network" (arXiv 2307.08621), eq. 5 (parallel), 6 (token by token) and 7 (in chunks); "Lightning
Attention-2" (arXiv 2401.04658), which is the same recurrence computed in blocks, as `dtr.ops.state_space` does. What
differs: half-lives are options instead of decays 1 - 2^(-5 - head); what is written is scaled by 1 - decay, so that a
state is a weighted mean of values, as attention's output is, and no norm follows; rotary positions are the teacher's,
with L2-normalised queries and keys; output gate 2 sigmoid(.) that starts as the identity.
"""

from __future__ import annotations

import torch

from dtr.mixers.decaying import DecayingMixer
from dtr.ops.state_space import chunked


class Retention(DecayingMixer):
    """S_t = a S_{t-1} + (1 - a) k_t v_t^T with a fixed decay a per head; the half-life options set it for good.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        shape: options of `DecayingMixer` and `LinearMixer`.
    """

    def reset_gates(self) -> None:
        """Nothing to set: the decay is no parameter."""

    def recur(
        self,
        hidden_BTD: torch.Tensor,
        q_BTHK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHK: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        state_BHKV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Made anew each time: a buffer would be rounded to the hybrid's type.
        log_decay_H = -self.start_rates(q_BTHK.device)
        write_H1 = -torch.expm1(log_decay_H).unsqueeze(-1)
        log_decay_BTH = log_decay_H.expand(q_BTHK.shape[:3])
        k = k_BTHK * write_H1.to(k_BTHK.dtype)
        if token_mask_BT1 is not None:
            log_decay_BTH = log_decay_BTH * token_mask_BT1
            k = k * token_mask_BT1.unsqueeze(-1).to(k.dtype)
        return chunked(q_BTHK, k, v_BTHK, log_decay_BTH, state_BHKV=state_BHKV)
