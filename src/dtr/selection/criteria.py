"""Which candidate is best, and does it reach P_min? Every comparison of scores that search makes is in this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dtr.errors import DataError, ModelError, RecipeError, with_article
from dtr.evaluation.paired import lowest_margin, margins_over_limit, score_statistic
from dtr.evaluation.score import Score

PMinKind = Literal["relative", "absolute"]

RELATIVE_TOLERANCE = 1e-9
"""Far above the rounding of double precision and far below one item in any validation set. It is a share of the two
values compared, not an absolute gap, because the goodness of a perplexity of 1e6 is itself only 1e-6."""


def at_least(goodness: float, bound: float) -> bool:
    """`goodness >= bound` up to rounding: 57/100 reaches 0.95 * 0.6. NaN reaches nothing."""
    return goodness >= bound or math.isclose(goodness, bound, rel_tol=RELATIVE_TOLERANCE)


def argmax(candidates: Mapping[int, Score]) -> int:
    """The layer with the best score; ties go to the higher mean log-likelihood, then to the lower index.

    Algorithm 1 has no tie rule, and on a few hundred items ties are common. NaN loses against every number.
    """
    assert candidates, "argmax needs at least one candidate"
    top = max(_number(score.goodness) for score in candidates.values())
    tied = [layer for layer, score in candidates.items() if at_least(_number(score.goodness), top)]
    return min(tied, key=lambda layer: (-_number(candidates[layer].log_likelihood), layer))


def _number(x: float) -> float:
    return -math.inf if math.isnan(x) else x


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a hybrid is good enough."""

    p_min: float
    """Smallest share of the teacher's score to keep, or a value of the metric; see `resolve_p_min`."""
    p_min_kind: PMinKind = "relative"
    """`relative` or `absolute`."""
    p_min_confidence: float | None = None
    """Commit only what the confirmation items certify, as 0.95; None for the plain limit."""
    safety: float = 0.0
    """Standard errors of the paired difference by which a hybrid must lie above P_min; see `with_safety`."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """P_min, resolved against the teacher."""

    value: float
    """In the metric's own unit: the lowest accuracy, or the highest perplexity, that is still accepted."""
    goodness: float
    """The same bound as `Score.goodness` compares it."""
    safety: float = 0.0
    """How many standard errors of the paired difference a score must lie above the bound as well."""
    standing: Callable[[Score], float] | None = None
    """How many it does lie above; there with a safety."""

    def is_met_by(self, score: Score) -> bool:
        """Whether the score, over the same items as the teacher's, is high enough."""
        if not at_least(score.goodness, self.goodness):
            return False
        return self.standing is None or self.standing(score) >= self.safety


def check_p_min(p_min: float, p_min_kind: str, *, where: str = "search") -> None:
    """Refuse what no teacher can reach, before anything is scored; `where` is the section that holds `p_min`.

    Raises:
        RecipeError: unknown kind, a P_min that is not a positive number, or a relative one above 1.
    """
    if p_min_kind not in get_args(PMinKind):
        raise RecipeError(f"{where}.p_min_kind", got=f"'{p_min_kind}'", expected="'relative' or 'absolute'")
    if not (math.isfinite(p_min) and p_min > 0):
        raise RecipeError(f"{where}.p_min", got=repr(p_min), expected="a positive number")
    if p_min_kind == "relative" and not at_least(1.0, p_min):
        raise RecipeError(
            f"{where}.p_min",
            got=f"{p_min:g} of the teacher's score, more than the teacher has itself",
            expected="a share of at most 1",
            hint=f"Write 0.95 to keep 95 %, or set {where}.p_min_kind to absolute to give a value of the metric.",
        )


def with_safety(threshold: Threshold, limits: Limits, teacher: Score) -> Threshold:
    """The threshold with a distance to keep, in standard errors of the paired difference to the bound.

    The standard error is the one of the score test (`dtr.evaluation.paired.score_statistic`), from the items on which
    hybrid and teacher differ; so the distance shrinks with the number of items, and a hybrid that answers like the
    teacher needs little.

    Raises:
        DataError: so few items that even a hybrid with exactly the teacher's answers would not be far enough.
    """
    safety, p_min = limits.safety, limits.p_min
    if not safety:
        return threshold

    def standing(score: Score) -> float:
        margins = margins_over_limit(score, teacher, p_min=p_min, p_min_kind=limits.p_min_kind)
        return score_statistic(margins, lowest=lowest_margin(score, p_min))

    if standing(teacher) < safety:
        raise DataError(
            "search.safety",
            got=f"{teacher.num_items} validation items, too few for {safety:g} standard errors even if nothing changed",
            expected=f"a safety of at most {max(0.0, standing(teacher)):.2g} with these items",
            hint="Give more validation items, a lower search.safety or a lower search.p_min.",
        )
    return replace(threshold, safety=safety, standing=standing)


def resolve_p_min(p_min: float, p_min_kind: str, teacher: Score, *, where: str = "search") -> Threshold:
    """The bound that `p_min` means for this teacher.

    Args:
        p_min: relative: a share of `teacher.goodness` (0.95 lets a perplexity grow to teacher / 0.95); absolute: a
            value of the metric, a lower bound for accuracy and an upper bound for perplexity.
        p_min_kind: `relative` or `absolute`.
        where: the section of the recipe that `p_min` comes from, for messages.
        teacher: score of the unchanged teacher on the validation split.

    Raises:
        RecipeError: as `check_p_min`, and if the teacher itself misses the bound.
        ModelError: the teacher's score is not a finite number.
    """
    check_p_min(p_min, p_min_kind, where=where)
    if not math.isfinite(teacher.goodness):
        raise ModelError(
            "teacher",
            got=f"a validation {teacher.metric} of {teacher.value}",
            expected="a finite score",
            hint="Load the teacher with teacher.dtype=float32 and look at its outputs on one validation item.",
        )
    if p_min_kind == "relative" and teacher.goodness <= 0:
        raise RecipeError(
            f"{where}.p_min",
            got=f"a share of the teacher's {teacher.metric} on validation, which is {teacher.value:g}",
            expected="a teacher that scores above 0: with nothing to keep, every layer could go",
            hint="Look at what it answers to one item, then change the prompt, task.chat_template, the metric or the "
            f"model; or give a value of the metric with {where}.p_min_kind=absolute.",
        )
    if p_min_kind == "relative":
        goodness = p_min * teacher.goodness
        value = goodness if teacher.higher_is_better else 1.0 / goodness
    else:
        value = p_min
        goodness = p_min if teacher.higher_is_better else 1.0 / p_min
    threshold = Threshold(value=value, goodness=goodness)
    if not threshold.is_met_by(teacher):
        side, change = ("at most", "Lower") if teacher.higher_is_better else ("at least", "Raise")
        raise RecipeError(
            f"{where}.p_min",
            got=f"{with_article(teacher.metric)} of {value:g}, which the teacher itself misses",
            expected=f"{side} {teacher.value:.6g}, the teacher's {teacher.metric} on validation",
            hint=f"{change} {where}.p_min, or give a share of the teacher's score with {where}.p_min_kind=relative.",
        )
    return threshold
