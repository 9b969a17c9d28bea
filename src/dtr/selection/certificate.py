"""An honest stop: is the hybrid really at or above P_min? Tested on items that selection never looked at.

Selection keeps the best of many noisy scores, so its own score is too good, and no correction is known for all
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
Bonferroni share. Growing, the first tests are the safest, and the last hybrid that passes is the largest with a
guarantee. At most `MAX_TESTS` hybrids are tested, evenly along the path, as every hurdle can fail by bad luck and costs
a pass over the confirmation items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dtr.evaluation.paired import margins_over_limit, num_items_needed, p_value
from dtr.evaluation.score import Score, part_of

MAX_TESTS = 15
"""Every second layer of 30."""
POWER = 0.8
"""The chance of success that "about M needed" is worked out for."""
FIRST_LOOK_SHARE = 0.8
"""Of the permitted error, for the first search that looks at the confirmation items."""


@dataclass(frozen=True, kw_only=True)
class ConfirmedHybrid:
    """One test of the sequence."""

    num_linear: int
    value: float
    """The metric over the confirmation items."""
    p_value: float
    """One-sided, of "truly above P_min"."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What the confirmation items say of the path that selection found."""

    confidence: float
    level: float
    """Of each test: what `confidence` permits, less what earlier and later looks at these items may spend."""
    num_looks: int
    """Searches that have looked at these confirmation items, this one included."""
    num_items: int
    """Confirmation items; selection never saw them."""
    num_proposed: int
    """Linear layers of the longest hybrid that was up for a test."""
    num_certified: int
    """Linear layers of the largest hybrid that passed; 0 if none did."""
    tests: tuple[ConfirmedHybrid, ...]
    num_items_needed: int | None
    """Validation items in all with which the first hybrid that failed would pass with 80 % chance if it is as good as
    it looks here; None if none failed, or if it looks below the limit, where no number of items helps."""
    text: str
    """The verdict as a sentence."""

    @property
    def is_certified(self) -> bool:
        return self.num_certified > 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tests": [asdict(test) for test in self.tests], "is_certified": self.is_certified}


def level_of_look(confidence: float, num_earlier_looks: int) -> float:
    """The level of the tests of one search, so that all searches on the same confirmation items err at most as asked.

    The first search takes `FIRST_LOOK_SHARE` of the permitted error, each further one half of what is left.
    """
    rest = 1 - FIRST_LOOK_SHARE
    share = FIRST_LOOK_SHARE if num_earlier_looks == 0 else rest / 2**num_earlier_looks
    return (1 - confidence) * share


def num_items_for_teacher(*, level: float, p_min: float, p_min_kind: str, teacher: Score) -> int | None:
    """Confirmation items that could certify a hybrid with exactly the teacher's answers; None where that is not known.

    Without a gain the test is binomial: no failure in m of the teacher's right answers has probability p_min ** m.
    """
    if p_min_kind != "relative" or not teacher.higher_is_better or not 0 < teacher.value <= 1 or p_min >= 1:
        return None
    return math.ceil(math.log(level) / math.log(p_min) / teacher.value)


def confirm_path(
    sizes: Sequence[int],
    score: Callable[[int], Score],
    teacher: Score,
    *,
    confidence: float,
    p_min: float,
    p_min_kind: str,
    num_earlier_looks: int = 0,
    share: float = 1.0,
    parts: Sequence[Sequence[int]] = (),
) -> Certificate:
    """Test hybrids of a path in the order of their size until one fails.

    Args:
        sizes: numbers of linear layers to test, growing, settled beforehand; see `sizes_to_test`.
        score: number of linear layers to that hybrid's score over the confirmation items.
        teacher: the teacher's score over the same items.
        confidence: as 0.95.
        p_min: as the search had it; with `p_min_kind`.
        num_earlier_looks: other searches that have looked at these items.
        parts: items, by position, over which P_min must hold as well; a hybrid passes where it passes in each of them,
            which needs no stricter test (an intersection-union test, Berger 1982).
        share: confirmation items as a share of the validation items, to say how many of these are needed.
    """
    level = level_of_look(confidence, num_earlier_looks)
    tests: list[ConfirmedHybrid] = []
    num_needed: int | None = None
    for num_linear in sizes:
        hybrid = score(num_linear)
        margins = [
            margins_over_limit(ours, theirs, p_min=p_min, p_min_kind=p_min_kind)
            for ours, theirs in [(hybrid, teacher), *((part_of(hybrid, x), part_of(teacher, x)) for x in parts)]
        ]
        weakest = max(margins, key=p_value)
        p = p_value(weakest)
        tests.append(ConfirmedHybrid(num_linear=num_linear, value=hybrid.value, p_value=p, passed=p <= level))
        if p > level:
            num_needed = num_items_needed(weakest, level=level, power=POWER)
            if num_needed is not None:
                num_needed = math.ceil(num_needed * teacher.num_items / len(weakest.per_item))
            break
    least = num_items_for_teacher(level=level, p_min=p_min, p_min_kind=p_min_kind, teacher=teacher)
    if num_needed is not None:
        num_needed = math.ceil(max(num_needed, least or 0) / share)
    num_certified = max((test.num_linear for test in tests if test.passed), default=0)
    return Certificate(
        confidence=confidence,
        level=level,
        num_looks=num_earlier_looks + 1,
        num_items=teacher.num_items,
        num_proposed=max(sizes, default=0),
        num_certified=num_certified,
        tests=tuple(tests),
        num_items_needed=num_needed,
        text=_text(tests, num_certified, num_needed, confidence, teacher.num_items, num_earlier_looks),
    )


def sizes_to_test(num_proposed: int) -> list[int]:
    """Numbers of linear layers, growing, evenly spaced and ending at `num_proposed`."""
    num_tests = min(MAX_TESTS, num_proposed)
    return [round(num_proposed * (index + 1) / num_tests) for index in range(num_tests)]


def _text(
    tests: Sequence[ConfirmedHybrid],
    num_certified: int,
    num_needed: int | None,
    confidence: float,
    num_items: int,
    num_earlier_looks: int,
) -> str:
    sure = f"with {100 * confidence:g} % confidence, on {num_items} validation items that selection never saw"
    if num_earlier_looks:
        times = "once" if num_earlier_looks == 1 else f"{num_earlier_looks} times"
        sure += f" (searches had looked at them {times} before, so the test was stricter)"
    if not tests:
        return "Nothing to certify: no layer was replaced."
    failed = None if tests[-1].passed else tests[-1]
    if failed is None:
        return f"Certified: the hybrid with {num_certified} linear layers is at or above P_min {sure}."
    more = (
        f"about {num_needed} validation items are needed for it"
        if num_needed
        else "it scored below the limit there, so more items would not help"
    )
    if num_certified:
        return (
            f"Certified: the hybrid with {num_certified} linear layers is at or above P_min {sure}. "
            f"Not certified: {failed.num_linear} layers ({more})."
        )
    return (
        f"Not certified: {failed.num_linear} layers ({more}), {sure}. Give more items, a lower search.p_min or "
        "search.p_min_confidence, or set the latter to null for a hybrid without a certificate."
    )
