"""Phase 2: which layers to replace. Binds the search algorithm to a teacher, a bank and a task."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dtr.distillation.bank import MixerBank
from dtr.evaluation.score import Score
from dtr.hybrid.modeling import make_hybrid
from dtr.selection.binding import find_layers, make_evaluator
from dtr.selection.settings import SearchSettings
from dtr.selection.trace import SearchTrace
from dtr.tasks.base import Task
from dtr.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The two hybrids of Algorithm 1, how they were found, and what they score on the test split."""

    teacher: Teacher = field(repr=False)
    bank: MixerBank = field(repr=False)
    """What the hybrids are made of."""
    trace: SearchTrace
    """Its layers are numbers of the bank's mixers, which is the same where the bank has one kind."""
    teacher_test: Score
    m_opt_test: Score
    m_best_test: Score
    test_curve: tuple[Score, ...]
    """Test score after each step of the trace, looked at only after the search; empty unless asked for."""
    pass_equivalents: float
    """Work of the search in full passes over the validation split, guard tasks left out."""
    guard_pass_equivalents: float
    """Work on the guard tasks, in passes over theirs."""
    seconds: float
    """Time of the search alone, without the test scores."""
    test_seconds: float

    @cached_property
    def m_opt(self) -> Any:
        """The hybrid with most linear layers at or above P_min on validation: a Hugging Face model.

        Made when it is first asked for, with weights of its own: training or changing it leaves the teacher as it is.
        """
        return hybrid_of(self.teacher, self.bank, self.trace.m_opt.layers)

    @cached_property
    def m_best(self) -> Any:
        """The last hybrid that was at least as good on validation as all before it, with weights of its own."""
        return hybrid_of(self.teacher, self.bank, self.trace.m_best.layers)

    def borrowed(self, which: Literal["m_opt", "m_best"]) -> Any:
        """One of the two with the teacher's own modules, without a copy: to be run or saved, never changed."""
        found = self.trace.m_opt if which == "m_opt" else self.trace.m_best
        return hybrid_of(self.teacher, self.bank, found.layers, share_modules=True)


def search(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    journal: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> SearchResult:
    """Replace layers while the validation score stays at or above P_min (Algorithm 1, or cheaper), then score on test.

    Args:
        teacher: from `load_teacher`.
        bank: from `distill` or `load_bank`, made from this teacher.
        task: from `load_task`; validation decides, test is scored at the end.
        settings: the limit, the strategy, budgets and the rest; a recipe's defaults when left out.
        journal: JSONL file that keeps every score; if it is there, its scores are not computed again.
        on_event: called with small dicts for logs and live displays.
        changes: fields of `SearchSettings` by name, as `p_min=0.9` or `strategy="auto"`.

    Raises:
        RecipeError: a P_min or floor that the teacher itself does not reach, a budget that no hybrid can meet.
        DataError: too few validation items for the confidence asked for.
        BankError: the bank was made from another teacher.
    """
    settings = (settings or SearchSettings()).changed(**changes)
    found = find_layers(teacher, bank, task, settings, journal=journal, on_event=on_event)
    started = time.monotonic()
    trace = found.trace
    curve = [step.linear for step in trace.steps] if settings.test_curve else []
    teacher_test, m_opt_test, m_best_test, *curve_test = _test_scores(
        teacher, bank, task, settings, [(), trace.m_opt.layers, trace.m_best.layers, *curve]
    )
    return SearchResult(
        teacher=teacher,
        bank=bank,
        trace=trace,
        teacher_test=teacher_test,
        m_opt_test=m_opt_test,
        m_best_test=m_best_test,
        test_curve=tuple(curve_test),
        pass_equivalents=found.pass_equivalents,
        guard_pass_equivalents=found.guard_pass_equivalents,
        seconds=found.seconds,
        test_seconds=time.monotonic() - started,
    )


def _test_scores(
    teacher: Teacher, bank: MixerBank, task: Task, settings: SearchSettings, hybrids: Sequence[Sequence[int]]
) -> list[Score]:
    """Scores of hybrids given by numbers of their mixers, each worked out once."""
    test = make_evaluator(teacher, bank, task, "test", batch_tokens=settings.batch_tokens, cache_bytes=0)
    wanted = [frozenset(layers) for layers in hybrids]
    test.expect(wanted)
    scores = {linear: test(linear) for linear in dict.fromkeys(wanted)}
    return [scores[linear] for linear in wanted]


def hybrid_of(teacher: Teacher, bank: MixerBank, numbers: Sequence[int], *, share_modules: bool = False) -> Any:
    """The Hugging Face model with these mixers of a bank; `share_modules` as for `make_hybrid`."""
    mixers, layer_of = bank.in_dtype(teacher.dtype), bank.layer_of
    # The bank's copies are for all who only look.
    in_place = {layer_of[n]: mixers[n] if share_modules else copy.deepcopy(mixers[n]) for n in numbers}
    specs = {layer_of[number]: bank.spec(number) for number in numbers}
    model = make_hybrid(teacher.model, in_place, specs, share_modules=share_modules)
    model.tokenizer = teacher.tokenizer if share_modules else copy.deepcopy(teacher.tokenizer)
    return model
