"""Does a hybrid keep what was promised? Paired tests and intervals over the same items. No torch.

All of them describe one hybrid named in advance. A hybrid that was chosen as the best of many on the very items it is
compared on looks better than it is, and nothing here corrects for that: compare on items that chose nothing.

Items of one group (`Score.groups`) err together, so what is counted is groups: their sums are the sample. Items with
weights (`Score.weights`, tokens of a perplexity) count by them, as in the metric, so that the tested null is the
promise itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import optimize, special

from dtr.evaluation.score import Score

ONE_SIDED = 0.025
"""Level of each end of a 95 % interval, and of the verdicts `held` and `not held`: one-sided, 2.5 % wrong at most."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Hybrid minus teacher, item by item, in the unit of `Grade.value`."""

    mean: float
    """Mean over items, weighted as the metric is. Negative is worse for accuracy, positive is worse for perplexity,
    whose items are mean negative log-likelihoods in nats."""
    stderr: float
    """Standard error of `mean` over items or groups of items; infinite for one."""
    ci95_low: float
    ci95_high: float
    """Student's t interval, mean -/+ t(0.975, n - 1) * stderr, of n items or groups: exact for normal differences, and
    by the central limit theorem good for 0/1 items once about 10 of them differ. With no differing item it has width
    0, which only says that the items cannot tell the two apart."""
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
    weights = _weights(hybrid)
    mean = math.fsum(w * d for w, d in zip(weights, differences)) / num_items
    # By the delta method: what each unit adds to the weighted mean beyond its expectation.
    sums = _unit_sums([w * (d - mean) for w, d in zip(weights, differences)], hybrid)
    stderr = half_width = math.inf
    if len(sums) > 1:
        variance = math.fsum(x * x for x in sums) * len(sums) / (len(sums) - 1)
        stderr = math.sqrt(variance) / num_items
        half_width = float(special.stdtrit(len(sums) - 1, 1 - ONE_SIDED)) * stderr
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
    z = float(special.ndtri(0.5 + confidence / 2))
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


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a hybrid keeps against a limit: tested at 2.5 % on each side, with the 95 % interval of the same test."""

    measured: float
    """Hybrid over teacher where `is_share` (of a perplexity: 1.05 is 5 % worse), else the metric itself."""
    low: float
    high: float
    limit: float
    """In the unit of `measured`."""
    is_share: bool
    higher_is_better: bool
    held: bool | None
    """True: above the limit at 2.5 % one-sided. False: below it. None: the items cannot tell."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def kept_against(hybrid: Score, teacher: Score, *, p_min: float, p_min_kind: str) -> Kept | None:
    """Test on items that chose nothing whether the promise holds; None where the teacher's score rules out a share."""
    is_share, higher = p_min_kind == "relative", hybrid.higher_is_better
    if not hybrid.per_item or (is_share and not (math.isfinite(teacher.goodness) and teacher.goodness > 0)):
        return None

    def at(limit: float) -> Callable[[str], float]:
        margins = margins_over_limit(hybrid, teacher, p_min=limit, p_min_kind=p_min_kind)
        return lambda side: p_value(margins, side=side)

    test = at(p_min)
    held = True if test("above") <= ONE_SIDED else False if test("below") <= ONE_SIDED else None
    measured = (hybrid.goodness / teacher.goodness) if is_share else hybrid.value
    ends = [_end(at, measured, side, higher=higher or is_share) for side in ("above", "below")]
    limit = p_min
    if is_share and not higher:
        # Perplexity is told as a factor: keeping a share s of 1 / perplexity means at most 1 / s times the teacher's.
        measured, limit = 1 / measured, 1 / p_min
        ends = [math.inf if end == 0 else 1 / end for end in ends]
    return Kept(
        measured=measured,
        low=min(ends),
        high=max(ends),
        limit=limit,
        is_share=is_share,
        higher_is_better=higher,
        held=held,
    )


