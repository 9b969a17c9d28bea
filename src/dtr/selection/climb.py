"""`auto` from the teacher up: layers are ranked from both ends on a few items and committed in leaps with back-off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

from dtr.evaluation.score import Score
from dtr.selection.finish import MAX_PASSES
from dtr.selection.gains import measure_gains
from dtr.selection.state import Search

ROUND_PASSES = 4.0
"""What a race on a block, with its leaps and steps, may cost where nothing is shared; no round begins with less."""
LEAP_SHARE = 0.25
"""Of the layers left, so many are committed at once at first."""
NUM_RACING = 12
"""Layers in a race; those that looked worse before keep their rank behind them."""
NUM_LEADERS = 2
"""Layers of a race that are scored on all items before one of them is committed."""
OPTIMISM = 1.0
"""Standard errors that a hybrid may lie below P_min on half of the items and still be scored on the rest."""


def climb(search: Search, gain_of_attention: Mapping[int, float], *, limit: int) -> list[int]:
    """Commit layers while the passes allow for further rounds.

    Args:
        gain_of_attention: of each layer to choose, what its attention adds where all of them are linear.
        limit: how many layers may become linear.

    Returns:
        these layers, as they were ranked last.
    """
    ranked = sorted(gain_of_attention, key=lambda layer: (gain_of_attention[layer], layer))
    num_at_once = limit
    while num_at_once and search.goes_on() and search.path.stop_reason is None and _affords_round(search):
        ranked = _race(search, gain_of_attention, ranked)
        num_at_once = min(num_at_once, int(LEAP_SHARE * len(ranked)), limit - len(search.path.order))
        num_at_once = leap(search, ranked[:num_at_once]) or _step(search, ranked)
    return ranked


def _race(search: Search, gain_of_attention: Mapping[int, float], stale: Sequence[int]) -> list[int]:
    """Remaining layers by what they cost now and in the end, least first; those not raced follow as they were ranked.

    The block of items alternates, so that the luck of one does not decide every round.
    """
    remaining = [layer for layer in stale if layer in search.remaining()]
    layers = sorted(remaining[:NUM_RACING])
    hybrids = (search.linear | {layer} for layer in layers)
    gains = measure_gains(search, search.linear, hybrids, layers, [len(search.path.steps) % 2])
    return sorted(layers, key=lambda layer: (gain_of_attention[layer] - gains[layer], layer)) + remaining[NUM_RACING:]


def leap(search: Search, layers: Sequence[int]) -> int:
    """Commit several layers, halving their number until it works; how many, or 0 if not even two could go.

    Where only a guard is against it, those that break its floor alone are left out for good, the others tried again.
    """
    while len(layers) > 1:
        linear = search.linear.union(layers)
        score = _score_while_open(search, linear)
        is_passed = score is not None and search.threshold.is_met_by(score)
        if score is not None and is_passed and search.keeps_guards(linear, layers):
            search.take(layers, score)
            return len(layers)
        guilty = search.refuse_guilty(layers) if is_passed else []
        layers = [layer for layer in layers if layer not in guilty] if guilty else layers[: len(layers) // 2]
    return 0


def _step(search: Search, ranked: Sequence[int]) -> int:
    """Commit the best of the leaders, or else the first layer that passes; 2, as then two at once may be tried again.

    0 where none passes, of those that half of the items or the passes left over.
    """
    tried: dict[int, Score] = {}
    for layer in ranked:
        passed = any(search.threshold.is_met_by(score) for score in tried.values())
        if len(tried) >= NUM_LEADERS and (passed or not _affords_round(search)):
            break
        score = _score_while_open(search, search.linear | {layer})
        if score is not None:
            tried[layer] = score
        elif not _affords_round(search):
            break
    if not any(search.threshold.is_met_by(score) for score in tried.values()):
        return 0
    search.take_best(tried)
    return 2


def _affords_round(search: Search) -> bool:
    # A race over all items costs half a pass for each of its layers, on average.
    price = ROUND_PASSES if len(search.blocks) > 1 else ROUND_PASSES + NUM_RACING / 2
    return search.passes + price * search.pass_share <= MAX_PASSES


def _score_while_open(search: Search, linear: frozenset[int]) -> Score | None:
    """The score over all items, or None once half of them make it unlikely that P_min is reached.

    None, too, where the passes might not last for it and its base.
    """
    if search.passes + 2 * search.pass_share > MAX_PASSES:
        return None
    if len(search.blocks) > 1 and search.teacher.higher_is_better:
        half = tuple(range(len(search.blocks) - 1))
        ours, theirs = search.score(linear, blocks=half), search.score(search.linear, blocks=half)
        moves = [a - b for a, b in zip(ours.per_item, theirs.per_item)]
        num, num_all = len(moves), search.teacher.num_items
        # The mean over all items is this half's and the rest's; the rest is forecast to move as this half did.
        doubt = math.sqrt(variance(moves) * (1 / num + 1 / (num_all - num))) * (num_all - num) / num_all
        if search.path.current.goodness + fmean(moves) + OPTIMISM * doubt < search.threshold.goodness:
            return None
    return search.score(linear)
