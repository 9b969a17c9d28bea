"""Which validation items search may look at, in which portions, and which are kept for confirmation.

The portions are those of every strategy, also of one that never asks for a part: evaluators batch each portion on its
own, so the same hybrid has the same score, bit for bit, whatever the strategy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHARES = (0.1, 1 / 3, 2 / 3)
"""Where the items are cut, as shares of all. The first portion is a sample on which what layers do together is tried;
a share of a third, two thirds or all ranks single layers, whichever the passes allow (`dtr.selection.auto`)."""
MIN_PORTION = 6
"""Items; no portion is smaller, as every one is batched on its own."""
CONFIRMATION_SHARE = 0.8
"""Of the validation items, where a certificate is asked for. Selection ranks by a continuous signal, which says much on
few items, while the power of a test on 0/1 scores grows only with their number (dev/LOG.md)."""


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
    def confirmation_share(self) -> float:
        """Confirmation items as a share of all."""
        return len(self.confirmation) / (len(self.confirmation) + sum(map(len, self.blocks)))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Every part there is, for an evaluator that batches each on its own."""
        return self.blocks + ((self.confirmation,) if self.confirmation else ())


def split_items(
    num_items: int, *, confirmation_share: float = 0.0, names: Sequence[str | None] = (), seed: int = 0
) -> ItemSplit:
    """A seeded draw of the confirmation items, and of blocks among the others.

    Args:
        num_items: items of the validation split.
        confirmation_share: share of them to keep for confirmation, rounded; selection keeps at least one.
        names: the group of each item (`Item.group`); items of one group stay together.
        seed: of the draw.
    """
    groups: dict[object, list[int]] = {}
    for item in range(num_items):
        name = names[item] if names else None
        groups.setdefault(name if name is not None else item, []).append(item)
    units = list(groups.values())
    random.Random(f"items {seed}").shuffle(units)
    num_selected = max(1, num_items - round(num_items * confirmation_share))
    wanted = [round(share * num_items) for share in SHARES]
    blocks: list[list[int]] = [[]]
    confirmation: list[int] = []
    num_taken = 0
    for unit in units:
        if num_taken >= num_selected:
            confirmation += unit
            continue
        is_full = len(blocks) <= len(wanted) and num_taken >= wanted[len(blocks) - 1]
        if is_full and len(blocks[-1]) >= MIN_PORTION and num_selected - num_taken >= MIN_PORTION:
            blocks.append([])
        blocks[-1] += unit
        num_taken += len(unit)
    assert num_taken + len(confirmation) == num_items
    return ItemSplit(blocks=tuple(tuple(sorted(block)) for block in blocks), confirmation=tuple(sorted(confirmation)))