def _end(at: Callable[[float], Callable[[str], float]], measured: float, side: str, *, higher: bool) -> float:
    """The limit at which the test on this side is just met: one end of the interval."""
    # `above` is met by all limits that are easy enough; with a metric where lower is better those are the large ones.
    falls = (side == "above") == higher
    gap = lambda limit: at(limit)(side) - ONE_SIDED  # noqa: E731
    near, far = max(measured, 1e-9), max(measured, 1e-9)
    for _ in range(60):
        far = far * 0.9 if falls else far * 1.1 + 1e-6
        if gap(far) <= 0:
            return float(optimize.brentq(gap, min(near, far), max(near, far), xtol=1e-6)) if gap(near) > 0 else near
    return 0.0 if falls else math.inf


@dataclass(frozen=True, kw_only=True)
class Margins:
    """What each item adds to "the hybrid reaches P_min": their mean is at least 0 exactly when it does."""

    per_item: tuple[float, ...]
    sums: tuple[float, ...]
    """By group; the items themselves where each stands alone."""
    deviations: tuple[float, ...] = ()
    """The same of each item's weight times its distance to the weighted mean: what groups of unequal size or weight
    differ by beyond their size (the delta method for a ratio)."""
    lowest: float | None = None
    """The least that one entry of `sums` can be; None for metrics that are not between 0 and 1."""
    highest: float | None = None
    trials: tuple[int, int, float] | None = None
    """Failures, number of trials and the failure rate at the limit, where that is all there is to know: 0/1 items that
    stand alone, and no item gained over the teacher (or a limit that does not look at the teacher)."""


def margins_over_limit(hybrid: Score, teacher: Score, *, p_min: float, p_min_kind: str) -> Margins:
    """Accuracy: hybrid - p_min * teacher (relative) or hybrid - p_min (absolute).

    Perplexity: the same in nats, teacher - hybrid - log(p_min) or log(p_min) - hybrid, weighted by tokens.
    """
    assert len(hybrid.per_item) == len(teacher.per_item) > 0, "paired margins need the same items"
    pairs, relative = list(zip(hybrid.per_item, teacher.per_item)), p_min_kind == "relative"
    if not hybrid.higher_is_better:
        weights = _weights(hybrid)
        shifts = [(theirs - math.log(p_min)) if relative else math.log(p_min) for _, theirs in pairs]
        values = [w * (shift - ours) for w, shift, (ours, _) in zip(weights, shifts, pairs)]
        return Margins(
            per_item=tuple(values), sums=_unit_sums(values, hybrid), deviations=_deviations(values, weights, hybrid)
        )
    values = [ours - (p_min * theirs if relative else p_min) for ours, theirs in pairs]
    if not all(0 <= x <= 1 for pair in pairs for x in pair):
        deviations = _deviations(values, _weights(hybrid), hybrid)
        return Margins(per_item=tuple(values), sums=_unit_sums(values, hybrid), deviations=deviations)
    size = max(Counter(hybrid.groups).values(), default=1)
    trials = None
    if not hybrid.groups and all(x in (0.0, 1.0) for pair in pairs for x in pair):
        if not relative and 0 < p_min < 1:
            trials = (sum(ours == 0 for ours, _ in pairs), len(pairs), 1 - p_min)
        elif relative and p_min < 1 and all(ours <= theirs for ours, theirs in pairs):
            asked = [ours for ours, theirs in pairs if theirs == 1.0]
            trials = (sum(ours == 0 for ours in asked), len(asked), 1 - p_min)
    return Margins(
        per_item=tuple(values),
        sums=_unit_sums(values, hybrid),
        deviations=_deviations(values, _weights(hybrid), hybrid),
        lowest=-p_min * size,
        highest=(1.0 if relative else 1.0 - p_min) * size,
        trials=trials,
    )


def p_value(margins: Margins, *, side: str = "above") -> float:
    """One-sided p-value that the mean of the margins truly lies above 0 (or below it).

    - 0/1 items without a gain: failures among trials, by the exact binomial distribution.
    - Other metrics between 0 and 1: a score test, whose variance is that of the likeliest distribution with mean 0.
    - Anything else: Student's t.
    """
    if margins.trials is not None:
        failures, num, rate = margins.trials
        return float(special.bdtr(failures, num, rate) if side == "above" else special.bdtrc(failures - 1, num, rate))
    sign = 1.0 if side == "above" else -1.0
    values = [sign * x for x in margins.sums]
    far = margins.lowest if side == "above" else margins.highest
    if far is not None:
        lowest = far if side == "above" else -far
        score = score_statistic(values, lowest=lowest)
        if margins.sums == margins.per_item:
            return float(special.ndtr(-score))
        # Groups are few and unlike: the more careful of the two.
        return max(float(special.ndtr(-score)), _t_p_value(values, margins.deviations))
    return _t_p_value(values, margins.deviations)


