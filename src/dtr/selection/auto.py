"""Strategy `auto`: the quality of `exact` for a few tens of passes instead of hundreds.

What makes `exact` dear is repetition: after each swap it scores every remaining layer anew on all items, although most
layers are harmless and differ by less than the noise of the items. With few layers that is cheap, and `auto` is
`exact`. Otherwise:
1. Score the model with every layer linear. If it reaches P_min, that is the answer, after one pass.
2. Is it near P_min, go down from there (`descent`): score the restoration of every layer on all items, and give
   attention back to the best, one after the other, until P_min is reached. Few items change sides by a layer, so a
   tenth of them says nothing about layers that differ little, while a few restorations are soon tried on all.
3. Else go up from the teacher (`climb`): rank layers by what they cost alone, and by what their attention adds to the
   all-linear model, on tenths of the items. That finds layers which are harmless alone and costly in company, which no
   greedy path from the teacher can see. Commit a quarter of those left at once. Items are added while it is open
   whether P_min is reached; where it is missed, back off to half as many layers, and where a single layer passes, go
   on with two. Every commit has been scored on all items.
4. Go on as `exact` does (`finish`): score all layers left on all items, commit the best, until none passes or the
   passes are spent.
5. With passes left, restore the attention of up to three layers that cost most in the hybrid so found and go on from
   there as in step 4, then of the next three: what was committed early, by few items, is chosen anew. Not where the
   scores of steps 1 and 2 rule out that more layers can go.

Where a layer has mixers of several kinds, all layers linear means the best copy of each; every other mixer is scored in
that place, on a tenth of the items, and the kind that costs least there is the layer's from then on.

Sizes were chosen on `dtr.selection.simulation`, see `benchmarks/search_bench.py --simulate-strategies`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dtr.selection.climb import climb
from dtr.selection.descent import Descent, is_near
from dtr.selection.finish import exchange, go_on_as_exact
from dtr.selection.gains import measure_gains
from dtr.selection.greedy import exact
from dtr.selection.state import Search

MAX_LAYERS_FOR_EXACT = 8
"""So many layers cost `exact` about 20 passes."""


def auto(search: Search) -> None:
    """Down from the all-linear model or up from the teacher, then layer by layer."""
    if len(search.layers) <= MAX_LAYERS_FOR_EXACT:
        search.reason = f"{len(search.layers)} layers are few, so every candidate is scored at every step, as in exact."
        exact(search)
        return
    copies = search.one_per_layer()
    limit = min(search.budget.num_linear or len(copies), len(copies))
    may_all_go, has_kinds = limit == len(copies), len(search.layers) > len(copies)
    top = search.score(copies, base=frozenset(copies))
    gains: Mapping[int, float] = {}
    if has_kinds and not (may_all_go and search.threshold.is_met_by(top)):
        gains = _gains_of_kinds(search, copies)
        copies = list(gains)
        top = search.score(copies, base=frozenset(copies))
    is_met = search.threshold.is_met_by(top)
    if may_all_go and is_met and search.keeps_guards(frozenset(copies), copies):
        search.reason = "The model with every layer linear reaches P_min, so there was nothing to choose."
        # The order still matters: a certificate tests beginnings of the path, the safest first.
        gains = gains or _gains_of_attention(search, copies)
        search.take(sorted(copies, key=lambda layer: (gains[layer], layer)), top)
        return
    search.reason = (
        f"With every layer linear {top.metric} is {top.value:.4g}, beyond the limit of {search.threshold.value:.4g} or "
        "of what was asked for: "
    )
    ranked: list[int] = []
    most = limit
    if may_all_go and not is_met and is_near(search, top):
        descent = Descent(search, copies, top)
        ranked = descent.run()
        most = limit if has_kinds else descent.most
    if ranked:
        search.reason += "attention was given back, one after the other, to the layers that gain most from it."
    else:
        search.reason += "layers were ranked from both ends on a part of the items and committed in leaps."
        ranked = climb(search, gains or _gains_of_attention(search, copies), limit=limit)
    go_on_as_exact(search, ranked)
    exchange(search, ranked, most=most)
    for layer in [layer for layer in ranked if layer in search.remaining()] if search.goes_on() else ():
        search.take([layer], search.candidate(layer))


def _gains_of_attention(search: Search, copies: Sequence[int]) -> dict[int, float]:
    """What the attention of each layer adds to the all-linear model."""
    every = frozenset(copies)
    return measure_gains(search, every, (every - {layer} for layer in copies), copies, [0])


def _gains_of_kinds(search: Search, copies: Sequence[int]) -> Mapping[int, float]:
    """For each layer the kind that costs least where all other layers are linear, and what attention adds there."""
    every = frozenset(copies)
    copy_of = {search.layer_of[number]: number for number in copies}
    others = [number for number in search.layers if number not in every]
    gains = _gains_of_attention(search, copies)
    hybrids = (every - {copy_of[search.layer_of[number]]} | {number} for number in others)
    exchanged = measure_gains(search, every, hybrids, others, [0])
    gains |= {number: gains[copy_of[search.layer_of[number]]] - exchanged[number] for number in others}
    return {number: gains[number] for number in search.one_per_layer(sorted(gains, key=lambda n: (gains[n], n)))}
