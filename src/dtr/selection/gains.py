"""What a layer costs or adds, estimated on some of the items: strategies rank layers by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, linear_regression, variance

from dtr.evaluation.score import Score
from dtr.selection.state import Search

TIE_BREAK = 1e-6
"""Of the gain in likelihood, added to each estimate: far below what an item counts."""


def measure_gains(
    search: Search,
    base: frozenset[int],
    hybrids: Iterable[frozenset[int]],
    layers: Sequence[int],
    blocks: Sequence[int] | None = None,
) -> dict[int, float]:
    """Estimated gain over `base` of the hybrid that differs from it in each layer, on some blocks or on all items."""
    blocks = blocks if len(search.blocks) > 1 else None
    hybrids = list(hybrids)
    search.expect([base, *hybrids], base=base, blocks=blocks)
    before = search.score(base, base=base, blocks=blocks)
    scores = [search.score(hybrid, base=base, blocks=blocks) for hybrid in hybrids]
    return estimate_gains(before, dict(zip(layers, scores)))


def estimate_gains(base: Score, candidates: Mapping[int, Score]) -> dict[int, float]:
    """Gain of each candidate over the base in the unit of an item, with the noise of the items shrunk away.

    Few items change sides between two hybrids, so the plain paired mean is mostly noise. The mean log-likelihood of the
    right answers moves with every item. So: predict the gain from the gain in likelihood, by a line through all
    candidates, and believe the rest of the plain gain as far as its spread exceeds the noise (empirical Bayes, as Efron
    and Morris 1975). Where likelihood says nothing, the line is flat and this is the plain gain, shrunk; what would tie
    then is set apart by likelihood, as everywhere.
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
        layer: line[layer]
        + (gains[layer] - line[layer]) * (real / (real + noise[layer]) if real else 0.0)
        + TIE_BREAK * likelihood
        for layer, likelihood in zip(gains, likelihoods)
    }
