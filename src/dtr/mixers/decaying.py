"""What mixers share whose state fades: half-lives of the heads at the start."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from dtr.arch import HeadGeometry
from dtr.errors import RecipeError
from dtr.mixers.linear import LinearMixer


class DecayingMixer(LinearMixer):
    """Linear attention whose heads forget, each at a pace of its own.

    Args:
        geometry: shape of the attention that is replaced.
        layer_idx: its place in the model, where the cache keeps its state.
        min_half_life_tokens: half-life of the fastest head's memory at the start.
        max_half_life_tokens: half-life of the slowest head's memory at the start; heads are spaced geometrically.
        shape: options of `LinearMixer`.
    """

    shortest_half_life_tokens: ClassVar[float] = 0.0
    """Half-lives at the start must be longer."""

    def __init__(
        self,
        geometry: HeadGeometry,
        layer_idx: int,
        *,
        min_half_life_tokens: float = 8.0,
        max_half_life_tokens: float = 1024.0,
        **shape: Any,
    ) -> None:
        super().__init__(geometry, layer_idx, **shape)
        # Those kept here, where a server shares a layer's heads out over devices.
        self.heads = slice(None)
        self.half_lives = (min_half_life_tokens, max_half_life_tokens)
        shortest = self.shortest_half_life_tokens
        if not shortest < min_half_life_tokens <= max_half_life_tokens:
            raise RecipeError(
                "mixer.options.min_half_life_tokens",
                got=f"{min_half_life_tokens} beside max_half_life_tokens {max_half_life_tokens}",
                expected=f"two numbers above {shortest:.2g}, the smaller first",
            )

    def start_rates(self, device: torch.device | None = None) -> torch.Tensor:
        """ln 2 / half-life (num_heads,), half-lives spaced geometrically over the teacher's heads.

        Copies of a head start far apart: two that started the same would learn the same.
        """
        fast, slow = (math.log2(x) for x in self.half_lives)
        one = math.log(2) / torch.logspace(fast, slow, self.geometry.num_heads, base=2.0, device=device)
        return torch.cat([one.roll(i * len(one) // self.head_copies) for i in range(self.head_copies)])[self.heads]
