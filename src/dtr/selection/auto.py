"""Strategy `auto`: the quality of `exact` for a few tens of passes instead of hundreds.

What makes `exact` dear is repetition: after each swap it scores every remaining layer anew on all items, although most
layers are harmless and differ by less than the noise of the items. With few layers that is cheap, and `auto` is
`exact`. Otherwise:
1. Score the model with every layer linear. If it reaches P_min, that is the answer, after one pass.
2. Give each layer its attention back in the all-linear model, on the first tenth of the items. That finds layers which
   are harmless alone and costly in company, which no greedy path from the teacher can see. In ascending order of
   layers a candidate costs half a pass over its items, as the hidden states below the change are shared.
   Should the model be at P_min with but a few of them restored, start from there.
3. Race the more harmless layers left on a tenth of the items, add both costs, and commit the harmless half of all that
   are left at once. Items are added while it is open whether P_min is reached; where it is missed, back off to half
   as many layers, and where a single layer passes, go on with two. Every commit has been scored on all items.
4. Where no single layer passes any more, or a round could overdraw the passes, go on as `exact` does: score all layers
   left on all items, commit the best, until none passes or the passes are spent.
5. With passes left, restore the attention of up to three layers that cost most in the hybrid so found and go on from
   there as in step 4, as long as that gives a better hybrid: what was committed early, by few items, is chosen anew.

Where a layer has mixers of several kinds, all layers linear means the best copy of each; step 2 also scores every other
mixer in that place, and the kind that costs least there is the layer's from then on.

Sizes were chosen on `dtr.selection.simulation`, see `benchmarks/search_bench.py --simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, linear_regression, variance

from dtr.evaluation.score import Score
from dtr.selection.greedy import exact
from dtr.selection.state import Search

MAX_PASSES = 25.0
"""Work to stay within: a tenth of what `exact` takes for 30 layers where nothing is shared."""
ROUND_PASSES = 4.0
"""What a race on a block, with its leaps and steps, may cost where nothing is shared; no round begins with less."""
MAX_LAYERS_FOR_EXACT = 8
"""So many layers cost `exact` about 20 passes."""
NUM_RACING = 12
"""Layers in a race; those that looked worse before keep their rank behind them."""
NUM_LEADERS = 2
"""Layers of a race that are scored on all items before one of them is committed."""
DESCENT = (1, 3, 6)
"""How many layers to restore at once when going down from the all-linear model."""
MAX_EXCHANGED = 3
"""Layers that are given back at once in the end."""
OPTIMISM = 1.0
"""Standard errors that a hybrid may lie below P_min on half of the items and still be scored on the rest."""


def auto(search: Search) -> None:
    """Rank from both ends, commit in leaps with back-off, then layer by layer."""
    if len(search.layers) <= MAX_LAYERS_FOR_EXACT:
        search.reason = f"{len(search.layers)} layers are few, so every candidate is scored at every step, as in exact."
        exact(search)
        return
    best_copies = search.one_per_layer()
    every = frozenset(best_copies)
    top = search.score(every, base=every)
    limit = min(search.budget.num_linear or len(every), len(every))
    if limit == len(every) and search.threshold.is_met_by(top) and search.keeps_guards(every, best_copies):
        search.reason = "The model with every layer linear reaches P_min, so there was nothing to choose."
        # The order still matters: a certificate tests beginnings of the path, the safest first.
        gains = _gains_of_attention(search, best_copies)
        search.take(sorted(best_copies, key=lambda layer: (gains[layer], layer)), top)
        return
    search.reason = (
        f"With every layer linear {top.metric} is {top.value:.4g}, beyond the limit of {search.threshold.value:.4g} or "
        "of what was asked for: layers were ranked from both ends on a part of the items and committed in leaps."
    )
    gain_of_attention = _gains_of_attention(search, best_copies)
    gain_of_attention |= _gains_over_other_kinds(search, best_copies, gain_of_attention)
    ranked = search.one_per_layer(sorted(search.layers, key=lambda layer: (gain_of_attention[layer], layer)))
    if limit == len(every):
        _descend(search, ranked, every, top)
    num_at_once = len(every)
    while num_at_once and search.goes_on() and search.path.stop_reason is None and _affords_round(search):
        ranked = _race(search, gain_of_attention, ranked)
        num_at_once = min(num_at_once, len(ranked) // 2, limit - len(search.path.order))
        num_at_once = _leap(search, ranked, num_at_once) or _step(search, ranked)
    _go_on_as_exact(search, ranked)
    _exchange(search, ranked)
    for layer in [layer for layer in ranked if layer in search.remaining()] if search.goes_on() else ():
        search.take([layer], search.candidate(layer))


def _gains_of_attention(search: Search, best_copies: Sequence[int]) -> dict[int, float]:
    """What the attention of each layer adds to the all-linear model."""
    every = frozenset(best_copies)
    return _gains(search, every, (every - {layer} for layer in best_copies), best_copies, block=0)


def _gains_over_other_kinds(
    search: Search, best_copies: Sequence[int], gain_of_attention: Mapping[int, float]
) -> dict[int, float]:
    """What attention adds where another mixer stands in the place of a layer's best copy; nothing for one kind."""
    every = frozenset(best_copies)
    copy_of = {search.layer_of[number]: number for number in best_copies}
    others = [number for number in search.layers if number not in every]
    if not others:
        return {}
    hybrids = (every - {copy_of[search.layer_of[number]]} | {number} for number in others)
    exchanged = _gains(search, every, hybrids, others, block=0)
    return {number: gain_of_attention[copy_of[search.layer_of[number]]] - exchanged[number] for number in others}


