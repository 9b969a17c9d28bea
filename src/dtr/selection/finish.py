"""How `auto` ends: steps of `exact` on what is left, then the layers that cost most are chosen anew."""

from __future__ import annotations

from collections.abc import Sequence

from dtr.evaluation.score import Score
from dtr.selection.gains import measure_gains
from dtr.selection.state import Search

MAX_PASSES = 25.0
"""Work to stay within: a tenth of what `exact` takes for 30 layers where nothing is shared."""
STALE_SHARE = 0.25
"""Of the layers left, those that did best in the step before are scored anew; all are where none of these passes."""
MIN_STALE = 3
NUM_EXCHANGED = 3
"""Layers that are given back at once."""
NUM_EXCHANGES = 4
"""How many such groups are tried, those that cost most first, before the search ends."""


def go_on_as_exact(search: Search, ranked: Sequence[int]) -> None:
    """Steps of `exact` while the passes last, on all items, all layers left in the first step and in the last.

    Between them those that did best in the step before, as in `lazy`: what was costly then seldom is the best now.
    """
    num_wanted = len(ranked)
    while search.goes_on() and search.path.stop_reason is None:
        remaining = [layer for layer in ranked if layer in search.remaining()]
        if not remaining:
            return
        scores: dict[int, Score] = {}
        for part in (remaining[:num_wanted], remaining[num_wanted:]):
            layers = search.affordable(part, MAX_PASSES)
            search.expect_candidates(layers)
            scores |= {layer: search.candidate(layer) for layer in layers}
            if is_passed := any(search.threshold.is_met_by(score) for score in scores.values()):
                break
        if len(scores) < len(remaining) and not is_passed:
            search.stop(
                "budget", f"After {search.passes:.1f} passes, with {len(search.path.m_opt.layers)} layers linear."
            )
            return
        search.take_best(scores)
        best_first = sorted(scores, key=lambda layer: (-scores[layer].goodness, -scores[layer].log_likelihood, layer))
        ranked = best_first + [layer for layer in remaining if layer not in scores]
        num_wanted = max(MIN_STALE, round(STALE_SHARE * len(remaining)))


def exchange(search: Search, ranked: Sequence[int], *, most: int) -> None:
    """Give back a few layers that cost much in M_opt, take steps of `exact` from there, and keep the better path.

    Args:
        search: where a path has ended.
        ranked: all layers, those to try first in front.
        most: no hybrid has more linear layers and passes, as far as is known.
    """
    while search.path.stop_reason == "p_min" and 0 < (num := len(search.path.m_opt.layers)) < most:
        layers = search.path.m_opt.layers
        linear = frozenset(layers)
        if search.passes + search.pass_share * (1 + num / 2) > MAX_PASSES:
            return
        gains = measure_gains(search, linear, (linear - {layer} for layer in layers), layers)
        costliest = sorted(layers, key=lambda layer: (-gains[layer], layer))
        for group in range(NUM_EXCHANGES):
            first = group * NUM_EXCHANGED
            given_back = costliest[first : first + _num_affordable(search)]
            if not given_back or len(given_back) == num:
                return
            _choose_anew(search, [layer for layer in reversed(costliest) if layer not in given_back], ranked)
            if len(search.path.m_opt.layers) > num:
                search.reason += f" In the end {len(given_back)} of {num} layers were chosen anew."
                break
        else:
            return


def _choose_anew(search: Search, kept: Sequence[int], ranked: Sequence[int]) -> None:
    """A path from these layers on, if it is better than the one there is."""
    before = search.path
    first = [layer for layer in before.order if layer not in kept]
    try:
        if search.start_over(kept):
            go_on_as_exact(search, list(dict.fromkeys([*first, *ranked])))
    finally:
        # Also where the time is spent in the middle.
        search.path = search.path if search.path.is_better_than(before) else before


def _num_affordable(search: Search) -> int:
    """How many layers of M_opt can be given back, so that steps of `exact` lead to more layers than it has."""
    layers = search.path.m_opt.layers
    left = MAX_PASSES - search.passes
    for num in range(NUM_EXCHANGED):
        kept = {search.layer_of[layer] for layer in layers[: len(layers) - num - 1]}
        num_candidates = sum(search.layer_of[number] not in kept for number in search.layers)
        # Half a pass for each candidate on average, and the base.
        left -= search.pass_share * (1 + num_candidates / 2)
        if left < 0:
            return num
    return NUM_EXCHANGED
