"""Scores candidates for a strategy: asks the journal first, writes to it, counts, and tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dtr.evaluation.score import Score
from dtr.selection.journal import Journal

EventListener = Callable[[dict[str, Any]], None]


class ScoreFunction(Protocol):
    """All that search knows of a model: the validation score of the hybrid with these layers linear.

    It must be deterministic. `base` is the hybrid that the candidate was derived from, a hint that lets an evaluator
    reuse hidden states; it never changes the score.
    """

    def __call__(self, linear: frozenset[int], *, base: frozenset[int]) -> Score: ...


class Scorer:
    """A score function with its journal and listener; each strategy makes one.

    Events are small dicts of plain types. `candidate` events carry `done` and `total` for a progress bar, where
    `total` is `max_candidates`, and `replayed` if the score came from the journal.

    Args:
        score: the score function.
        max_candidates: most candidates that the strategy can ask for; it may stop earlier.
        journal: where scores are read and kept; None to keep none.
        on_event: called with each event, after the journal has the score.
    """

    def __init__(
        self,
        score: ScoreFunction,
        *,
        max_candidates: int,
        journal: Journal | None = None,
        on_event: EventListener | None = None,
    ) -> None:
        self.num_candidates = 0
        self._score = score
        self._max_candidates = max_candidates
        self._journal = journal
        self._on_event = on_event

    def teacher(self) -> Score:
        """Score of the model with no layer replaced."""
        score, replayed = self._look_up_or_score(frozenset(), base=frozenset())
        self.emit("teacher", score=score.value, replayed=replayed)
        return score

    def candidate(self, layer: int, *, base: frozenset[int], step: int) -> Score:
        """Score of `base` with `layer` made linear as well, counted and announced as part of `step`."""
        assert layer not in base, f"layer {layer} is linear already"
        score, replayed = self._look_up_or_score(base | {layer}, base=base)
        self.num_candidates += 1
        self.emit(
            "candidate",
            step=step,
            layer=layer,
            score=score.value,
            done=self.num_candidates,
            total=self._max_candidates,
            replayed=replayed,
        )
        return score

    def emit(self, event: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event({"event": event, **fields})

    def _look_up_or_score(self, linear: frozenset[int], *, base: frozenset[int]) -> tuple[Score, bool]:
        """The score, and whether it came from the journal."""
        if self._journal is not None and linear in self._journal:
            return self._journal[linear], True
        score = self._score(linear, base=base)
        if self._journal is not None:
            self._journal.record(linear, score)
        return score, False
