"""Strategy `exact`: Algorithm 1 of "Distill-then-Replace" (https://arxiv.org/abs/2601.11667), as printed.

Every step scores every remaining layer, L(L+1)/2 candidates for L layers when run to the end. Added to the paper: a
tie rule and a tolerance against rounding (`dtr.selection.criteria`), a journal, and the curve below P_min.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtr.errors import RecipeError
from dtr.evaluation.score import Score
from dtr.selection.criteria import PMinKind, Threshold, argmax, at_least, check_p_min, resolve_p_min
from dtr.selection.journal import Journal
from dtr.selection.scorer import EventListener, ScoreFunction, Scorer
from dtr.selection.trace import Chosen, SearchStep, SearchTrace, StopReason

__all__ = ["ScoreFunction", "exact_greedy"]


def exact_greedy(
    score: ScoreFunction,
    *,
    layers: Sequence[int],
    p_min: float,
    p_min_kind: PMinKind,
    run_to_end: bool = False,
    journal: Journal | None = None,
    on_event: EventListener | None = None,
) -> SearchTrace:
    """Replace one layer after another, always the one whose replacement scores best.

    Args:
        score: validation score of a hybrid.
        layers: layers that may become linear, in any order, each once.
        p_min: smallest share of the teacher's score to keep, or a value of the metric; see `resolve_p_min`.
        p_min_kind: `relative` or `absolute`.
        run_to_end: go on below P_min until every candidate layer is linear, to draw the whole curve. M_opt and M_best
            stay what Algorithm 1 gives: neither changes after the first step below P_min, even if a later hybrid
            should score well again.
        journal: scores are read from here before they are computed, and written here once they are. A search that
            was interrupted (KeyboardInterrupt passes through) and goes on with its journal gives the same trace.
        on_event: called with small dicts: `teacher`, `candidate` (see `Scorer`), `step` and `stop`.

    Raises:
        RecipeError: no layers, or a P_min that the teacher itself misses; before any candidate is scored.
    """
    check_p_min(p_min, p_min_kind)
    layers = _sorted_layers(layers)
    scorer = Scorer(score, max_candidates=len(layers) * (len(layers) + 1) // 2, journal=journal, on_event=on_event)
    teacher = scorer.teacher()
    threshold = resolve_p_min(p_min, p_min_kind, teacher)

    order: tuple[int, ...] = ()
    m_opt = m_best = Chosen(layers=order, score=teacher)
    p_best = teacher.goodness
    steps: list[SearchStep] = []
    stopped_at: SearchStep | None = None
    while len(order) < len(layers) and (run_to_end or stopped_at is None):
        step = _best_step(scorer, layers, order, threshold, may_accept=stopped_at is None)
        steps.append(step)
        order = (*order, step.layer)
        hybrid = Chosen(layers=order, score=step.score)
        if stopped_at is None and at_least(step.score.goodness, p_best):
            # The maximum keeps P_best from sinking, tolerance by tolerance, over many ties.
            m_best, p_best = hybrid, max(p_best, step.score.goodness)
        if step.accepted:
            m_opt = hybrid
        elif stopped_at is None:
            stopped_at = step
    stop_reason: StopReason = "p_min" if stopped_at else "all_linear"
    stop_text = _below_p_min(stopped_at, threshold) if stopped_at else f"All {len(layers)} candidate layers are linear."
    scorer.emit("stop", reason=stop_reason, text=stop_text, num_opt=len(m_opt.layers), num_best=len(m_best.layers))
    return SearchTrace(
        teacher=teacher,
        p_min=p_min,
        p_min_kind=p_min_kind,
        p_min_value=threshold.value,
        steps=tuple(steps),
        m_opt=m_opt,
        m_best=m_best,
        num_candidate_evaluations=scorer.num_candidates,
        stop_reason=stop_reason,
        stop_text=stop_text,
    )


def _best_step(
    scorer: Scorer, layers: Sequence[int], order: Sequence[int], threshold: Threshold, *, may_accept: bool
) -> SearchStep:
    """Score every remaining layer on top of `order` and take the best."""
    base, index = frozenset(order), len(order) + 1
    candidates = {layer: scorer.candidate(layer, base=base, step=index) for layer in layers if layer not in base}
    layer = argmax(candidates)
    best: Score = candidates[layer]
    accepted = may_accept and threshold.is_met_by(best)
    scorer.emit("step", step=index, layer=layer, score=best.value, accepted=accepted, num_layers=len(layers))
    return SearchStep(
        index=index,
        layer=layer,
        linear=tuple(sorted(base | {layer})),
        score=best,
        accepted=accepted,
        candidates=candidates,
    )


def _sorted_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if not layers:
        raise RecipeError(
            "layers", got="no layers", expected="at least one layer to replace", hint="Distil some layers first."
        )
    assert len(set(layers)) == len(layers), f"candidate layers {list(layers)} repeat"
    return tuple(sorted(layers))


def _below_p_min(step: SearchStep, threshold: Threshold) -> str:
    metric, value = step.score.metric, step.score.value
    side = "below" if step.score.higher_is_better else "above"
    return (
        f"Step {step.index}: the best candidate, layer {step.layer}, has {metric} {value:.6g}, "
        f"{side} the limit of {threshold.value:.6g}."
    )
