"""Is a hybrid really worse than its teacher? Paired differences over the same items, and intervals for plots. No torch.

These intervals describe one hybrid named in advance. A hybrid that was chosen as the best of many on the very items it
is compared on looks better than it is, and no interval here corrects for that: compare on the test split.
"""

from __future__ import annotations

import math
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
