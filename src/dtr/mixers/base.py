"""What every mixer has in common: it takes the place of an attention module, with the same inputs and kind of output.

Shapes: B batch, T tokens, D hidden dim, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from dtr.arch import HeadGeometry
from dtr.errors import RecipeError


class HeadNorm(nn.Module):
    """RMS norm over the head dim with a weight, as Qwen3 applies it to queries and keys."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        x = x_BTHK.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(x_BTHK.dtype)


class Mixer(nn.Module):
    """Stands in for one attention module of the teacher.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
    """

    needs_calibration = False
    """Whether `calibrate` wants to see a batch of the teacher's inputs and outputs before training."""
    is_pure_linear = True
    """False where softmax attention on a window takes part: on shorter prompts that is full attention."""
    exact_first = False
    """Whether the output at a sequence's first token is the teacher's and passes by the output projection."""
    operation: ClassVar[str | None] = None
    """Its recurrence by the name that `dtr.ops.backend` has for it; None where there are plain operations alone."""
    options_when_new: ClassVar[dict[str, Any]] = {}
    """Options that a new bank gives this kind unless told otherwise, and names; those that a bank or hybrid does not
    name are as `__init__` has them."""

    def __init__(self, geometry: HeadGeometry, layer_idx: int) -> None:
        super().__init__()
        self.geometry, self.layer_idx = geometry, layer_idx

    @classmethod
    def misfit(cls, geometry: HeadGeometry) -> str:
        """What of the attention this kind has no place for, so that it cannot stand in; empty where it can."""
        return ""

    @property
    def output_projection(self) -> nn.Linear:
        """The last linear map, from all heads to the hidden dim."""
        raise NotImplementedError

    def state_bytes(self, bytes_per_element: int) -> int:
        """Bytes that a cache keeps for one sequence: float32 states, and other tensors of the given element size."""
        return 4 * self.geometry.num_heads * self.geometry.head_dim**2

    def start_from(self, attention: Any) -> None:
        """Set all weights from those of the Hugging Face attention module that this mixer will stand in for."""
        raise NotImplementedError

    def calibrate(self, hidden_BTD: torch.Tensor, target_BTD: torch.Tensor) -> None:
        """Fit start values in closed form to the teacher's output on its input; called once, before training."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        token_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Stand in for an attention module.

        Args:
            hidden_states: (B, T, D), the input of the attention.
            position_embeddings: cos and sin, (B or 1, T, K) each.
            attention_mask: ignored; a recurrence is causal by itself.
            past_key_values: a HybridCache, or None.
            token_mask: (B, at least T), 0 where a token is padding; the last T columns belong to these tokens.

        Returns:
            (B, T, D) and None in place of attention weights.
        """
        raise NotImplementedError

    def _repeat_heads(self, weight: torch.Tensor, times: int) -> torch.Tensor:
        """Repeat each key/value head's rows as grouped-query attention does: head h uses group h // times."""
        per_head = weight.unflatten(0, (-1, self.geometry.head_dim)) if times > 1 else weight
        return per_head.repeat_interleave(times, dim=0).flatten(0, 1) if times > 1 else weight


def check_number(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int) or value < lowest:
        raise RecipeError(f"mixer.options.{name}", got=repr(value), expected=f"a whole number from {lowest} up")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"mixer.options.{name}", got=repr(value), expected="true or false")
