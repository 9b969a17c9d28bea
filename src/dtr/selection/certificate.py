"""An honest stop: is the hybrid really at or above P_min? Tested on items that selection never looked at.

Selection keeps the best of hundreds of noisy scores, so its own score is too good, and no correction is known for all
strategies. The confirmation items are untouched by it: given the path, every hybrid's score on them is unbiased.

Several hybrids of the path may be tested, and each test may err. As the path and the hybrids to test are settled
before the confirmation items are looked at, fixed-sequence testing holds the error of them all together at
1 - confidence, each test at the full level, whatever the dependence between them (Maurer, Hothorn and Lehmacher 1995;
Westfall and Krishen 2001; for choosing a model's setting: Angelopoulos et al. 2021, "Learn then Test",
https://arxiv.org/abs/2110.01052): test in the settled order and stop at the first hybrid that fails. Why: for an error
some hybrid truly below the limit must pass; then the first such hybrid of the order must have passed, and that is one
test at one level.

The order grows: fewest linear layers first. From the largest downwards until one passes would be the opposite
procedure, one that stops at the first *success*; its errors add up over the failures before it and would need a
Bonferroni share. Stopping at the first failure from the top would nearly always stop at once. Growing, the first tests
are the safest, and the last hybrid that passes is the largest with a guarantee. At most `MAX_TESTS` hybrids are tested,
evenly along the path, as every hurdle can fail by bad luck and costs a pass over the confirmation items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from dtr.errors import DataError
from dtr.evaluation.paired import lowest_margin, margins_over_limit, mean_lower_bound, score_statistic
from dtr.evaluation.score import Score

MAX_TESTS = 10
POWER = 0.8
"""The chance of success that "about M needed" is worked out for."""


@dataclass(frozen=True, kw_only=True)
class ConfirmedHybrid:
    """One test of the sequence."""

    num_linear: int
    value: float
    """The metric over the confirmation items."""
    lower_bound: float
    """One-sided confidence bound of the mean of (hybrid - P_min * teacher), per item; passes where it is above 0."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What the confirmation items say of the path that selection found."""

    confidence: float
    num_items: int
    """Confirmation items; selection never saw them."""
    num_selected: int
    """Linear layers of the hybrid that selection alone would have chosen."""
    num_certified: int
    """Linear layers of the largest hybrid that passed; 0 if none did."""
    tests: tuple[ConfirmedHybrid, ...]
    num_items_needed: int | None
    """Confirmation items with which the first hybrid that failed would pass with 80 % chance if it is as good as it
    looks here; None if none failed, or if it looks below the limit, where no number of items helps."""
    text: str
    """The verdict as a sentence."""

    @property
    def is_certified(self) -> bool:
        return self.num_certified > 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tests": [asdict(test) for test in self.tests], "is_certified": self.is_certified}


def check_num_items(num_items: int, *, confidence: float, p_min: float, p_min_kind: str, teacher: Score | None) -> None:
    """Refuse confirmation items that could not certify even the teacher itself.

    For a hybrid with exactly the teacher's answers the score statistic is sqrt(n * a * (1 - p) / p) at accuracy a, so
    n must be at least z^2 * p / ((1 - p) * a). Known only for a relative P_min and metrics between 0 and 1.

    Args:
        teacher: its score over the confirmation items; None before it is known, which counts as accuracy 1.

    Raises:
        DataError: too few items.
    """
    accuracy = 1.0 if teacher is None else teacher.value
    if p_min_kind != "relative" or (teacher is not None and not teacher.higher_is_better) or accuracy <= 0:
        return
    needed = math.inf if p_min >= 1 else NormalDist().inv_cdf(confidence) ** 2 * p_min / ((1 - p_min) * accuracy)
    if num_items < needed:
        enough = f"at least {math.ceil(needed)}" if math.isfinite(needed) else "a search.p_min below 1"
        raise DataError(
            "search.p_min_confidence",
            got=f"{num_items} validation items to confirm with, too few for {confidence:g} even if nothing changed",
            expected=f"{enough} (search.confirmation_share of the validation items)",
            hint="Give more validation items, a lower confidence or a lower search.p_min.",
        )


def confirm_path(
    num_selected: int,
    score: Callable[[int], Score],
    teacher: Score,
    *,
    confidence: float,
    p_min: float,
    p_min_kind: str,
) -> Certificate:
    """Test hybrids of a path in the order of their size until one fails.

    Args:
        num_selected: linear layers of the last hybrid of the path.
        score: number of linear layers to that hybrid's score over the confirmation items.
        teacher: the teacher's score over the same items.
        confidence: as 0.95.
        p_min: as the search had it; with `p_min_kind`.
    """
    z = NormalDist().inv_cdf(confidence)
    tests: list[ConfirmedHybrid] = []
    num_needed: int | None = None
    for num_linear in sizes_to_test(num_selected):
        hybrid = score(num_linear)
        margins = margins_over_limit(hybrid, teacher, p_min=p_min, p_min_kind=p_min_kind)
        lowest = lowest_margin(hybrid, p_min)
        bound = mean_lower_bound(margins, confidence=confidence, lowest=lowest)
        passed = bound > 0
        tests.append(ConfirmedHybrid(num_linear=num_linear, value=hybrid.value, lower_bound=bound, passed=passed))
        if not passed:
            statistic = score_statistic(margins, lowest=lowest)
            if statistic > 0:
                num_needed = math.ceil(len(margins) * ((z + NormalDist().inv_cdf(POWER)) / statistic) ** 2)
            break
    num_certified = max((test.num_linear for test in tests if test.passed), default=0)
    return Certificate(
        confidence=confidence,
        num_items=teacher.num_items,
        num_selected=num_selected,
        num_certified=num_certified,
        tests=tuple(tests),
        num_items_needed=num_needed,
        text=_text(tests, num_selected, num_certified, num_needed, confidence, teacher.num_items),
    )


def sizes_to_test(num_selected: int) -> list[int]:
    """Numbers of linear layers, growing, evenly spaced and ending at `num_selected`."""
    num_tests = min(MAX_TESTS, num_selected)
    return [round(num_selected * (index + 1) / num_tests) for index in range(num_tests)]


def _text(
    tests: Sequence[ConfirmedHybrid],
    num_selected: int,
    num_certified: int,
    num_needed: int | None,
    confidence: float,
    num_items: int,
) -> str:
    sure = f"with {100 * confidence:g} % confidence, on {num_items} items that selection never saw"
    if not tests:
        return "Nothing to certify: no layer was replaced."
    failed = None if tests[-1].passed else tests[-1]
    if failed is None:
        return f"Certified: the hybrid with {num_selected} linear layers is at or above P_min {sure}."
    more = (
        f"{num_items} items are too few, about {num_needed} needed"
        if num_needed
        else "it scored below the limit there, so more items would not help"
    )
    if num_certified:
        return (
            f"Certified: the hybrid with {num_certified} linear layers is at or above P_min {sure}. "
            f"Not certified: {failed.num_linear} layers ({more})."
        )
    return f"Not certified: {more}. This is about {failed.num_linear} linear layers, {100 * confidence:g} % confidence."
