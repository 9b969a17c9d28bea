"""What a search did, step by step, and which hybrids it chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dtr.evaluation.score import Score
from dtr.selection.certificate import Certificate
from dtr.selection.criteria import PMinKind

StopReason = Literal["p_min", "all_linear", "budget", "guard", "certificate"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A hybrid that search hands on."""

    layers: tuple[int, ...]
    """Its linear layers in the order of replacement; empty for the teacher."""
    score: Score
    """On the validation split that chose it, so biased upwards; report the test split beside it."""

    def to_dict(self, *, with_items: bool = False) -> dict[str, Any]:
        return {"layers": list(self.layers), "score": self.score.to_dict(with_items=with_items)}


@dataclass(frozen=True, kw_only=True)
class GuardScore:
    """M_opt on a guard task, all of whose items took part in the search."""

    name: str
    floor: float
    """In the guard's own metric."""
    teacher: Score
    m_opt: Score

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "floor": self.floor,
            "teacher": self.teacher.to_dict(),
            "m_opt": self.m_opt.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """One hybrid on the path: in Algorithm 1 every remaining layer was scored and the best one taken."""

    index: int
    """Number of linear layers of the hybrid that has `score`; 1 for the first step of Algorithm 1."""
    layer: int
    """The best layer of this step; the last of `added`."""
    linear: tuple[int, ...]
    """Sorted linear layers of the hybrid that has `score`, `layer` included even if the step was refused."""
    score: Score
    accepted: bool
    """Whether Algorithm 1 commits this step; False for the step that falls below P_min and for all later ones."""
    candidates: Mapping[int, Score]
    """Score of each layer that was tried in this step, by ascending layer."""
    added: tuple[int, ...] = ()
    """Layers that became linear in this step, in order; one in Algorithm 1, more where a strategy commits several."""
    is_ranked: bool = True
    """Whether the order of `added` was measured; otherwise they are a block in ascending order."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, without per-item lists; the keys of `candidates` are strings, as JSON has them."""
        return {
            "index": self.index,
            "layer": self.layer,
            "added": list(self.added),
            "is_ranked": self.is_ranked,
            "linear": list(self.linear),
            "score": self.score.to_dict(),
            "accepted": self.accepted,
            "candidates": {str(layer): score.to_dict() for layer, score in self.candidates.items()},
        }


@dataclass(frozen=True, kw_only=True)
class SearchTrace:
    """The whole search. Holds nothing of how long it took or where it was resumed: equal inputs, equal traces."""

    teacher: Score
    p_min: float
    """As asked for."""
    p_min_kind: PMinKind
    p_min_value: float
    """The bound in the metric's own unit: the lowest accuracy, or the highest perplexity, that is accepted."""
    steps: tuple[SearchStep, ...]
    m_opt: Chosen
    """The last hybrid at or above P_min: the most linear layers that the limit allows."""
    m_best: Chosen
    """The last hybrid that was at least as good as all before it, teacher included. As its score is at least the
    teacher's and so reaches P_min, it is M_opt or a hybrid on the way there, never beyond."""
    num_candidate_evaluations: int
    """Candidates whose score the search needed (the teacher not counted), read from the journal or not."""
    stop_reason: StopReason
    """What ended the search: the best candidate fell below P_min, no candidate layer was left, a budget was reached,
    all that was left broke a guard's floor, or the certificate reached less far than the search."""
    stop_text: str
    """The same as a sentence with numbers."""
    strategy: str = "exact"
    """Name of the strategy that made the path."""
    reason: str = ""
    """Why `auto` went the way it did; empty for the others."""
    guards: tuple[GuardScore, ...] = ()
    """M_opt on each guard task."""
    certificate: Certificate | None = None
    """The verdict of the confirmation items; None where none was asked for."""

    def to_dict(self, *, with_items: bool = False) -> dict[str, Any]:
        """Plain types for JSON.

        Args:
            with_items: keep the per-item lists of the teacher and of the chosen hybrids, for paired statistics;
                those of steps and candidates are left out in any case.
        """
        return {
            "teacher": self.teacher.to_dict(with_items=with_items),
            "p_min": self.p_min,
            "p_min_kind": self.p_min_kind,
            "p_min_value": self.p_min_value,
            "steps": [step.to_dict() for step in self.steps],
            "m_opt": self.m_opt.to_dict(with_items=with_items),
            "m_best": self.m_best.to_dict(with_items=with_items),
            "num_candidate_evaluations": self.num_candidate_evaluations,
            "stop_reason": self.stop_reason,
            "stop_text": self.stop_text,
            "strategy": self.strategy,
            "reason": self.reason,
            "guards": [guard.to_dict() for guard in self.guards],
            "certificate": self.certificate.to_dict() if self.certificate else None,
        }
