"""Search by name: sets the table for a strategy, lets it run, and hands out the trace with its certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtr.errors import RecipeError
from dtr.evaluation.score import Score
from dtr.registry import Registry
from dtr.selection.auto import auto
from dtr.selection.certificate import MAX_TESTS, Certificate, check_num_items, confirm_path
from dtr.selection.criteria import Limits, PMinKind, check_p_min, resolve_p_min, with_safety
from dtr.selection.greedy import exact
from dtr.selection.items import ItemSplit
from dtr.selection.journal import ScoreBook
from dtr.selection.lazy import lazy, restore
from dtr.selection.ranked import impact, kl, lowest_mse, one_shot, random_order, uniform
from dtr.selection.scorer import EventListener, ScoreFunction, Scorer
from dtr.selection.state import Budget, Guard, OutOfTime, Search
from dtr.selection.trace import Chosen, GuardScore, SearchTrace

STRATEGIES: Registry[Callable[[Search], None]] = Registry("search.strategy")
for _name, _strategy in {
    "auto": auto,
    "exact": exact,
    "impact": impact,
    "kl": kl,
    "lazy": lazy,
    "lowest_mse": lowest_mse,
    "one_shot": one_shot,
    "random": random_order,
    "restore": restore,
    "uniform": uniform,
}.items():
    STRATEGIES.register(_name)(_strategy)


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
    strategy: str = "exact",
    run_to_end: bool = False,
    num_model_layers: int | None = None,
    layer_of: Mapping[int, int] | None = None,
    items: ItemSplit | None = None,
    guards: Sequence[GuardTask] = (),
    budget: Budget | None = None,
    facts: Callable[[str], Mapping[int, float]] | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    journal: ScoreBook | None = None,
    on_event: EventListener | None = None,
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
        budget: other reasons to stop.
        facts: numbers per layer by name, asked for by the baselines.
        seed: for strategies that draw.
        clock: seconds, for the budget.
        journal: scores are read from here before they are computed, and written here once they are. A search that
            was interrupted (KeyboardInterrupt passes through) and goes on with its journal gives the same trace.
        on_event: called with small dicts: `teacher`, `candidate` (see `Scorer`), `step`, `refused` and `stop`.

    Raises:
        RecipeError: no layers, an unknown strategy, or a P_min or floor that the teacher itself misses; before any
            candidate is scored.
        DataError: too few items to confirm with.
    """
    run, layers = STRATEGIES[strategy], _sorted_layers(layers)
    check_limits(limits, num_confirmation=len(items.confirmation) if items else 0)
    layer_of = layer_of or {layer: layer for layer in layers}
    num_candidates = len(layers) * (len(set(layer_of.values())) + 1) // 2
    scorer = Scorer(score, max_candidates=num_candidates, journal=journal, on_event=on_event)
    teacher = scorer.teacher(items.selection if items else None)
    threshold = with_safety(resolve_p_min(limits.p_min, limits.p_min_kind, teacher), limits, teacher)
    certify = _Confirmation(scorer, items, limits) if items and limits.p_min_confidence is not None else None
    how: dict[str, Any] = {"run_to_end": run_to_end, "budget": budget, "facts": facts, "seed": seed, "clock": clock}
    search = Search(
        layers=layers,
        num_model_layers=num_model_layers or max(layer_of.values()) + 1,
        layer_of=layer_of,
        scorer=scorer,
        teacher=teacher,
        threshold=threshold,
        blocks=items.blocks if items else (),
        guards=[_resolve_guard(guard, journal) for guard in guards],
        **how,
        **_prices(getattr(score, "pass_share", 1.0), items, is_certified=certify is not None),
    )
    _run(search, run)
    return _conclude(search, certify(search) if certify else None, limits, strategy)


def _prices(pass_share: float, items: ItemSplit | None, *, is_certified: bool) -> dict[str, Any]:
    """What a pass over the items that search may look at costs, and what is to come after the search.

    Of the split's items, those that only the certificate looks at are confirmed: its teacher and its tests pass over
    them, and the hybrid that comes of it is scored on the others.
    """
    confirmed = len(items.confirmation) / (len(items.confirmation) + len(items.selection)) if items else 0.0
    reserved = confirmed * (1 + MAX_TESTS) + 1 - confirmed if is_certified else 0.0
    return {"pass_share": pass_share * (1 - confirmed), "reserved_passes": pass_share * reserved}


def _run(search: Search, strategy: Callable[[Search], None]) -> None:
    try:
        strategy(search)
    except OutOfTime:
        search.stop("budget", f"The budget of {search.budget.seconds:g} seconds is spent.")
    search.conclude()


def check_limits(limits: Limits, *, num_confirmation: int) -> None:
    """Refuse limits that no hybrid can be shown to keep, before anything is scored; errors as in `select_layers`."""
    check_p_min(limits.p_min, limits.p_min_kind)
    if not (math.isfinite(limits.safety) and limits.safety >= 0):
        raise RecipeError("search.safety", got=repr(limits.safety), expected="a number of standard errors, 0 or more")
    if limits.p_min_confidence is not None:
        check_num_items(
            num_confirmation,
            confidence=limits.p_min_confidence,
            p_min=limits.p_min,
            p_min_kind=limits.p_min_kind,
            teacher=None,
        )


def _conclude(search: Search, certificate: Certificate | None, limits: Limits, strategy: str) -> SearchTrace:
    """The trace of a finished search, cut back to what is certified."""
    path = search.path
    m_opt, stop_reason, stop_text = path.m_opt, path.stop_reason, path.stop_text
    assert stop_reason is not None
    if certificate is not None and certificate.num_certified < len(m_opt.layers):
        kept = m_opt.layers[: certificate.num_certified]
        m_opt = Chosen(layers=kept, score=search.score_untimed(kept) if kept else search.teacher)
        stop_reason, stop_text = "certificate", certificate.text
    search.scorer.emit(
        "stop", reason=stop_reason, text=stop_text, num_opt=len(m_opt.layers), num_best=len(search.path.m_best.layers)
    )
    return SearchTrace(
        teacher=search.teacher,
        p_min=limits.p_min,
        p_min_kind=limits.p_min_kind,
        p_min_value=search.threshold.value,
        steps=tuple(
            replace(step, accepted=step.accepted and step.index <= len(m_opt.layers)) for step in search.path.steps
        ),
        m_opt=m_opt,
        m_best=search.path.m_best,
        num_candidate_evaluations=search.scorer.num_candidates,
        stop_reason=stop_reason,
        stop_text=stop_text,
        safety=limits.safety,
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
    """Scores over the confirmation items, asked for only once the path is settled."""

    def __init__(self, scorer: Scorer, items: ItemSplit, limits: Limits) -> None:
        self._scorer, self._items = scorer, items
        self._limit: dict[str, Any] = {
            "confidence": limits.p_min_confidence,
            "p_min": limits.p_min,
            "p_min_kind": limits.p_min_kind,
        }
        self._teacher = self._score(frozenset())
        check_num_items(len(items.confirmation), **self._limit, teacher=self._teacher)

    def __call__(self, search: Search) -> Certificate:
        order = search.path.m_opt.layers
        certificate = confirm_path(
            len(order),
            lambda num_linear: self._score(frozenset(order[:num_linear])),
            self._teacher,
            **self._limit,
        )
        self._scorer.emit("certificate", text=certificate.text, num_certified=certificate.num_certified)
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
