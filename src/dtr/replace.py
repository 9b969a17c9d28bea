"""Phase 2: which layers to replace. Binds the search algorithm to a teacher, a bank and a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.binding import GuardFloor, find_layers, make_evaluator
from dtr.distillation.bank import MixerBank
from dtr.evaluation.score import Score
from dtr.hybrid.modeling import make_hybrid
from dtr.selection.criteria import PMinKind
from dtr.selection.trace import SearchTrace
from dtr.tasks.base import Task
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
    """Work of the search in full passes over the validation split, guard tasks left out."""
    guard_pass_equivalents: float
    """Work on the guard tasks, in passes over theirs."""
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
    strategy: str = "exact",
    p_min_confidence: float | None = None,
    confirmation_share: float = 0.5,
    guards: Sequence[GuardFloor] = (),
    max_linear_layers: int | None = None,
    max_cache_bytes: int | None = None,
    cache_context_tokens: int = 2048,
    max_seconds: float | None = None,
    run_to_end: bool = False,
    test_curve: bool = False,
    seed: int = 0,
    batch_tokens: int = 16_384,
    cache_bytes: int = 4_000_000_000,
    journal: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Replace layers while the validation score stays at or above P_min (Algorithm 1, or cheaper), then score on test.

    Args:
        teacher: from `load_teacher`.
        bank: from `distill` or `load_bank`, made from this teacher.
        task: from `load_task`; validation decides, test is scored at the end.
        p_min: share of the teacher's validation score to keep, or a value of the metric (`p_min_kind`).
        strategy: auto, exact, lazy, restore, or a baseline: uniform, random, lowest_mse, one_shot, kl, impact.
        p_min_confidence: commit only what is certified at this confidence on items that selection never saw, as 0.95.
        confirmation_share: share of the validation items that are kept for that.
        guards: tasks with a floor; a swap that breaks one is refused.
        max_linear_layers: stop once so many layers are linear.
        max_cache_bytes: stop once the cache of one sequence of `cache_context_tokens` tokens fits.
        max_seconds: stop the search after this time; the only limit whose result depends on the machine.
        run_to_end: go on below P_min to draw the whole curve; M_opt and M_best are not affected.
        test_curve: score every step of the chosen path on test as well, after the search.
        seed: draws the confirmation items, the portions for races, and the random baseline.
        batch_tokens: padded tokens per evaluation batch.
        cache_bytes: memory for hidden states that candidates share.
        journal: JSONL file that keeps every score; if it is there, its scores are not computed again.
        on_event: called with small dicts for logs and live displays.

    Raises:
        RecipeError: a P_min or floor that the teacher itself does not reach, a budget that no hybrid can meet.
        DataError: too few validation items for the confidence asked for.
        BankError: the bank was made from another teacher.
    """
    found = find_layers(
        teacher,
        bank,
        task,
        p_min=p_min,
        p_min_kind=p_min_kind,
        strategy=strategy,
        p_min_confidence=p_min_confidence,
        confirmation_share=confirmation_share,
        guards=guards,
        max_linear_layers=max_linear_layers,
        max_cache_bytes=max_cache_bytes,
        cache_context_tokens=cache_context_tokens,
        max_seconds=max_seconds,
        run_to_end=run_to_end,
        seed=seed,
        batch_tokens=batch_tokens,
        cache_bytes=cache_bytes,
        journal=journal,
        on_event=on_event,
    )
    trace = found.trace
    started = time.monotonic()
    test = make_evaluator(teacher, bank, task, "test", batch_tokens=batch_tokens, cache_bytes=0)
    scores: dict[frozenset[int], Score] = {}

    def on_test(layers: Sequence[int]) -> Score:
        linear = frozenset(layers)
        if linear not in scores:
            scores[linear] = test(linear)
        return scores[linear]

    wanted = [(), trace.m_opt.layers, trace.m_best.layers, *(step.linear for step in trace.steps if test_curve)]
    test.expect([frozenset(layers) for layers in wanted])
    mixers, spec = bank.in_dtype(teacher.dtype), bank.spec()

    def hybrid(layers: tuple[int, ...]) -> Any:
        model = make_hybrid(teacher.model, {i: mixers[i] for i in layers}, dict.fromkeys(layers, spec))
        model.tokenizer = teacher.tokenizer
        return model

    return SearchResult(
        m_opt=hybrid(trace.m_opt.layers),
        m_best=hybrid(trace.m_best.layers),
        trace=trace,
        teacher_test=on_test(()),
        m_opt_test=on_test(trace.m_opt.layers),
        m_best_test=on_test(trace.m_best.layers),
        test_curve=tuple(on_test(step.linear) for step in trace.steps) if test_curve else (),
        pass_equivalents=found.pass_equivalents,
        guard_pass_equivalents=found.guard_pass_equivalents,
        seconds=found.seconds,
        test_seconds=time.monotonic() - started,
    )
