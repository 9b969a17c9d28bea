"""Which candidate is best, and does it reach P_min? Every comparison of scores that search makes is in this file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dtr.errors import ModelError, RecipeError, with_article
from dtr.evaluation.score import Score, part_of

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


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """P_min, resolved against the teacher."""

    value: float
    """In the metric's own unit: the lowest accuracy, or the highest perplexity, that is still accepted."""
    goodness: float
    """The same bound as `Score.goodness` compares it."""
    parts: tuple[tuple[tuple[int, ...], float], ...] = ()
    """Items, by position in a score over all, that must reach a bound of their own as well, and that goodness."""

    def is_met_by(self, score: Score) -> bool:
        """Whether the score, over the same items as the teacher's, is high enough, in all and in each part."""
        whole = at_least(score.goodness, self.goodness)
        return whole and all(at_least(part_of(score, items).goodness, bound) for items, bound in self.parts)

    def may_be_met(self, score: Score, num_items: int) -> bool:
        """Whether a score over some of `num_items` items can still reach the bound over all of them.

        Only where no item adds more than 1, as with accuracy; else nothing is known before the end.
        """
        if not score.higher_is_better or score.weights or not all(0 <= x <= 1 for x in score.per_item):
            return True
        most = math.fsum(score.per_item) + num_items - len(score.per_item)
        return at_least(most / num_items, self.goodness)


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


def resolve_p_min(
    p_min: float, p_min_kind: str, teacher: Score, *, where: str = "search", may_miss: bool = False
) -> Threshold:
    """The bound that `p_min` means for this teacher.

    Args:
        p_min: relative: a share of `teacher.goodness` (0.95 lets a perplexity grow to teacher / 0.95); absolute: a
            value of the metric, a lower bound for accuracy and an upper bound for perplexity.
        p_min_kind: `relative` or `absolute`.
        where: the section of the recipe that `p_min` comes from, for messages.
        may_miss: the teacher may miss the bound, or score 0, on the few items that only rank.
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
    if p_min_kind == "relative" and teacher.goodness <= 0 and not may_miss:
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
    if not may_miss and not threshold.is_met_by(teacher):
        side, change = ("at most", "Lower") if teacher.higher_is_better else ("at least", "Raise")
        raise RecipeError(
            f"{where}.p_min",
            got=f"{with_article(teacher.metric)} of {value:g}, which the teacher itself misses",
            expected=f"{side} {teacher.value:.6g}, the teacher's {teacher.metric} on validation",
            hint=f"{change} {where}.p_min, or give a share of the teacher's score with {where}.p_min_kind=relative.",
        )
    return threshold


def parts_of(values: Sequence[Any], items: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Positions among `items` (indices into the split) that share a value, by that value."""
    found: dict[str, list[int]] = {}
    for position, item in enumerate(items if values else ()):
        found.setdefault(str(values[item]), []).append(position)
    return {value: tuple(positions) for value, positions in found.items()}


def hold_each(
    threshold: Threshold,
    limits: Limits,
    teacher: Score,
    parts: Mapping[str, tuple[int, ...]],
    *,
    may_miss: bool = False,
) -> Threshold:
    """The threshold that must also be met by each part of the items, measured by the teacher's score there.

    Raises:
        RecipeError: as `resolve_p_min`, of a part.
    """
    bounds = [
        (
            items,
            resolve_p_min(
                limits.p_min, limits.p_min_kind, part_of(teacher, items), where=f"search ({value})", may_miss=may_miss
            ),
        )
        for value, items in parts.items()
    ]
    return replace(threshold, parts=tuple((items, bound.goodness) for items, bound in bounds))
