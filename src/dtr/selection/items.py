"""Which validation items search may look at, in which portions, and which are kept for confirmation.

The portions are those of every strategy, also of one that never asks for a part: evaluators batch each portion on its
own, so the same hybrid has the same score, bit for bit, whatever the strategy.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

RACE_SHARE = 0.1
"""Each of the first two blocks, as a share of the items that search may look at; the third completes half of them and
the fourth is the other half. Few, as every block is batched on its own."""
MIN_RACE_ITEMS = 20
"""Smaller blocks say nothing; with fewer than six times as many items all stay together. So they do beside
confirmation items, which leave so few that ranking layers on all of them costs little and orders the path better."""
CONFIRMATION_SHARE = 0.7
"""Of the validation items, where a certificate is asked for. Selection ranks by likelihoods, which say much on few
items, while the power of a test on 0/1 scores grows only with their number (`dtr.selection.trials`; dev/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class ItemSplit:
    """Indices into a validation split; all parts disjoint, each ascending."""

    blocks: tuple[tuple[int, ...], ...]
    """Portions that strategies may score alone."""
    confirmation: tuple[int, ...] = ()
    """Looked at only once the path is settled."""

    @property
    def selection(self) -> tuple[int, ...]:
        """All items that search may look at."""
        return tuple(sorted(item for block in self.blocks for item in block))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Every part there is, for an evaluator that batches each on its own."""
        return self.blocks + ((self.confirmation,) if self.confirmation else ())


def split_items(num_items: int, *, confirmation_share: float = 0.0, seed: int = 0) -> ItemSplit:
    """A seeded draw of the confirmation items, and of blocks among the others.

    Args:
        num_items: items of the validation split.
        confirmation_share: share of them to keep for confirmation, rounded; selection keeps at least one.
        seed: of the draw.
    """
    items = list(range(num_items))
    random.Random(f"items {seed}").shuffle(items)
    num_confirmation = min(round(num_items * confirmation_share), num_items - 1)
    confirmation, selection = items[:num_confirmation], items[num_confirmation:]
    num_race = max(MIN_RACE_ITEMS, round(RACE_SHARE * len(selection)))
    ends = [0, num_race, 2 * num_race, len(selection) // 2, len(selection)]
    if confirmation or len(selection) < 6 * MIN_RACE_ITEMS:
        ends = [0, len(selection)]
    return ItemSplit(
        blocks=tuple(tuple(sorted(selection[start:end])) for start, end in itertools.pairwise(ends)),
        confirmation=tuple(sorted(confirmation)),
    )
