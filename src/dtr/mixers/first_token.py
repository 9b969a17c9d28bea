"""The first token of a sequence, where causal attention sees that token alone.

Softmax over one key is 1, so attention's output there is the token's own value through the output projection. A state
that starts empty gives something else, and nothing in the first layers tells a mixer that it is at the start.

Shapes: B batch, T tokens, D hidden dim, V value dim (all key/value heads).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtr.arch import HeadGeometry


class FirstToken(nn.Module):
    """Puts the teacher's own output at the first token of each sequence.

    The weights are the teacher's and stay so: one token of a block would not hold them where they are. Query heads that
    share a value head are added up in the output projection.
    """

    value_weight: torch.Tensor
    value_bias: torch.Tensor | None
    out_weight: torch.Tensor
    out_bias: torch.Tensor | None

    def __init__(self, geometry: HeadGeometry) -> None:
        super().__init__()
        self.geometry, value_dim = geometry, geometry.num_kv_heads * geometry.head_dim
        # Buffers: no optimizer may touch them, whose steps are of the size of its rate however small a gradient is.
        self.register_buffer("value_weight", torch.empty(value_dim, geometry.hidden_dim))
        self.register_buffer("value_bias", torch.empty(value_dim) if geometry.qkv_bias else None)
        self.register_buffer("out_weight", torch.empty(geometry.hidden_dim, value_dim))
        self.register_buffer("out_bias", torch.empty(geometry.hidden_dim) if geometry.o_bias else None)

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Take the weights of the Hugging Face attention module."""
        g = self.geometry
        self.value_weight.copy_(attention.v_proj.weight)
        by_group = attention.o_proj.weight.unflatten(1, (g.num_kv_heads, -1, g.head_dim))
        self.out_weight.copy_(by_group.sum(2, dtype=torch.float32).flatten(1))
        if self.value_bias is not None:
            self.value_bias.copy_(attention.v_proj.bias)
        if self.out_bias is not None:
            self.out_bias.copy_(attention.o_proj.bias)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        out_BTD: torch.Tensor,
        token_mask_BT: torch.Tensor | None,
        starting_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`out_BTD`, a mixer's output, with another first token where a sequence begins.

        Args:
            hidden_BTD: the layer's input.
            out_BTD: its output so far.
            token_mask_BT: 0 for padding.
            starting_rows: (B,), True for rows whose sequence has not begun before; all rows when left out.
        """
        if token_mask_BT is None and starting_rows is None:
            return torch.cat([self.value(hidden_BTD[:, :1]).to(out_BTD.dtype), out_BTD[:, 1:]], dim=1)
        is_real = (
            hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.bool) if token_mask_BT is None else token_mask_BT > 0
        )
        is_first = is_real & (is_real.cumsum(1) == 1)
        if starting_rows is not None:
            is_first = is_first & starting_rows.to(is_first.device)[:, None]
        # The first token wherever padding has put it; of a row that is all padding none is taken.
        first_B = is_first.int().argmax(1)
        firsts = hidden_BTD[torch.arange(len(first_B), device=first_B.device), first_B]
        return torch.where(is_first[..., None], self.value(firsts)[:, None].to(out_BTD.dtype), out_BTD)

    def place(self, token_mask_BT: torch.Tensor | None) -> tuple[Any, Any]:
        """Where in (B, T, D) the first tokens are, for a long prompt that is not copied for the sake of one token.

        Each row has a token that is no padding.
        """
        if token_mask_BT is None:
            return slice(None), 0
        first_B = (token_mask_BT > 0).int().argmax(1)
        return torch.arange(len(first_B), device=first_B.device), first_B

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output at first tokens, from their hidden states."""
        return F.linear(F.linear(hidden, self.value_weight, self.value_bias), self.out_weight, self.out_bias)
