"""All strategies on one bank and task, in one table: what each finds, what it holds on test, what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank
from dtr.distributed import current_world
from dtr.errors import RecipeError
from dtr.evaluation.paired import mean_confidence_interval, paired_difference
from dtr.evaluation.score import Score
from dtr.replacement.binding import Selection, find_layers, make_evaluator
from dtr.replacement.settings import SearchSettings
from dtr.replacement.spreading import clock_of
from dtr.tasks.base import Task
from dtr.teacher import Teacher

DEFAULT_STRATEGIES = ("exact", "auto", "lazy", "restore", "one_shot", "lowest_mse", "kl", "impact", "uniform", "random")
SHARES = (0.5, 0.75, 0.9)
"""Shares of the layers at which placements are compared, whatever P_min says."""


def compare_strategies(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
    shares: Sequence[float] = SHARES,
    time_limit_seconds: float | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Iterator[dict[str, Any]]:
    """Search with each strategy, from nothing, and score what it finds on test.

    Args:
        teacher, bank, task, settings: as `search` takes them; each strategy takes the place of the settings' own.
        strategies: names.
        shares: also score the first so many layers of each path on test (`at_share`), the path drawn to its end.
            That is done after the timed search and adds nothing to its account.
        time_limit_seconds: for all of them together, test scores included: a search is cut off at what is left, and
            no further one begins. Test scores that two strategies share are computed once.
        on_event: called with the events of every search.
        changes: fields of `SearchSettings` by name.

    Yields:
        one dict per strategy, with the keys of `benchmarks/results/search.json`.
    """
    settings = replace(settings or SearchSettings(), **changes)
    test = TestScores(teacher, bank, task, settings.batch_tokens)
    # All ranks must give up at the same place, so the first one's clock and limit count.
    world = current_world()
    clock, limit_seconds = clock_of(world), world.collect(time_limit_seconds)[0]
    deadline = clock() + limit_seconds if limit_seconds else None

    def timed(strategy: str, **more: Any) -> SearchSettings | None:
        """The settings with what is left of the time as a limit, or None if nothing is."""
        changed = replace(settings, strategy=strategy, **more)
        if deadline is None:
            return changed
        left = deadline - clock()
        return replace(changed, max_seconds=min(left, settings.max_seconds or left)) if left > 0 else None

    reference: Score | None = None
    for strategy in strategies:
        with tempfile.TemporaryDirectory() as folder:
            where: dict[str, Any] = {"journal": Path(folder) / "journal.jsonl", "on_event": on_event}
            limits = timed(strategy)
            if limits is None:
                break
            try:
                result = find_layers(teacher, bank, task, limits, **where)
            except RecipeError as error:
                # Such as a ranking that this kind of task does not have; the other strategies can still be compared.
                if on_event is not None:
                    on_event({"event": "left_out", "strategy": strategy, "reason": str(error)})
                if strategy not in ("kl", "impact"):
                    raise
                continue
            order = list(result.trace.m_opt.layers)
            limits = timed(strategy, run_to_end=True)
            if limits and len(order) < max((_num_layers(share, teacher) for share in shares), default=0):
                # What was scored above is in the journal; only the rest of the path is new.
                whole = find_layers(teacher, bank, task, limits, **where)
                order = [layer for step in whole.trace.steps for layer in step.added]
        score = test(result.trace.m_opt.layers)
        reference = score if strategy == "exact" else reference
        yield {
            **_row(strategy, result, order, score, test(())),
            "at_share": {
                f"{share:g}": test.row(order[: _num_layers(share, teacher)])
                for share in shares
                if _num_layers(share, teacher) <= len(order)
            },
            "test_minus_exact": paired_difference(score, reference).to_dict() if reference else None,
        }


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


def _num_layers(share: float, teacher: Teacher) -> int:
    return round(share * teacher.num_layers)


def _row(strategy: str, result: Selection, order: list[int], test: Score, teacher_test: Score) -> dict[str, Any]:
    trace = result.trace
    paired = paired_difference(test, teacher_test)
    low, high = mean_confidence_interval(test)
    return {
        "strategy": strategy,
        "num_replaced": len(trace.m_opt.layers),
        "layers": list(trace.m_opt.layers),
        "order": order,
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
