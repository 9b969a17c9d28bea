"""All strategies on one bank and task, in one table: what each finds, what it holds on test, what it costs."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank
from dtr.distributed import current_world
from dtr.errors import RecipeError
from dtr.evaluation.paired import mean_confidence_interval, paired_difference
from dtr.evaluation.score import Score
from dtr.selection.binding import Selection, find_layers, make_evaluator, make_validation
from dtr.selection.settings import SearchSettings
from dtr.selection.spreading import clock_of
from dtr.tasks.base import Task
from dtr.teacher import Teacher

DEFAULT_STRATEGIES = ("exact", "auto", "one_shot", "lowest_mse", "kl", "impact", "uniform", "random")
SHARES = (0.5, 0.75, 0.9)
"""Shares of the layers at which placements are compared, whatever P_min says."""


def compare_strategies(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
    confidence: float | None = None,
    shares: Sequence[float] = SHARES,
    time_limit_seconds: float | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Iterator[dict[str, Any]]:
    """Search with each strategy, from nothing, and score what it finds on test.

    Before the first one the teacher and the all-linear model are scored once, so that no strategy pays for kernels
    that are built and tuned at their first use.

    Args:
        teacher, bank, task, settings: as `search` takes them; each strategy takes the place of the settings' own.
        strategies: names.
        confidence: also search with `auto` under this `p_min_confidence`, as `auto_certified`, after the first name.
        shares: also score the first so many layers of each path on test (`at_share`), the path drawn to its end.
            That is done after the timed search and adds nothing to its account.
        time_limit_seconds: for all of them together, test scores included. A search that it cuts off gives no row, and
            no further one begins. Test scores that two strategies share are computed once.
        on_event: called with the events of every search, and with `left_out` for each strategy without a row.
        changes: fields of `SearchSettings` by name.

    Yields:
        one dict per strategy, with the keys of `benchmarks/results/search.json`. `test_minus_exact` is None until
        `exact` has its row; then it is filled in in the rows before, too.
    """
    emit = on_event or (lambda event: None)
    settings = (settings or SearchSettings()).changed(**changes)
    # The plain limit is what strategies are compared by; a certificate measures the items as well.
    searches = [(name, settings.changed(strategy=name, p_min_confidence=None)) for name in strategies]
    if confidence is not None:
        searches.insert(1, ("auto_certified", settings.changed(strategy="auto", p_min_confidence=confidence)))
    comparison = _Comparison(teacher, bank, task, shares, time_limit_seconds, emit)
    comparison.warm_up(settings)
    rows: list[tuple[dict[str, Any], Score]] = []
    reference: Score | None = None
    for name, wanted in searches:
        try:
            row, score = comparison.row(name, wanted)
        except _LeftOut as reason:
            emit({"event": "left_out", "strategy": name, "reason": str(reason)})
            continue
        rows.append((row, score))
        reference = score if name == "exact" else reference
        if reference is not None:
            for known, of_row in rows:
                known["test_minus_exact"] = paired_difference(of_row, reference).to_dict()
        yield row


class _LeftOut(Exception):
    """Why a strategy has no row."""


class _Comparison:
    """What the strategies of one comparison share: the subjects, the test scores and the time."""

    def __init__(
        self,
        teacher: Teacher,
        bank: MixerBank,
        task: Task,
        shares: Sequence[float],
        time_limit_seconds: float | None,
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._subjects = teacher, bank, task
        self._sizes = {f"{share:g}": round(share * teacher.num_layers) for share in shares}
        self._emit = emit
        self._test: TestScores | None = None
        # All ranks must give up at the same place, so the first one's clock and limit count.
        world = current_world()
        self._clock = clock_of(world)
        limit_seconds = world.collect(time_limit_seconds)[0]
        self._deadline = self._clock() + limit_seconds if limit_seconds else None

    def warm_up(self, settings: SearchSettings) -> None:
        """Run every attention layer and every mixer once, on every rank, over the batches that searches will have."""
        by_layer: dict[int, list[int]] = {}
        for number, layer in self._subjects[1].layer_of.items():
            by_layer.setdefault(layer, []).append(number)
        kinds = itertools.zip_longest(*by_layer.values())
        hybrids = [[number for number in hybrid if number is not None] for hybrid in kinds]
        make_validation(*self._subjects, settings).warm_up([[], *hybrids])

    def row(self, name: str, settings: SearchSettings) -> tuple[dict[str, Any], Score]:
        """A search from nothing, and its hybrid's score on test.

        Raises:
            _LeftOut: the time is spent, or this task or its items do not allow the strategy.
        """
        if self._test is None:
            self._test = TestScores(*self._subjects, settings.batch_tokens)
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder) / "journal.jsonl"
            found = self._search(settings, journal)
            if self._left() == 0 and found.trace.stop_reason == "budget" and "seconds" in found.trace.stop_text:
                raise _LeftOut(f"The time limit cut it off, with {len(found.trace.m_opt.layers)} layers linear.")
            order = list(found.trace.m_opt.layers)
            if len(order) < max(self._sizes.values(), default=0) and self._left() != 0:
                # What was scored above is in the journal; only the rest of the path is new.
                whole = self._search(settings.changed(run_to_end=True), journal)
                order = [layer for step in whole.trace.steps for layer in step.added]
        score = self._test(found.trace.m_opt.layers)
        at_share = {share: self._test.row(order[:size]) for share, size in self._sizes.items() if size <= len(order)}
        row = _row(name, found, score, self._test(())) | self._named(found.trace.m_opt.layers, order)
        return {**row, "at_share": at_share, "test_minus_exact": None}, score

    def _named(self, chosen: Sequence[int], order: Sequence[int]) -> dict[str, Any]:
        """Layers instead of numbers of mixers, and the kind of each where the bank has several."""
        bank = self._subjects[1]
        layers = {"layers": [bank.layer_of[n] for n in chosen], "order": [bank.layer_of[n] for n in order]}
        return layers if len(bank.specs) == 1 else {**layers, "kinds": [bank.spec(n)["kind"] for n in order]}

    def _search(self, settings: SearchSettings, journal: Path) -> Selection:
        """`find_layers` within the time that is left."""
        left = self._left()
        if left == 0:
            raise _LeftOut("The time limit was reached before it began.")
        if left is not None:
            settings = settings.changed(max_seconds=min(left, settings.max_seconds or left))
        try:
            return find_layers(*self._subjects, settings, journal=journal, on_event=self._emit)
        except RecipeError as error:
            # Such as a ranking that this kind of task does not have.
            if settings.strategy not in ("kl", "impact"):
                raise
            raise _LeftOut(str(error)) from error

    def _left(self) -> float | None:
        """Seconds; None without a limit."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())