def _descend(search: Search, ranked: Sequence[int], every: frozenset[int], top: Score) -> None:
    """Give attention back to a few layers at once, those that gain most, and commit all others if P_min is reached."""
    for num_restored in DESCENT:
        layers = ranked[:-num_restored]
        linear = frozenset(layers)
        score = _score_while_open(search, linear, base=every, before=top)
        if score is not None and search.threshold.is_met_by(score) and search.keeps_guards(linear, layers):
            search.take(layers, score)
            return


def _race(search: Search, gain_of_attention: Mapping[int, float], stale: Sequence[int]) -> list[int]:
    """Remaining layers by what they cost now and in the end, least first; those not raced follow as they were ranked.

    The block of items alternates, so that the luck of one does not decide every round.
    """
    remaining = [layer for layer in stale if layer in search.remaining()]
    layers = sorted(remaining[:NUM_RACING])
    gains = _gains(
        search, search.linear, (search.linear | {layer} for layer in layers), layers, len(search.path.steps) % 2
    )
    return sorted(layers, key=lambda layer: (gain_of_attention[layer] - gains[layer], layer)) + remaining[NUM_RACING:]


def _gains(
    search: Search,
    base: frozenset[int],
    hybrids: Iterable[frozenset[int]],
    layers: Sequence[int],
    block: int | None = None,
) -> dict[int, float]:
    """Estimated gain over `base` of the hybrid that differs from it in each layer, on a block or on all items."""
    blocks = (block,) if block is not None and len(search.blocks) > 1 else None
    hybrids = list(hybrids)
    search.expect([base, *hybrids], base=base, blocks=blocks)
    before = search.score(base, base=base, blocks=blocks)
    scores = [search.score(hybrid, base=base, blocks=blocks) for hybrid in hybrids]
    return estimate_gains(before, dict(zip(layers, scores)))


def _leap(search: Search, ranked: Sequence[int], num_at_once: int) -> int:
    """Commit several layers, halving their number until it works; how many, or 0 if not even two could go."""
    while num_at_once > 1:
        layers = ranked[:num_at_once]
        linear = search.linear.union(layers)
        score = _score_while_open(search, linear)
        if score is not None and search.threshold.is_met_by(score) and search.keeps_guards(linear, layers):
            search.take(layers, score)
            return num_at_once
        num_at_once //= 2
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


def _go_on_as_exact(search: Search, ranked: Sequence[int]) -> None:
    """Steps of `exact` while the passes last: each layer left on all items, those first that did best before."""
    while search.goes_on() and search.path.stop_reason is None:
        remaining = [layer for layer in ranked if layer in search.remaining()]
        if not remaining:
            return
        layers = search.affordable(remaining, MAX_PASSES)
        search.expect_candidates(layers)
        scores = {layer: search.candidate(layer) for layer in layers}
        if len(layers) < len(remaining) and not any(search.threshold.is_met_by(score) for score in scores.values()):
            search.stop(
                "budget", f"After {search.passes:.1f} passes, with {len(search.path.m_opt.layers)} layers linear."
            )
            return
        search.take_best(scores)
        best_first = sorted(layers, key=lambda layer: (-scores[layer].goodness, -scores[layer].log_likelihood, layer))
        ranked = best_first + [layer for layer in remaining if layer not in scores]


