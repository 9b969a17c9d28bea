"""The path of a search: which hybrids it has committed, one after the other, and why it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtr.evaluation.score import Score
from dtr.selection.criteria import Threshold, at_least
from dtr.selection.trace import Chosen, SearchStep, StopReason


@dataclass(frozen=True, kw_only=True)
class Path:
    """A path from the teacher; frozen, so that a search can go back to an earlier one."""

    current: Score
    """Score of the hybrid with the layers in `order`."""
    p_best: float
    """Best goodness so far."""
    m_opt: Chosen
    m_best: Chosen
    order: tuple[int, ...] = ()
    steps: tuple[SearchStep, ...] = ()
    refused: frozenset[int] = frozenset()
    """Candidates that broke a guard's floor; a larger hybrid would break it too, so they are not tried again."""
    stop_reason: StopReason | None = None
    stop_text: str = ""

    @staticmethod
    def of(teacher: Score) -> Path:
        """The beginning of every path."""
        nothing = Chosen(layers=(), score=teacher)
        return Path(current=teacher, p_best=teacher.goodness, m_opt=nothing, m_best=nothing)

    def with_step(
        self,
        layers: Sequence[int],
        score: Score,
        threshold: Threshold,
        candidates: Mapping[int, Score],
        *,
        is_ranked: bool,
        is_certified: bool = False,
    ) -> Path:
        """One step further. Once the path has ended, M_opt and M_best stay as they are."""
        order = (*self.order, *layers)
        goes_on = self.stop_reason is None
        step = SearchStep(
            index=len(order),
            layer=layers[-1],
            linear=tuple(sorted(order)),
            score=score,
            accepted=goes_on and (is_certified or threshold.is_met_by(score)),
            candidates={layer: candidates[layer] for layer in sorted(candidates)},
            added=tuple(layers),
            is_ranked=is_ranked,
        )
        longer = replace(self, current=score, order=order, steps=(*self.steps, step))
        chosen = Chosen(layers=order, score=score)
        if goes_on and at_least(score.goodness, self.p_best):
            # The maximum keeps P_best from sinking, tolerance by tolerance, over many ties.
            longer = replace(longer, m_best=chosen, p_best=max(self.p_best, score.goodness))
        return replace(longer, m_opt=chosen) if step.accepted else longer

    def ended(self, reason: StopReason, text: str) -> Path:
        """The same path with a reason to end; the first one stands."""
        return self if self.stop_reason is not None else replace(self, stop_reason=reason, stop_text=text)
