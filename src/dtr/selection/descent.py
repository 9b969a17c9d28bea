"""`auto` from the all-linear model down: attention goes back to the few layers that gain most from it."""

from __future__ import annotations

from collections.abc import Sequence

from dtr.evaluation.score import Score
from dtr.selection.climb import leap
from dtr.selection.finish import MAX_PASSES
from dtr.selection.gains import measure_gains
from dtr.selection.state import Search

NEAR = 0.8
"""Of P_min; a model with every layer linear that has so much is worth starting from."""
SWEEP_SHARE = 0.5
"""Of the passes left, for the score of every layer's restoration."""
NUM_AT_ONCE = 4
"""Restorations that are scored together, on all items, those that gained most before first."""
MAX_SCORED = 12
"""So many where none of them helps."""
RESERVED_PASSES = 4.0
"""Where nothing is shared; with no more left, layers are restored in growing numbers."""


class Descent:
    """One way down.

    Args:
        search: where no layer has been committed.
        copies: one candidate for each layer, all of which are linear at first.
        top: the score of that model, below P_min.
    """

    def __init__(self, search: Search, copies: Sequence[int], top: Score) -> None:
        self._search = search
        self._copies = list(copies)
        self._linear, self._score = frozenset(copies), top
        self.most = len(copies) - 1
        """No hybrid with more of these layers passes, as far as is known."""

    def run(self) -> list[int]:
        """Restore layer by layer until P_min is reached, and commit the rest if the guards agree.

        Returns:
            all layers, those restored last first; none where nothing could be committed.
        """
        search, restored = self._search, list[int]()
        ranked, knows_all = self._rank()
        num_at_once = 1
        while self._linear and not search.threshold.is_met_by(self._score):
            left = [layer for layer in reversed(ranked) if layer in self._linear]
            if self._affords_choice():
                chosen = [self._best(left, len(left) if knows_all and not restored else NUM_AT_ONCE)]
            elif search.passes + 2 * search.pass_share <= MAX_PASSES:
                num_at_once *= 2
                chosen = left[:num_at_once]
            else:
                return []
            base, self._linear = self._linear, self._linear.difference(chosen)
            self._score = search.score(self._linear, base=base)
            restored += chosen
            if knows_all and len(restored) == 1 and not search.threshold.is_met_by(self._score):
                self.most -= 1
        kept = [layer for layer in ranked if layer in self._linear]
        if not kept:
            return []
        if search.keeps_guards(self._linear, kept):
            search.take(kept, self._score)
        else:
            leap(search, kept)
        return [*reversed(restored), *kept] if search.path.order else []

    def _rank(self) -> tuple[list[int], bool]:
        """Layers by what their attention adds to the model with none, least first; and whether all items say so."""
        search, every = self._search, self._linear
        knows_all = affords_sweep(search, 1.0)
        hybrids = (every - {layer} for layer in self._copies)
        blocks = None if knows_all else range(len(search.blocks) - 1)
        gains = measure_gains(search, every, hybrids, self._copies, blocks)
        return sorted(self._copies, key=lambda layer: (gains[layer], layer)), knows_all

    def _best(self, layers: Sequence[int], num_at_once: int) -> int:
        """The layer whose attention adds most, of the first few; of more where none of these adds anything."""
        scores: dict[int, Score] = {}
        for first in range(0, len(layers), num_at_once):
            part = layers[first : first + num_at_once]
            self._search.expect([self._linear - {layer} for layer in part], base=self._linear)
            scores |= {layer: self._search.score(self._linear - {layer}, base=self._linear) for layer in part}
            helps = any(score.goodness > self._score.goodness for score in scores.values())
            if helps or len(scores) >= MAX_SCORED or not self._affords_choice():
                break
        return min(scores, key=lambda layer: (-scores[layer].goodness, -scores[layer].log_likelihood, layer))

    def _affords_choice(self) -> bool:
        search = self._search
        return search.passes + search.pass_share * (RESERVED_PASSES + NUM_AT_ONCE) <= MAX_PASSES


def is_near(search: Search, top: Score) -> bool:
    """Whether the model with every layer linear is a good beginning, and half of the items can rank its layers."""
    share = 0.5 if len(search.blocks) > 1 else 1.0
    return top.goodness >= NEAR * search.threshold.goodness and affords_sweep(search, share)


def affords_sweep(search: Search, share: float) -> bool:
    """Whether every layer's restoration can be scored on so much of the items."""
    price = share * search.pass_share * (1 + search.num_layers / 2)
    return price <= SWEEP_SHARE * (MAX_PASSES - search.passes)
