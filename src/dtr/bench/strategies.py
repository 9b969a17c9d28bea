"""All strategies on one bank and task, in one table: what each finds, what it holds on test, what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.paired import mean_confidence_interval, paired_difference
from dtr.evaluation.score import Score
from dtr.replace import SearchResult, search
from dtr.tasks.base import Task
from dtr.teacher import Teacher

DEFAULT_STRATEGIES = ("exact", "auto", "lazy", "restore", "one_shot", "lowest_mse", "kl", "uniform", "random")
SHARES = (0.5, 0.75, 0.9)
"""Shares of the layers at which placements are compared, whatever P_min says."""


def compare_strategies(
    teacher: Teacher,
    bank: MixerBank,
    task: Task,
    *,
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
    shares: Sequence[float] = SHARES,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Search with each strategy, from nothing, and score what it finds on test.

    Args:
        teacher, bank, task: as `search` takes them.
        strategies: names.
        shares: also score the first so many layers of each path on test (`at_share`), the path drawn to its end.
            That is done after the timed search and adds nothing to its account.
        on_event: called with the events of every search.
        settings: further arguments of `search`, the same for all.

    Yields:
        one dict per strategy, with the keys of `benchmarks/results/search.json`.
    """
    test = Evaluator(
        teacher.model,
        teacher.tokenizer,
        task,
        "test",
        mixers=bank.in_dtype(teacher.dtype),
        specs={layer: bank.spec() for layer in bank.layers},
        batch_tokens=settings.get("batch_tokens", 16_384),
        cache_bytes=0,
    )
    reference: Score | None = None
    for strategy in strategies:
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder) / "journal.jsonl"
            common = {**settings, "strategy": strategy, "journal": journal, "on_event": on_event}
            result = search(teacher, bank, task, **common)
            order = list(result.trace.m_opt.layers)
            if shares:
                # What was scored above is in the journal; only the rest of the path is new.
                whole = search(teacher, bank, task, **{**common, "run_to_end": True})
                order = [layer for step in whole.trace.steps for layer in step.added]
        row = _row(strategy, result, order)
        row["at_share"] = {
            f"{share:g}": _on_test(test, order[: round(share * teacher.num_layers)], result.teacher_test)
            for share in shares
            if round(share * teacher.num_layers) <= len(order)
        }
        if strategy == "exact":
            reference = result.m_opt_test
        row["test_minus_exact"] = paired_difference(result.m_opt_test, reference).to_dict() if reference else None
        yield row


def _row(strategy: str, result: SearchResult, order: list[int]) -> dict[str, Any]:
    trace, test = result.trace, result.m_opt_test
    paired = paired_difference(test, result.teacher_test)
    low, high = mean_confidence_interval(test)
    return {
        "strategy": strategy,
        "num_replaced": len(trace.m_opt.layers),
        "layers": list(trace.m_opt.layers),
        "order": order,
        "val": trace.m_opt.score.value,
        "teacher_val": trace.teacher.value,
        "p_min_value": trace.p_min_value,
        "test": test.value,
        "test_ci95": [low, high],
        "teacher_test": result.teacher_test.value,
        "test_drop": paired.relative_drop,
        "paired": paired.to_dict(),
        "pass_equivalents": round(result.pass_equivalents, 2),
        "num_candidates": trace.num_candidate_evaluations,
        "seconds": round(result.seconds, 2),
        "stop_reason": trace.stop_text,
        "reason": trace.reason,
        "certificate": trace.certificate.to_dict() if trace.certificate else None,
    }


def _on_test(test: Evaluator, layers: list[int], teacher: Score) -> dict[str, Any]:
    score = test(frozenset(layers))
    low, high = mean_confidence_interval(score)
    return {
        "num_replaced": len(layers),
        "test": score.value,
        "test_ci95": [low, high],
        "paired": paired_difference(score, teacher).to_dict(),
    }