def _t_p_value(values: Sequence[float], deviations: Sequence[float]) -> float:
    n, total = len(values), math.fsum(values)
    if n < 2:
        return 1.0
    variance = math.fsum(d * d for d in deviations) * n / (n - 1)
    if variance == 0:
        return 0.0 if total > 0 else 1.0
    return float(special.stdtr(n - 1, -total / math.sqrt(variance)))


def score_statistic(values: Sequence[float], *, above: float = 0.0, lowest: float) -> float:
    """How many standard errors the mean of `values` lies above a bound, for a one-sided test that it does.

    The variance is the one that is likeliest if the true mean were the bound itself (a score test). With the outcomes
    of two models on the same items this is the test for the ratio of paired proportions of Nam and Blackwelder (2002),
    Statistics in Medicine 21:689. The plain t statistic rejects far too often when few items differ, as it takes a
    sample without a single loss for proof that losses do not happen; here the fitted distribution holds some at
    `lowest`. Fitted as an empirical likelihood (Owen 1988) with one more atom at `lowest`.

    Args:
        values: one per item.
        above: the bound.
        lowest: smallest value that an item can have, below the bound.

    Returns:
        the statistic, compared with a standard normal quantile; infinite if nothing varies.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    gap = mean - above
    if gap <= 0:
        variance = math.fsum((v - above) ** 2 for v in values) / n
    else:
        variance = _null_variance(Counter(v - above for v in values), lowest - above, n)
    if variance == 0:
        return math.copysign(math.inf, gap) if gap else 0.0
    return gap / math.sqrt(variance / n)


def num_items_needed(margins: Margins, *, level: float, power: float = 0.8) -> int | None:
    """Items with which this test would succeed with that chance, if the hybrid is as good as it looks; None if it looks
    below the limit, where no number of items helps."""
    n = len(margins.per_item)
    z = float(special.ndtri(1 - p_value(margins))) if p_value(margins) < 0.5 else 0.0
    if z <= 0:
        return None
    return math.ceil(n * ((float(special.ndtri(1 - level)) + float(special.ndtri(power))) / z) ** 2)


def _weights(score: Score) -> list[float]:
    """Weights of the items, with mean 1."""
    if not score.weights:
        return [1.0] * len(score.per_item)
    mean = math.fsum(score.weights) / len(score.weights)
    return [w / mean for w in score.weights]


def _deviations(values: Sequence[float], weights: Sequence[float], score: Score) -> tuple[float, ...]:
    mean = math.fsum(values) / len(values)
    return _unit_sums([value - w * mean for value, w in zip(values, weights)], score)


def _unit_sums(values: Sequence[float], score: Score) -> tuple[float, ...]:
    if not score.groups:
        return tuple(values)
    sums: dict[int, float] = {}
    for group, value in zip(score.groups, values):
        sums[group] = sums.get(group, 0.0) + value
    return tuple(sums.values())


def _null_variance(counts: Counter[float], lowest: float, n: int) -> float:
    """Variance of the likeliest distribution with mean 0 over the values seen and `lowest`; their mean is above 0."""
    assert lowest < 0, "with no value below the bound there is nothing to test"
    drift = lambda tilt: sum(k * v / (1 + tilt * v) for v, k in counts.items())  # noqa: E731
    # Lagrange's condition: weights n_k / n / (1 + t v_k) with mean 0, t between 0 and -1 / lowest.
    largest = -1.0 / lowest
    tilt = largest if drift(largest * (1 - 1e-12)) > 0 else float(optimize.brentq(drift, 0.0, largest * (1 - 1e-12)))
    weights = {v: k / n / (1 + tilt * v) for v, k in counts.items() if 1 + tilt * v > 0}
    rest = max(0.0, 1.0 - math.fsum(weights.values()))
    return math.fsum(w * v * v for v, w in weights.items()) + rest * lowest * lowest
