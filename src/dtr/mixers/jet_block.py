"""JetBlock in the shape of the teacher's attention: Gated DeltaNet whose values pass a dynamic convolution.

Source: "Jet-Nemotron" (arXiv 2508.15884): a small network makes, from each token's hidden state, the taps
of a causal convolution of the values; queries and keys have none. What differs: the taps start as the identity, nothing
follows the convolution, and the rest is as in `gated_deltanet`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry
from dtr.errors import RecipeError
from dtr.mixers.base import check_number
from dtr.mixers.gated_deltanet import GatedDeltaNet
from dtr.ops.short_convolution import RealTokens, dynamic_convolution

REDUCTION = 8
"""Hidden dim over the width of the network that makes the taps."""


class JetBlock(GatedDeltaNet):
    """Gated DeltaNet of values v'_t = sum_i c_ti * v_{t-i}, whose taps c_t depend on the token: W2 silu(W1 x_t) + b.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        dynamic_tokens: tokens that the convolution sees, the current one among them.
        options: of `GatedDeltaNet`; `conv_tokens` has no place here.
    """

    def __init__(self, geometry: HeadGeometry, layer_idx: int, *, dynamic_tokens: int = 4, **options: Any) -> None:
        if options.get("conv_tokens"):
            raise RecipeError(
                "mixer.options.conv_tokens",
                got=str(options["conv_tokens"]),
                expected="none, as jet_block has a convolution of its own",
                hint="Set dynamic_tokens.",
            )
        super().__init__(geometry, layer_idx, **options)
        check_number("dynamic_tokens", dynamic_tokens, 1)
        self.dynamic_tokens = dynamic_tokens
        width = max(1, geometry.hidden_dim // REDUCTION)
        self.taps_down_proj = nn.Linear(geometry.hidden_dim, width, bias=False)
        self.taps_up_proj = nn.Linear(width, self.num_heads * geometry.head_dim * dynamic_tokens)

    def state_bytes(self, bytes_per_element: int) -> int:
        past = (self.dynamic_tokens - 1) * self.num_heads * self.geometry.head_dim
        return super().state_bytes(bytes_per_element) + past * bytes_per_element

    @torch.no_grad()
    def reset_gates(self) -> None:
        super().reset_gates()
        nn.init.normal_(self.taps_down_proj.weight, std=self.geometry.hidden_dim**-0.5)
        nn.init.zeros_(self.taps_up_proj.weight)
        identity = torch.zeros(self.dynamic_tokens)
        identity[-1] = 1.0
        self.taps_up_proj.bias.copy_(identity.repeat(self.num_heads * self.geometry.head_dim))

    def mix_tokens(
        self,
        hidden_BTD: torch.Tensor,
        q_BTC: torch.Tensor,
        k_BTC: torch.Tensor,
        v_BTC: torch.Tensor,
        token_mask_BT1: torch.Tensor | None,
        past_inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        real = None if token_mask_BT1 is None else RealTokens(token_mask_BT1[..., 0])
        taps = self.taps_up_proj(F.silu(self.taps_down_proj(hidden_BTD))).unflatten(-1, (-1, self.dynamic_tokens))
        mixed, conv_inputs = dynamic_convolution(v_BTC, taps, past_inputs, real)
        return q_BTC, k_BTC, mixed.to(v_BTC.dtype), conv_inputs
