"""Phase 2: which layers to replace. Binds the search algorithm to a teacher, a bank and a task."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank
from dtr.errors import BankError
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.score import Score
from dtr.hybrid.modeling import make_hybrid
from dtr.selection.criteria import PMinKind
from dtr.selection.greedy import exact_greedy
from dtr.selection.journal import Journal
from dtr.selection.trace import SearchTrace
from dtr.tasks.base import Task, fingerprint
from dtr.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The two hybrids of Algorithm 1, how they were found, and what they score on the test split."""

    m_opt: Any
    """Most linear layers at or above P_min on validation; a Hugging Face model that shares the teacher's weights."""
    m_best: Any
    """The last hybrid that was at least as good on validation as all before it."""
    trace: SearchTrace
    teacher_test: Score
    m_opt_test: Score
    m_best_test: Score
    test_curve: tuple[Score, ...]
    """Test score after each step of the trace, looked at only after the search; empty unless asked for."""
    pass_equivalents: float
    """Work of the search in full passes over the validation split."""
    seconds: float
    """Time of the search alone, without the test scores."""
    test_seconds: float


def search(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    *,
    p_min: float = 0.95,
    p_min_kind: PMinKind = "relative",
    run_to_end: bool = False,
    test_curve: bool = False,
    batch_tokens: int = 16_384,
    cache_bytes: int = 4_000_000_000,
    journal: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Replace layers greedily while the validation score stays at or above P_min (Algorithm 1), then score on test.

    Args:
        teacher: from `load_teacher`.
        bank: from `distill` or `load_bank`, made from this teacher.
        task: from `load_task`; validation decides, test is scored at the end.
        p_min: share of the teacher's validation score to keep, or a value of the metric (`p_min_kind`).
        run_to_end: go on below P_min to draw the whole curve; M_opt and M_best are not affected.
        test_curve: score every step of the chosen path on test as well, after the search.
        batch_tokens: padded tokens per evaluation batch.
        cache_bytes: memory for hidden states that candidates share.
        journal: JSONL file that keeps every score; if it is there, its scores are not computed again.
        on_event: called with small dicts for logs and live displays.

    Raises:
        RecipeError: a P_min that the teacher itself does not reach.
        BankError: the bank was made from another teacher.
    """
    if bank.teacher_fingerprint != teacher.fingerprint:
        raise BankError(
            "bank",
            got=f"one of teacher {bank.teacher_fingerprint}",
            expected=f"one of {teacher.source} ({teacher.fingerprint})",
            hint="Give the teacher that the bank was made from, or distil again.",
        )
    mixers = bank.in_dtype(teacher.dtype)
    specs = {layer: bank.spec() for layer in bank.layers}

    def evaluator(split: str) -> Evaluator:
        return Evaluator(
            teacher.model,
            teacher.tokenizer,
            task,
            split,
            mixers=mixers,
            specs=specs,
            batch_tokens=batch_tokens,
            cache_bytes=cache_bytes if split == "validation" else 0,
        )

    started = time.monotonic()
    validation = evaluator("validation")
    with _open_journal(journal, teacher, bank, task) as book:
        trace = exact_greedy(
            validation,
            layers=bank.layers,
            p_min=p_min,
            p_min_kind=p_min_kind,
            run_to_end=run_to_end,
            journal=book,
            on_event=on_event,
        )
    seconds = time.monotonic() - started

    started = time.monotonic()
    test = evaluator("test")
    curve = tuple(test(frozenset(step.linear)) for step in trace.steps) if test_curve else ()

    def hybrid(layers: tuple[int, ...]) -> Any:
        model = make_hybrid(teacher.model, {i: mixers[i] for i in layers}, {i: specs[i] for i in layers})
        model.tokenizer = teacher.tokenizer
        return model

    return SearchResult(
        m_opt=hybrid(trace.m_opt.layers),
        m_best=hybrid(trace.m_best.layers),
        trace=trace,
        teacher_test=test(frozenset()),
        m_opt_test=test(frozenset(trace.m_opt.layers)),
        m_best_test=test(frozenset(trace.m_best.layers)),
        test_curve=curve,
        pass_equivalents=validation.pass_equivalents,
        seconds=seconds,
        test_seconds=time.monotonic() - started,
    )


def _open_journal(path: str | Path | None, teacher: Teacher, bank: MixerBank, task: Task) -> Any:
    if path is None:
        return nullcontext()
    # P_min is not part of it: the same scores serve any limit.
    identity = {
        "teacher": teacher.fingerprint,
        "dtype": str(teacher.dtype),
        "bank": bank.fingerprint,
        "task": fingerprint(task),
    }
    return Journal(path, identity=identity, resume=True)
