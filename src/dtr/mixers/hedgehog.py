"""Hedgehog in the shape of the teacher's attention: softmax attention imitated by learned features.

Source: "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (arXiv 2402.04347), section
4.2; used on pretrained models in LoLCATs (arXiv 2410.10254). What differs: the maps start at the identity over the
fourth root of the head dim, so that products in the exponent start as the teacher's scores; trained to the output of
attention, not to its weights; rotary positions are kept, before the map; output gate 2 sigmoid(.) that starts as the
identity.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from dtr.arch import HeadGeometry
from dtr.mixers.linear import LinearMixer
from dtr.ops.feature_attention import chunked, features


class Hedgehog(LinearMixer):
    """o_t = sum_s f(q_t) . f(k_s) v_s / sum_s f(q_t) . f(k_s) over s <= t, with f(x) = softmax([W x, -W x]).

    Nothing is forgotten: a state is a sum over all tokens, twice as large as that of other linear mixers.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        shape: options of `LinearMixer`.
    """

    options_when_new: ClassVar[dict[str, Any]] = {"exact_first": True, "head_copies": 2}
    has_unit_keys = False

    def __init__(self, geometry: HeadGeometry, layer_idx: int, **shape: Any) -> None:
        super().__init__(geometry, layer_idx, **shape)
        size = (self.num_heads, geometry.head_dim, geometry.head_dim)
        self.q_features = nn.Parameter(torch.empty(size))
        self.k_features = nn.Parameter(torch.empty(size))

    def state_bytes(self, bytes_per_element: int) -> int:
        plain = 4 * self.num_heads * self.geometry.head_dim**2
        ours = 4 * self.num_heads * 2 * self.geometry.head_dim * (self.geometry.head_dim + 1)
        return super().state_bytes(bytes_per_element) - plain + ours

    @torch.no_grad()
    def reset_gates(self) -> None:
        identity = self.geometry.head_dim**-0.25 * torch.eye(self.geometry.head_dim)
        # Copies of a head that started the same would learn the same: each is sharper than the one before.
        sharpness = 2.0 ** torch.arange(self.head_copies).repeat_interleave(self.geometry.num_heads)
        for weight in (self.q_features, self.k_features):
            weight.copy_(sharpness[:, None, None] * identity)

    def recur(
        self,
        hidden_BTD: torch.Tensor,
        q_BTHK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHK: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        state_BHKV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = features(q_BTHK, self.q_features), features(k_BTHK, self.k_features)
        if token_mask_BT1 is not None:
            k = k * token_mask_BT1.unsqueeze(-1)
        return chunked(q, k, v_BTHK, state_BHFV=state_BHKV)
