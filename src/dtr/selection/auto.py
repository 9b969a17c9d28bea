"""Strategy `auto`: a continuous signal ranks the layers, the metric decides how many of them go.

Whether a question is answered rightly changes with few layers, so on a few hundred items 0/1 scores can hardly rank
them. How far each answer is from changing sides (`Score.signals`) moves with every layer. So:
1. *Each layer alone*: the mean loss of the signal when only this layer is linear, on as many items as three
   tenths of the passes allow. Where a layer has mixers of several kinds, the one that costs least is taken.
2. *Together*: lazy greedy (Minoux 1978) by that loss, to the last layer. The next layer is the one that costs least in
   company of those before it; only the front runner is measured anew, until one stays in front. What company adds to a
   layer's cost is measured on a tenth of the items and added to what it costs alone.
3. *The metric decides*: bisection for the longest beginning of that order that reaches P_min on all items. The orders
   that need no further measurement (by cost alone, by the metric alone, by distillation error) are tried one layer
   further, and followed where they reach it, so the result is never below the best beginning of any of them.
4. *One by one*: the layers left are tried in order, as long as one of them passes and the passes last.

A hybrid is given up as soon as no outcome of the items left could bring it to P_min. Under a certificate (the default)
steps 3 and 4 are left to the confirmation items: the order is all that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dtr.evaluation.score import Score
from dtr.selection.exact import exact
from dtr.selection.registry import strategy
from dtr.selection.state import Search

MAX_PASSES = 25.0
"""Work to stay within: a tenth of what `exact` takes for 30 layers where nothing is shared."""
ALONE_PASSES = 0.3 * MAX_PASSES
"""For step 1: enough for 30 layers on all items where choices share their prompt, as then a pass costs half."""
TOGETHER_PASSES = 0.2 * MAX_PASSES
"""For step 2, after which layers keep the rank they have. Step 3 takes a pass for each halving of the layers and one
for each cheap order; what is left is for step 4."""
MAX_LAYERS_FOR_EXACT = 8
"""So many layers cost `exact` about 20 passes."""


@strategy("auto")
def auto(search: Search) -> None:
    """Rank by the signal, cut by the metric."""
    copies = search.one_per_layer()
    if len(search.layers) <= MAX_LAYERS_FOR_EXACT:
        search.reason = f"{len(search.layers)} layers are few, so every candidate is scored at every step, as in exact."
        exact(search)
        return
    limit = min(search.budget.num_linear or len(copies), len(copies))
    if not search.is_certified and limit == len(copies) and _take_all(search, copies):
        return
    ranking = _rank(search)
    if search.is_certified:
        search.reason = "Layers are ranked by the mean loss of a continuous signal, each in company of those before it."
        search.propose(ranking.order)
        return
    cut = _Cut(search, limit)
    cut.bisect(ranking.order)
    for order in ranking.cheap_orders:
        cut.try_further(order)
    search.reason = (
        "Layers were ranked by the mean loss of a continuous signal, each in company of those before it; the metric "
        f"found {len(cut.kept)} of them to go together."
    )
    cut.commit()
    _one_by_one(search, [layer for layer in ranking.order if layer in search.remaining()])


def _take_all(search: Search, copies: Sequence[int]) -> bool:
    """Make every layer linear at once if that hybrid keeps all limits, in the order of what each costs alone."""
    every = frozenset(copies)
    score = search.score_while_open(every, base=every)
    if score is None or not search.threshold.is_met_by(score) or not search.keeps_guards(every, copies):
        return False
    search.reason = "The model with every layer linear reaches P_min, so there was nothing to choose."
    alone = _losses_alone(search, copies, 1)
    search.take(sorted(copies, key=lambda layer: (alone[layer], layer)), score)
    return True


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    order: list[int]
    cheap_orders: list[list[int]]
    """Orders that need no further measurement."""


def _rank(search: Search) -> _Ranking:
    """Steps 1 and 2."""
    num_blocks = _num_blocks_for_singles(search)
    alone = _losses_alone(search, search.layers, num_blocks)
    copies = search.one_per_layer(sorted(search.layers, key=lambda layer: (alone[layer], layer)))
    scores = {layer: search.signals(frozenset({layer}), base=frozenset(), num_blocks=num_blocks) for layer in copies}
    by_metric = sorted(copies, key=lambda layer: (-scores[layer].goodness, -scores[layer].log_likelihood, layer))
    nmse = search.facts("nmse") if search.facts else {}
    by_error = [sorted(copies, key=lambda layer: (nmse[layer], layer))] if all(x in nmse for x in copies) else []
    return _Ranking(order=_lazy_greedy(search, copies, alone), cheap_orders=[copies, by_metric, *by_error])


def _num_blocks_for_singles(search: Search) -> int:
    """How many portions of the items each layer alone is scored on: what `ALONE_PASSES` allow, at least the first."""
    items, num_blocks = 0, 1
    # A single layer costs half a pass on average: what is below it is known.
    price_per_item = search.pass_share * len(search.layers) / 2 / search.teacher.num_items
    for number, block in enumerate(search.blocks, start=1):
        items += len(block)
        if items * price_per_item <= ALONE_PASSES:
            num_blocks = number
    return num_blocks


def _losses_alone(search: Search, layers: Sequence[int], num_blocks: int) -> dict[int, float]:
    """Mean loss of the signal when only this layer is linear."""
    teacher = frozenset[int]()
    search.expect_signals([frozenset({layer}) for layer in layers], base=teacher, num_blocks=num_blocks)
    before = _signal(search.signals(teacher, base=teacher, num_blocks=num_blocks))
    return {
        layer: before - _signal(search.signals(frozenset({layer}), base=teacher, num_blocks=num_blocks))
        for layer in layers
    }


def _lazy_greedy(search: Search, copies: Sequence[int], alone: dict[int, float]) -> list[int]:
    """All layers, each the one that costs least in company of those before it, as far as is known."""

    def sampled(linear: frozenset[int], base: frozenset[int]) -> float:
        return _signal(search.signals(linear, base=base, num_blocks=1))

    linear: frozenset[int] = frozenset()
    current = sampled(linear, linear)
    # Alone, on the sample: what company adds is the difference to it, so that the luck of these few items cancels.
    first = {layer: current - sampled(frozenset({layer}), linear) for layer in copies}
    known, order, most_passes = dict(alone), list[int](), search.passes + TOGETHER_PASSES
    while len(order) < len(copies):
        fresh: dict[int, float] = {}
        while True:
            layer = min((x for x in copies if x not in linear), key=lambda x: (known[x], x))
            if layer in fresh or not order or search.passes > most_passes:
                break
            fresh[layer] = current - sampled(linear | {layer}, linear)
            known[layer] = _finite(alone[layer] + fresh[layer] - first[layer])
        current -= fresh.get(layer, first[layer])
        linear |= {layer}
        order.append(layer)
    return order


def _signal(score: Score) -> float:
    """The mean signal; of scores that have none, how good they are."""
    value = score.signal if score.signals or score.log_likelihood else score.goodness
    return value if math.isfinite(value) else -1e9


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else 1e9


@dataclass
class _Cut:
    """The longest beginning of some order that keeps all limits, as far as it has been tried."""

    search: Search
    limit: int
    """How many layers may go."""
    kept: list[int] = field(default_factory=list)
    passed: dict[tuple[int, ...], Score] = field(default_factory=dict)
    """Beginnings that keep all limits."""

    def bisect(self, order: Sequence[int], low: int = 0) -> None:
        """Halve the range between a length that passes and one that does not, or that may not be asked for."""
        high = self.limit
        if low < high and self._passes(order[:high]):
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._passes(order[:middle]) else (low, middle)

    def try_further(self, order: Sequence[int]) -> None:
        """Whether this order reaches further: if it does, its next beginning passes too."""
        size = len(self.kept) + 1
        linear = frozenset(order[:size])
        is_affordable = self.search.passes + self.search.price(linear, base=linear) <= MAX_PASSES
        if size <= self.limit and is_affordable and self._passes(order[:size]):
            self.bisect(order, size)

    def commit(self) -> None:
        """Take the beginnings that passed, one step for each."""
        done = 0
        for layers, score in sorted(self.passed.items(), key=lambda one: len(one[0])):
            if len(layers) > done and list(layers) == self.kept[: len(layers)]:
                self.search.take(layers[done:], score)
                done = len(layers)

    def _passes(self, layers: Sequence[int]) -> bool:
        linear = frozenset(layers)
        if known := next((one for one in self.passed if frozenset(one) == linear), None):
            score = self.passed[known]
        else:
            found = self.search.score_while_open(linear, base=linear)
            if found is None or not self.search.threshold.is_met_by(found):
                return False
            if not self.search.keeps_guards(linear, list(layers)):
                return False
            score = found
        self.passed[tuple(layers)] = score
        if len(layers) > len(self.kept):
            self.kept = list(layers)
        return True


def _one_by_one(search: Search, order: Sequence[int]) -> None:
    """Try the layers left, the next of the order first, and go on from each that passes."""
    left, is_exhausted, found = list(order), False, True
    while found and search.goes_on() and search.path.stop_reason is None:
        found = False
        for layer in left:
            if is_exhausted := search.passes + _price(search, layer) > MAX_PASSES:
                break
            score = search.score_while_open(search.linear | {layer})
            if score is not None and search.threshold.is_met_by(score):
                found = True
                search.take_best({layer: score})
                break
        left = [layer for layer in left if layer in search.remaining()]
    if left and is_exhausted:
        passes, num = search.passes, len(search.path.m_opt.layers)
        text = f"Search budget exhausted after {passes:.1f} passes, with {num} layers linear; more layers may go."
        search.stop("budget", text)
    elif left and search.path.stop_reason is None:
        search.take_best({left[0]: search.candidate(left[0])})
    for layer in [layer for layer in left if layer in search.remaining()] if search.goes_on() else ():
        search.take([layer], search.candidate(layer))


def _price(search: Search, layer: int) -> float:
    return search.price(search.linear | {layer}, base=search.linear)
