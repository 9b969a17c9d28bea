"""Search by name: sets the table for a strategy, lets it run, and hands out the trace with its certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtr.errors import RecipeError
from dtr.evaluation.score import Score
from dtr.selection.certificate import (
    Certificate,
    confirm_path,
    level_of_look,
    num_items_for_teacher,
    sizes_to_test,
)
from dtr.selection.criteria import Limits, PMinKind, check_p_min, hold_each, parts_of, resolve_p_min
from dtr.selection.items import ItemSplit
from dtr.selection.journal import ScoreBook
from dtr.selection.scorer import EventListener, ScoreFunction, Scorer
from dtr.selection.state import Budget, Guard, OutOfTime, Search
from dtr.selection.strategies import STRATEGIES
from dtr.selection.trace import GuardScore, SearchTrace

RANKING = "ranking"
"""What the journal calls scores that only rank; no guard task may have this name."""


@dataclass(frozen=True, kw_only=True)
class GuardTask:
    """A floor on another task: `p_min` and `p_min_kind` as for the task itself, over that task's own score."""

    name: str
    score: ScoreFunction
    p_min: float
    p_min_kind: PMinKind = "relative"


def select_layers(
    score: ScoreFunction,
    *,
    layers: Sequence[int],
    limits: Limits,
    strategy: str = "auto",
    run_to_end: bool = False,
    num_model_layers: int | None = None,
    layer_of: Mapping[int, int] | None = None,
    items: ItemSplit | None = None,
    guards: Sequence[GuardTask] = (),
    parts: Sequence[Any] = (),
    budget: Budget | None = None,
    facts: Callable[[str], Mapping[int, float]] | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    journal: ScoreBook | None = None,
    on_event: EventListener | None = None,
    earlier_looks: Callable[[], int] = lambda: 0,
) -> SearchTrace:
    """Find the hybrid with the most linear layers at or above P_min, and a path of hybrids that leads there.

    Args:
        score: validation score of a hybrid.
        layers: layers that may become linear, in any order, each once; or numbers of mixers, see `layer_of`.
        limits: when a hybrid is good enough.
        strategy: a name in `STRATEGIES`.
        run_to_end: go on below P_min until every candidate layer is linear, to draw the whole curve. M_opt and M_best
            are not affected, even if a later hybrid should score well again.
        num_model_layers: layers of the model; the highest candidate layer plus one when left out.
        layer_of: where several mixers may stand in for a layer: the layer of each candidate. Every choice is then made
            among candidates, and a layer that is linear takes its others out of the search. Numbers in the trace are
            those of candidates.
        items: blocks of items that `score` can be asked for alone, and items kept for confirmation; without it `score`
            is only asked for all items.
        guards: floors on other tasks; a swap that breaks one is refused.
        parts: a value of each item of the split, as its length; the limit must hold over the items of each value.
        budget: other reasons to stop.
        facts: numbers per layer by name, asked for by the baselines.
        seed: for strategies that draw.
        clock: seconds, for the budget.
        journal: scores are read from here before they are computed, and written here once they are. A search that
            was interrupted (KeyboardInterrupt passes through) and goes on with its journal gives the same trace.
        earlier_looks: how many searches have looked at the same confirmation items before; called once this one does.
        on_event: called with small dicts: `teacher`, `candidate` (see `Scorer`), `step`, `refused` and `stop`.

    Raises:
        RecipeError: no layers, an unknown strategy, or a P_min or floor that the teacher itself misses; before any
            candidate is scored.
    """
    run, layers = STRATEGIES[strategy], _sorted_layers(layers)
    check_p_min(limits.p_min, limits.p_min_kind)
    layer_of = layer_of or {layer: layer for layer in layers}
    num_candidates = len(layers) * (len(set(layer_of.values())) + 1) // 2
    scorer = Scorer(score, max_candidates=num_candidates, journal=journal, on_event=on_event)
    teacher = scorer.teacher(items.selection if items else None)
    # Under a certificate other items decide; the teacher is measured by those.
    may_miss = items is not None and bool(items.confirmation)
    threshold = resolve_p_min(limits.p_min, limits.p_min_kind, teacher, may_miss=may_miss)
    selected = items.selection if items else range(teacher.num_items)
    threshold = hold_each(threshold, limits, teacher, parts_of(parts, selected), may_miss=may_miss)
    confirmation = _Confirmation(scorer, items, limits, parts, earlier_looks) if items and items.confirmation else None
    ranking = getattr(score, "ranking", None)
    search = Search(
        layers=layers,
        num_model_layers=num_model_layers or max(layer_of.values()) + 1,
        layer_of=layer_of,
        scorer=scorer,
        ranker=Scorer(ranking, max_candidates=0, journal=journal, task=RANKING) if ranking is not None else None,
        teacher=teacher,
        threshold=threshold,
        blocks=items.blocks if items else (),
        guards=[_resolve_guard(guard, journal) for guard in guards],
        run_to_end=run_to_end,
        budget=budget,
        facts=facts,
        seed=seed,
        clock=clock,
        pass_share=getattr(score, "pass_share", 1.0) * (1 - (items.confirmation_share if items else 0.0)),
        is_certified=confirmation is not None,
    )
    try:
        run(search)
    except OutOfTime:
        assert search.budget.seconds is not None
        search.stop("budget", f"The budget of {search.budget.seconds:g} seconds is spent; more layers may go.")
    certificate = confirmation(search) if confirmation else None
    search.conclude()
    return _trace(search, certificate, limits, strategy)


