"""Strategies `lazy` and `restore`: keep stale scores, and score again only what could still be the best.

Lazy evaluation is Minoux's (1978) for greedy maximisation: where the gain of a choice only shrinks while others are
made, a choice that is scored again and stays on top is the best. Damages of layers are not submodular, so here it is a
heuristic: a layer that became harmless meanwhile is noticed only when it comes to the top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dtr.evaluation.score import Score
from dtr.selection.state import Search


class StaleScores:
    """Gains of candidates over the hybrid that they were scored on, the newest known of each."""

    def __init__(self, score: Callable[[int], Score], expect: Callable[[Iterable[int]], None]) -> None:
        self._score, self._expect = score, expect
        self._gains: dict[int, tuple[float, float]] = {}

    def best(self, candidates: Iterable[int], current: Score) -> dict[int, Score]:
        """Scores made now, in order of asking; the one that is on top of all, stale ones included, is among them."""
        left = set(candidates)
        fresh: dict[int, Score] = {}
        self._expect(sorted(left - set(self._gains)))
        while left - set(fresh):
            unknown = sorted(left - set(self._gains))
            layer = unknown[0] if unknown else min(left, key=self._rank)
            if layer in fresh:
                break
            fresh[layer] = score = self._score(layer)
            self._gains[layer] = (score.goodness - current.goodness, score.log_likelihood - current.log_likelihood)
        return fresh

    def least_first(self, layers: Iterable[int]) -> list[int]:
        """Layers by their newest known gain, least first; all must have been scored."""

        def gain_then_index(layer: int) -> tuple[float, float, int]:
            loss, unlikelihood, index = self._rank(layer)
            return -loss, -unlikelihood, index

        return sorted(layers, key=gain_then_index)

    def _rank(self, layer: int) -> tuple[float, float, int]:
        goodness, log_likelihood = self._gains[layer]
        # Rounded, as differences of equal scores are equal only up to rounding.
        return -round(goodness, 12), -log_likelihood, layer


def lazy(search: Search) -> None:
    """Greedy replacement with stale scores; before it stops, all layers left are scored anew."""
    stale = StaleScores(search.candidate, search.expect_candidates)
    while search.goes_on():
        fresh = stale.best(search.remaining(), search.path.current)
        if not any(search.threshold.is_met_by(score) for score in fresh.values()):
            others = [layer for layer in search.remaining() if layer not in fresh]
            search.expect_candidates(others)
            fresh |= {layer: search.candidate(layer) for layer in others}
        search.take_best(fresh)


def restore(search: Search) -> None:
    """Start with every layer linear and give attention back to the layer that gains most, until P_min is reached.

    Where a layer has several mixers, its best copy is taken.
    """
    linear = frozenset(search.one_per_layer())
    score, restored = search.score(linear), []
    stale = StaleScores(
        lambda layer: search.score(linear - {layer}, base=linear),
        lambda layers: search.expect([linear - {layer} for layer in layers], base=linear),
    )
    limit = search.budget.num_linear or search.num_layers
    while linear and not (
        search.threshold.is_met_by(score) and len(linear) <= limit and search.keeps_guards(linear, sorted(linear))
    ):
        fresh = stale.best(linear, score)
        layer = min(fresh, key=lambda one: (-fresh[one].goodness, -fresh[one].log_likelihood, one))
        restored.append((layer, score))
        linear, score = linear - {layer}, fresh[layer]
    if linear and restored:
        # Those that gain least from their attention come first: a certificate tests beginnings of the path.
        search.take(stale.least_first(linear), score)
    elif linear:
        search.reason = "Every layer could go at once, so nothing ranks them: the order of the block means nothing."
        search.take(sorted(linear), score, is_ranked=False)
    if restored:
        layer, below = restored[-1]
        if len(linear) == limit and search.threshold.is_met_by(below):
            search.goes_on()
        else:
            search.stop(
                "p_min",
                f"With layer {search.layer_of[layer]} linear as well, {below.metric} would be {below.value:.6g}.",
            )
    for layer, score in reversed(restored) if search.run_to_end else ():
        search.take([layer], score)
