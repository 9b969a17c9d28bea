"""What one evaluation says: a value, how sure it is, and the per-item results behind it. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

LOST_NATS = 1e4
"""Stands for minus a log-probability that is no finite number: worse than any that is, and still finite, so that means,
journals and reports can hold it. A model that gives such numbers is broken, and loses the item."""
MAX_NLL = 690.0
"""exp of more would be no finite number."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """One item's result; all its numbers are finite."""

    value: float
    """The metric on this item: 0 or 1 for accuracy and exact match, mean negative log-likelihood for perplexity."""
    log_likelihood: float = 0.0
    """Log-probability of the right answer in nats; search breaks ties by its mean."""
    signal: float | None = None
    """How far the item is from changing sides, in nats: the right answer's log-likelihood minus the best wrong one's,
    where the task knows both. It moves with every change of the model, while `value` seldom does, so search ranks
    layers by its mean. None: `log_likelihood` in its place."""
    weight: float = 1.0
    """Number of tokens behind `value` where the metric is a mean over tokens, otherwise 1."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over one split of a task."""

    metric: str
    value: float
    stderr: float
    """Standard error of `value` over items."""
    num_items: int
    log_likelihood: float
    """Mean log-probability of the right answers in nats."""
    higher_is_better: bool = True
    per_item: tuple[float, ...] = ()
    """`Grade.value` of each item, in the order of the split, for paired statistics."""
    signals: tuple[float, ...] = ()
    """`Grade.signal` of each item; empty where the task has nothing continuous to say."""
    weights: tuple[float, ...] = ()
    """`Grade.weight` of each item; empty where all items count alike."""
    groups: tuple[int, ...] = ()
    """Which group each item belongs to (`Item.group`), numbered by first appearance; empty where every item stands for
    itself. Items of one group err together, so tests count groups, not items."""

    @property
    def goodness(self) -> float:
        """The value as search compares it, larger is better: the value itself, or its reciprocal for perplexity."""
        return self.value if self.higher_is_better else 1.0 / self.value

    @property
    def signal(self) -> float:
        """Mean of the continuous signal, weighted as the metric is: the signals, or else the log-likelihood."""
        if not self.signals:
            return self.log_likelihood
        weights = self.weights or (1.0,) * len(self.signals)
        return math.fsum(w * x for w, x in zip(weights, self.signals)) / math.fsum(weights)

    def to_dict(self, *, with_items: bool = False) -> dict:
        """Plain types for JSON."""
        out = {
            "metric": self.metric,
            "value": self.value,
            "stderr": self.stderr,
            "num_items": self.num_items,
            "log_likelihood": self.log_likelihood,
            "higher_is_better": self.higher_is_better,
        }
        return {**out, "per_item": list(self.per_item)} if with_items else out


def lost_grade(*, value: float = 0.0, weight: float = 1.0) -> Grade:
    """The grade of an item on which the model gave a number that is none."""
    return Grade(value=value, log_likelihood=-LOST_NATS, signal=-LOST_NATS, weight=weight)


def mean_score(metric: str, grades: Sequence[Grade]) -> Score:
    """Plain mean over items, with the standard error of the mean (sample variance, n - 1)."""
    assert grades, "a score needs at least one item"
    n = len(grades)
    mean = sum(g.value for g in grades) / n
    variance = sum((g.value - mean) ** 2 for g in grades) / max(n - 1, 1)
    return Score(
        metric=metric,
        value=mean,
        stderr=math.sqrt(variance / n),
        num_items=n,
        log_likelihood=sum(g.log_likelihood for g in grades) / n,
        per_item=tuple(g.value for g in grades),
        signals=_signals(grades),
    )


def perplexity_score(grades: Sequence[Grade], *, metric: str = "perplexity") -> Score:
    """exp of the mean negative log-likelihood, weighted by tokens (or words or bytes, as each grade says).

    Standard error by the delta method over items.
    """
    assert grades, "a score needs at least one item"
    total = sum(g.weight for g in grades)
    nll = sum(g.value * g.weight for g in grades) / total
    # Items are the sampling unit, as tokens within one document are not independent.
    n = len(grades)
    spread = sum((g.weight * (g.value - nll)) ** 2 for g in grades) * n / max(n - 1, 1)
    value = math.exp(min(nll, MAX_NLL))
    return Score(
        metric=metric,
        value=value,
        stderr=value * math.sqrt(spread) / total,
        num_items=n,
        log_likelihood=-nll,
        higher_is_better=False,
        per_item=tuple(g.value for g in grades),
        signals=_signals(grades),
        weights=tuple(g.weight for g in grades),
    )


def in_groups(score: Score, names: Sequence[str | None]) -> Score:
    """The same score with its items' groups; an item without a name is a group of its own."""
    if not any(names):
        return score
    numbers: dict[object, int] = {}
    keys = [name if name else ("alone", index) for index, name in enumerate(names)]
    return replace(score, groups=tuple(numbers.setdefault(key, len(numbers)) for key in keys))


def part_of(score: Score, items: Sequence[int]) -> Score:
    """The score over some of its items, by position; without a standard error."""

    def pick(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[index] for index in items) if values else ()

    per_item, weights = pick(score.per_item), pick(score.weights)
    mean = math.fsum(w * x for w, x in zip(weights or (1.0,) * len(items), per_item)) / (
        math.fsum(weights) if weights else len(items)
    )
    return replace(
        score,
        value=mean if score.higher_is_better else math.exp(mean),
        stderr=0.0,
        num_items=len(items),
        per_item=per_item,
        signals=pick(score.signals),
        weights=weights,
        groups=pick(score.groups),
    )


def _signals(grades: Sequence[Grade]) -> tuple[float, ...]:
    # Seven digits rank layers as well as all, and halve the journal, which keeps every score.
    signals = tuple(float(f"{g.log_likelihood if g.signal is None else g.signal:.7g}") for g in grades)
    return signals if any(signals) else ()