def _trace(search: Search, certificate: Certificate | None, limits: Limits, strategy: str) -> SearchTrace:
    path = search.path
    m_opt, m_best = path.m_opt, path.m_best
    assert path.stop_reason is not None
    search.scorer.emit(
        "stop",
        reason=path.stop_reason,
        text=path.stop_text,
        num_opt=len(m_opt.layers),
        num_best=len(m_best.layers),
    )
    return SearchTrace(
        teacher=search.teacher,
        p_min=limits.p_min,
        p_min_kind=limits.p_min_kind,
        p_min_value=search.threshold.value,
        steps=tuple(replace(step, accepted=step.accepted and step.index <= len(m_opt.layers)) for step in path.steps),
        m_opt=m_opt,
        m_best=m_best,
        num_candidate_evaluations=search.scorer.num_candidates,
        stop_reason=path.stop_reason,
        stop_text=path.stop_text,
        strategy=strategy,
        reason=search.reason,
        guards=tuple(
            GuardScore(
                name=guard.name,
                floor=guard.threshold.value,
                teacher=guard.teacher,
                m_opt=guard.score(frozenset(m_opt.layers)),
            )
            for guard in search.guards
        ),
        certificate=certificate,
    )


class _Confirmation:
    """Scores over the confirmation items, asked for only once the order is settled."""

    def __init__(
        self, scorer: Scorer, items: ItemSplit, limits: Limits, parts: Sequence[Any], earlier_looks: Callable[[], int]
    ) -> None:
        self._scorer, self._items, self._earlier_looks = scorer, items, earlier_looks
        assert limits.p_min_confidence is not None
        self._limit: dict[str, Any] = {
            "confidence": limits.p_min_confidence,
            "p_min": limits.p_min,
            "p_min_kind": limits.p_min_kind,
            "share": items.confirmation_share,
            "parts": list(parts_of(parts, items.confirmation).values()),
        }
        self._teacher = self._score(frozenset())
        resolve_p_min(limits.p_min, limits.p_min_kind, self._teacher)
        level = level_of_look(limits.p_min_confidence, 0)
        least = num_items_for_teacher(
            level=level, p_min=limits.p_min, p_min_kind=limits.p_min_kind, teacher=self._teacher
        )
        if least is not None and least > len(items.confirmation):
            scorer.emit(
                "warning",
                text=f"{len(items.confirmation)} validation items are there to confirm a hybrid on, and even one that "
                f"answers like the teacher needs {least}, {math.ceil(least / items.confirmation_share)} in all: "
                "nothing will be certified.",
            )

    def __call__(self, search: Search) -> Certificate:
        """Test beginnings of the order, and end the path with the largest that is certified and keeps all floors."""
        order = search.proposal or search.path.m_opt.layers
        sizes = sizes_to_test(len(order))
        certificate = confirm_path(
            sizes,
            lambda num_linear: self._score(frozenset(order[:num_linear])),
            self._teacher,
            num_earlier_looks=self._earlier_looks(),
            **self._limit,
        )
        passed = [test.num_linear for test in certificate.tests if test.passed]
        while (
            passed and search.proposal and not search.keeps_guards(frozenset(order[: passed[-1]]), order[: passed[-1]])
        ):
            search.stop("guard", f"{certificate.text} But {passed.pop()} layers break the floor of a guard.")
        num_kept = passed[-1] if passed else 0
        certificate = replace(certificate, num_certified=num_kept)
        self._scorer.emit("certificate", text=certificate.text, num_certified=num_kept)
        search.end_with(num_kept, sizes, None if num_kept == len(order) else certificate.text)
        return certificate

    def _score(self, linear: frozenset[int]) -> Score:
        return self._scorer.look_up_or_score(linear, base=linear, items=self._items.confirmation)[0]


def _resolve_guard(guard: GuardTask, journal: ScoreBook | None) -> Guard:
    scorer = Scorer(guard.score, max_candidates=0, journal=journal, task=guard.name)
    teacher, _ = scorer.look_up_or_score(frozenset(), base=frozenset())
    threshold = resolve_p_min(guard.p_min, guard.p_min_kind, teacher, where=f"search.guards ({guard.name})")
    return Guard(name=guard.name, scorer=scorer, threshold=threshold, teacher=teacher)


def _sorted_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if not layers:
        raise RecipeError(
            "layers", got="no layers", expected="at least one layer to replace", hint="Distil some layers first."
        )
    assert len(set(layers)) == len(layers), f"candidate layers {list(layers)} repeat"
    return tuple(sorted(layers))