def _exchange(search: Search, ranked: Sequence[int]) -> None:
    """Give back the layers that cost most in M_opt, take steps of `exact` from there, and keep the better path."""
    while search.path.stop_reason == "p_min" and (layers := search.path.m_opt.layers):
        first, linear = search.path, frozenset(layers)
        if search.passes + search.pass_share * (1 + len(layers) / 2) > MAX_PASSES:
            return
        gains = _gains(search, linear, (linear - {layer} for layer in layers), layers)
        kept = sorted(layers, key=lambda layer: (gains[layer], layer))[: _affordable_start(search)]
        given_back = [layer for layer in layers if layer not in kept]
        try:
            if kept and given_back and search.start_over(kept):
                _go_on_as_exact(search, list(dict.fromkeys([*given_back, *ranked])))
        finally:
            # Also where the time is spent in the middle.
            is_better = search.path.is_better_than(first)
            search.path = search.path if is_better else first
        if not is_better:
            return
        search.reason += f" In the end {len(given_back)} of {len(layers)} layers were chosen anew."


def _affordable_start(search: Search) -> int:
    """How many layers of M_opt to keep, so that steps of `exact` can be paid until there are more than M_opt has."""
    layers = search.path.m_opt.layers
    left = MAX_PASSES - search.passes
    start = len(layers)
    while start > len(layers) - MAX_EXCHANGED:
        taken = {search.layer_of[layer] for layer in layers[: start - 1]}
        num_candidates = sum(search.layer_of[number] not in taken for number in search.layers)
        # Half a pass for each candidate on average, and the base.
        left -= search.pass_share * (1 + num_candidates / 2)
        if left < 0:
            break
        start -= 1
    return start


def _score_while_open(
    search: Search, linear: frozenset[int], *, base: frozenset[int] | None = None, before: Score | None = None
) -> Score | None:
    """The score over all items, or None once half of them make it unlikely that P_min is reached.

    None, too, where the passes might not last for it and its base.
    """
    if search.passes + 2 * search.pass_share > MAX_PASSES:
        return None
    base, before = search.linear if base is None else base, before or search.path.current
    if len(search.blocks) > 1 and search.teacher.higher_is_better:
        half = tuple(range(len(search.blocks) - 1))
        ours, theirs = search.score(linear, base=base, blocks=half), search.score(base, base=base, blocks=half)
        moves = [a - b for a, b in zip(ours.per_item, theirs.per_item)]
        num, num_all = len(moves), search.teacher.num_items
        # The mean over all items is this half's and the rest's; the rest is forecast to move as this half did.
        doubt = math.sqrt(variance(moves) * (1 / num + 1 / (num_all - num))) * (num_all - num) / num_all
        if before.goodness + fmean(moves) + OPTIMISM * doubt < search.threshold.goodness:
            return None
    return search.score(linear, base=base)


def estimate_gains(base: Score, candidates: Mapping[int, Score]) -> dict[int, float]:
    """Gain of each candidate over the base in the unit of an item, with the noise of the items shrunk away.

    Few items change sides between two hybrids, so the plain paired mean is mostly noise. The mean log-likelihood of the
    right answers moves with every item. So: predict the gain from the gain in likelihood, by a line through all
    candidates, and believe the rest of the plain gain as far as its spread exceeds the noise (empirical Bayes, as Efron
    and Morris 1975). Where likelihood says nothing, the line is flat and this is the plain gain, shrunk.
    """
    sign = 1.0 if base.higher_is_better else -1.0
    gains, noise = {}, {}
    for layer, score in candidates.items():
        moves = [sign * (ours - theirs) for ours, theirs in zip(score.per_item, base.per_item)]
        gains[layer] = fmean(moves)
        noise[layer] = variance(moves) / len(moves) if len(moves) > 1 else math.inf
    if len(gains) < 4:
        return gains
    likelihoods = [score.log_likelihood - base.log_likelihood for score in candidates.values()]
    slope, intercept = 0.0, fmean(gains.values())
    if max(likelihoods) > min(likelihoods):
        slope, intercept = linear_regression(likelihoods, list(gains.values()))
        if slope < 0:
            slope, intercept = 0.0, fmean(gains.values())
    line = {layer: intercept + slope * x for layer, x in zip(candidates, likelihoods)}
    rest = variance([gains[layer] - line[layer] for layer in gains])
    real = max(0.0, rest - fmean(noise.values()))
    return {
        layer: line[layer] + (gains[layer] - line[layer]) * (real / (real + noise[layer]) if real else 0.0)
        for layer in gains
    }
