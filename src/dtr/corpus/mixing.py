"""Several texts as one: each gives its share of the training blocks, whatever its own length.

Block number n of the mix belongs to the text in whose part of [0, 1) the point `n * 0.618... mod 1` falls. Such points
lie evenly (Weyl's sequence of the golden ratio), so every batch is close to the shares, and which blocks a step gets
depends on its number alone, so a mix resumes as its texts do.

Shapes: `B` batch, `T` tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtr.corpus.blocks import TokenBlocks
from dtr.corpus.streaming import StreamedBlocks

GOLDEN = 2_654_435_769
"""2^32 over the golden ratio: all in whole numbers, so that every machine has the same order."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One text of a mix."""

    name: str
    share: float
    """Of the training blocks."""
    text: TokenBlocks | StreamedBlocks


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedBlocks:
    """The interface of `TokenBlocks` over several texts. Each is repeated in a new order when its share is longer.

    What is measured on comes from the first part alone, so that errors with and without a mix can be compared.
    """

    parts: Sequence[Part]
    """At least one; shares add up to 1, and all blocks have one length."""

    def __post_init__(self) -> None:
        assert abs(sum(part.share for part in self.parts) - 1) < 1e-9, "shares of a whole"
        assert len({part.text.seq_len_tokens for part in self.parts}) == 1, "all blocks have one length"

    @property
    def source(self) -> str:
        return " + ".join(f"{part.share:.3g} {part.name}" for part in self.parts)

    @property
    def seq_len_tokens(self) -> int:
        return self.parts[0].text.seq_len_tokens

    @property
    def held_out(self) -> torch.Tensor:
        """(N, T) int32, of the first part."""
        return self.parts[0].text.held_out

    @property
    def num_tokens(self) -> int:
        """Training tokens of all texts, each counted once."""
        return sum(part.text.num_tokens for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Hash of all texts and their shares, 16 hex digits."""
        facts = [[part.text.fingerprint, part.share] for part in self.parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def batch(self, step: int, *, batch_size: int, seed: int) -> torch.Tensor:
        """The batch of one optimizer step, (B, T) int64."""
        first = step * batch_size
        owners = self._owners(first, first + batch_size)
        before = torch.bincount(self._owners(0, first), minlength=len(self.parts)).tolist()
        batch = torch.empty(batch_size, self.seq_len_tokens, dtype=torch.int64)
        for number, part in enumerate(self.parts):
            rows = owners == number
            if num_blocks := int(rows.sum()):
                batch[rows] = part.text.take(before[number], num_blocks, seed=seed)
        return batch

    def first(self, num_blocks: int) -> torch.Tensor:
        """The first blocks of the first part, (num_blocks, T)."""
        return self.parts[0].text.first(num_blocks)

    def position(self) -> list[Any]:
        """What `seek` needs, by part."""
        return [part.text.position() for part in self.parts]

    def seek(self, position: list[Any]) -> None:
        """Go to a place that `position` gave."""
        for part, place in zip(self.parts, position, strict=True):
            part.text.seek(place)

    def finish(self) -> None:
        """Wait for what several ranks are making ready together, before they part."""
        for part in self.parts:
            part.text.finish()

    def _owners(self, start: int, stop: int) -> torch.Tensor:
        """Which part each block of that range comes from, (stop - start,) int64."""
        points = torch.arange(start, stop) * GOLDEN % 2**32
        bounds = torch.tensor([part.share for part in self.parts], dtype=torch.float64).cumsum(0)[:-1]
        return torch.bucketize(points, (bounds * 2**32).long(), right=True)


Text = TokenBlocks | StreamedBlocks | MixedBlocks
