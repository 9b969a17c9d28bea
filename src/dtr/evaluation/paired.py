"""Is a hybrid really worse than its teacher? Paired differences over the same items, and intervals for plots. No torch.

These intervals describe one hybrid named in advance. A hybrid that was chosen as the best of many on the very items it
is compared on looks better than it is, and no interval here corrects for that: compare on the test split.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from dtr.evaluation.score import Score


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Hybrid minus teacher, item by item, in the unit of `Grade.value`."""

    mean: float
    """Mean over items, each counted once. Negative is worse for accuracy, positive is worse for perplexity, whose items
    are mean negative log-likelihoods in nats (and whose `value` weighs them by tokens, which this mean does not)."""
    stderr: float
    """Standard error of `mean` over items; infinite for one item."""
    ci95_low: float
    ci95_high: float
    """Student's t interval, mean -/+ t(0.975, n - 1) * stderr: exact for normal differences, and by the central limit
    theorem good for 0/1 items once about 10 of them differ. With no differing item it has width 0, which only says
    that the items cannot tell the two apart."""
    num_items: int
    relative_drop: float | None
    """As the function of that name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, which has no infinity: None in its place."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def paired_difference(hybrid: Score, teacher: Score) -> PairedDifference:
    """Compare two scores of the same metric over the same items in the same order.

    Pairing takes out what both models find hard in an item, so the interval is narrower than from two separate errors.
    """
    assert hybrid.metric == teacher.metric, f"{hybrid.metric} against {teacher.metric}"
    num_items = len(hybrid.per_item)
    assert num_items == len(teacher.per_item), f"{num_items} against {len(teacher.per_item)} items"
    assert num_items > 0, "a paired difference needs per-item values"
    differences = [ours - theirs for ours, theirs in zip(hybrid.per_item, teacher.per_item)]
    mean = math.fsum(differences) / num_items
    stderr = half_width = math.inf
    if num_items > 1:
        variance = math.fsum((d - mean) ** 2 for d in differences) / (num_items - 1)
        stderr = math.sqrt(variance / num_items)
        half_width = _t_quantile(0.975, num_items - 1) * stderr
    return PairedDifference(
        mean=mean,
        stderr=stderr,
        ci95_low=mean - half_width,
        ci95_high=mean + half_width,
        num_items=num_items,
        relative_drop=relative_drop(hybrid, teacher),
    )


def relative_drop(hybrid: Score, teacher: Score) -> float | None:
    """Share of the teacher's goodness that is lost, 0.05 for a 5 % drop; negative for a gain, None if it has none."""
    if teacher.goodness == 0:
        return None
    return (teacher.goodness - hybrid.goodness) / teacher.goodness