class TestScores:
    """Scores on test, each hybrid once whoever asks."""

    __test__ = False

    def __init__(self, teacher: Teacher, bank: MixerBank, task: Task, batch_tokens: int) -> None:
        self._score = make_evaluator(teacher, bank, task, "test", batch_tokens=batch_tokens, cache_bytes=0)
        self._known: dict[frozenset[int], Score] = {}

    def __call__(self, layers: Sequence[int]) -> Score:
        linear = frozenset(layers)
        if linear not in self._known:
            self._known[linear] = self._score(linear)
        return self._known[linear]

    def row(self, layers: Sequence[int]) -> dict[str, Any]:
        """One hybrid beside the teacher."""
        score = self(layers)
        low, high = mean_confidence_interval(score)
        return {
            "num_replaced": len(layers),
            "test": score.value,
            "test_ci95": [low, high],
            "paired": paired_difference(score, self(())).to_dict(),
        }


def _row(strategy: str, result: Selection, test: Score, teacher_test: Score) -> dict[str, Any]:
    trace = result.trace
    paired = paired_difference(test, teacher_test)
    low, high = mean_confidence_interval(test)
    return {
        "strategy": strategy,
        "num_replaced": len(trace.m_opt.layers),
        "order_is_ranked": all(step.is_ranked for step in trace.steps),
        "val": trace.m_opt.score.value,
        "teacher_val": trace.teacher.value,
        "p_min_value": trace.p_min_value,
        "test": test.value,
        "test_ci95": [low, high],
        "teacher_test": teacher_test.value,
        "test_drop": paired.relative_drop,
        "paired": paired.to_dict(),
        "pass_equivalents": round(result.pass_equivalents, 2),
        "num_candidates": trace.num_candidate_evaluations,
        "seconds": round(result.seconds, 2),
        "stop_reason": trace.stop_text,
        "reason": trace.reason,
        "certificate": trace.certificate.to_dict() if trace.certificate else None,
    }