def mean_confidence_interval(score: Score, *, confidence: float = 0.95) -> tuple[float, float]:
    """Low and high end of an interval for `score.value`, to be drawn around it.

    - 0/1 items: Wilson's score interval (Wilson 1927), which stays within 0 and 1 and is not empty at the ends. Also
      taken for a value within 0 and 1 that came without items: no other such items vary more.
    - perplexity and other metrics where lower is better: normal on the log scale, so that the low end stays positive.
    - anything else: normal, from `score.stderr`.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    if score.higher_is_better and 0 <= score.value <= 1 and all(item in (0.0, 1.0) for item in score.per_item):
        n, p = score.num_items, score.value
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half_width = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # At p = 0 or 1 the ends are exact, and rounding must not put p outside of them.
        return max(0.0, min(p, center - half_width)), min(1.0, max(p, center + half_width))
    if not score.higher_is_better:
        factor = math.exp(z * score.stderr / score.value)
        return score.value / factor, score.value * factor
    return score.value - z * score.stderr, score.value + z * score.stderr


def margins_over_limit(hybrid: Score, teacher: Score, *, p_min: float, p_min_kind: str) -> list[float]:
    """What each item adds to "the hybrid reaches P_min": their mean is at least 0 exactly when it does.

    Accuracy: hybrid - p_min * teacher (relative) or hybrid - p_min (absolute). Perplexity: the same in nats,
    teacher - hybrid - log(p_min) or log(p_min) - hybrid, with each item counted once whatever its number of tokens.
    """
    assert len(hybrid.per_item) == len(teacher.per_item) > 0, "paired margins need the same items"
    pairs = zip(hybrid.per_item, teacher.per_item)
    if hybrid.higher_is_better:
        return [ours - (p_min * theirs if p_min_kind == "relative" else p_min) for ours, theirs in pairs]
    return [
        (theirs - math.log(p_min) if p_min_kind == "relative" else math.log(p_min)) - ours for ours, theirs in pairs
    ]


def lowest_margin(hybrid: Score, p_min: float) -> float | None:
    """The least that an item can add to the margins over P_min; None for metrics that are not between 0 and 1."""
    return -p_min if hybrid.higher_is_better and all(0 <= value <= 1 for value in hybrid.per_item) else None


def score_statistic(values: Sequence[float], *, above: float = 0.0, lowest: float | None = None) -> float:
    """How many standard errors the mean of `values` lies above a bound, for a one-sided test that it does.

    The variance is the one that is likeliest if the true mean were the bound itself (a score test). With the outcomes
    of two models on the same items this is the test for the ratio of paired proportions of Nam and Blackwelder (2002),
    Statistics in Medicine 21:689. The plain t statistic rejects far too often when few items differ, as it takes a
    sample without a single loss for proof that losses do not happen; here the fitted distribution holds some at
    `lowest`. Fitted as an empirical likelihood (Owen 1988) with one more atom at `lowest`.

    Args:
        values: one per item.
        above: the bound.
        lowest: smallest value that an item can have; None if there is none, which gives the t statistic.

    Returns:
        the statistic, compared with a standard normal quantile; infinite if a bound below all values is no test.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    gap = mean - above
    if lowest is None:
        variance = math.fsum((v - mean) ** 2 for v in values) / max(n - 1, 1)
    elif gap <= 0:
        variance = math.fsum((v - above) ** 2 for v in values) / n
    else:
        variance = _null_variance(Counter(v - above for v in values), lowest - above, n)
    if variance == 0:
        return math.copysign(math.inf, gap) if gap else 0.0
    return gap / math.sqrt(variance / n)


def mean_lower_bound(values: Sequence[float], *, confidence: float, lowest: float | None = None) -> float:
    """One-sided lower confidence bound of the true mean: all larger bounds fail `score_statistic` at `confidence`."""
    z = NormalDist().inv_cdf(confidence)
    mean = math.fsum(values) / len(values)
    if lowest is None:
        variance = math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
        return mean - _t_quantile(confidence, max(len(values) - 1, 1)) * math.sqrt(variance / len(values))
    low, high = lowest, mean
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if score_statistic(values, above=middle, lowest=lowest) >= z else (low, middle)
    return low


def _null_variance(counts: Counter[float], lowest: float, n: int) -> float:
    """Variance of the likeliest distribution with mean 0 over the values seen and `lowest`; their mean is above 0."""
    assert lowest < 0, "with no value below the bound there is nothing to test"
    # Lagrange's condition: weights n_k / n / (1 + t v_k) with mean 0, t between 0 and -1 / lowest.
    small, large = 0.0, -1.0 / lowest
    for _ in range(60):
        tilt = (small + large) / 2
        drift = sum(k * v / (1 + tilt * v) for v, k in counts.items())
        small, large = (tilt, large) if drift > 0 else (small, tilt)
    weights = {v: k / n / (1 + small * v) for v, k in counts.items()}
    rest = max(0.0, 1.0 - math.fsum(weights.values()))
    return math.fsum(w * v * v for v, w in weights.items()) + rest * lowest * lowest


def _t_quantile(probability: float, num_degrees: int) -> float:
    """Quantile of Student's t by its expansion around the normal one (Abramowitz & Stegun 26.7.5, four terms).

    At probability 0.975 it is 11 % low for one degree of freedom, 0.8 % for two, 0.01 % for five and less beyond.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / num_degrees**power for power, term in enumerate(terms, start=1))
