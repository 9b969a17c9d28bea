"""Scores candidates for a strategy: asks the journal first, writes to it, counts, and tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dtr.evaluation.score import Score
from dtr.selection.journal import ScoreBook

EventListener = Callable[[dict[str, Any]], None]


class ScoreFunction(Protocol):
    """All that search knows of a model: the validation score of the hybrid with these layers linear.

    It must be deterministic. `base` is the hybrid that the candidate was derived from, a hint that lets an evaluator
    reuse hidden states; it never changes the score. A function that is given blocks of items also takes
    `items: Sequence[int]`, the ascending indices of the items to score, always a union of blocks.

    A function that can work on several hybrids at once has a method `expect(hybrids, *, base, items)` besides, which is
    told of a round of scores before they are asked for. One whose full pass over the items costs less than a pass
    equivalent, as prompts are shared, says how much in `pass_share`, alike on every machine.
    """

    def __call__(self, linear: frozenset[int], *, base: frozenset[int]) -> Score: ...


class Scorer:
    """A score function with its journal and listener; each search makes one.

    Events are small dicts of plain types. `candidate` events carry `done` and `total` for a progress bar, where
    `total` is `max_candidates`, and `replayed` if the score came from the journal. Where more than one layer changes,
    `layer` is None and `num_linear` says how many are linear; `num_items` is there where not all items were scored.

    Args:
        score: the score function.
        max_candidates: most candidates that the strategy can ask for; it may stop earlier.
        journal: where scores are read and kept; None to keep none.
        on_event: called with each event, after the journal has the score.
        task: what the journal calls this task; "" for the task itself, a name for a guard.
    """

    def __init__(
        self,
        score: ScoreFunction,
        *,
        max_candidates: int,
        journal: ScoreBook | None = None,
        on_event: EventListener | None = None,
        task: str = "",
    ) -> None:
        self.num_candidates = 0
        self.max_candidates = max_candidates
        self._score = score
        self._journal = journal
        self._on_event = on_event
        self._task = task

    def teacher(self, items: Sequence[int] | None = None) -> Score:
        """Score of the model with no layer replaced."""
        score, replayed = self.look_up_or_score(frozenset(), base=frozenset(), items=items)
        self.emit("teacher", score=score.value, replayed=replayed)
        return score

    def hybrid(
        self, linear: frozenset[int], *, base: frozenset[int], step: int, items: Sequence[int] | None, share: bool
    ) -> Score:
        """Score of one hybrid, counted and announced as part of `step`; `share` if `items` are not all there are."""
        score, replayed = self.look_up_or_score(linear, base=base, items=items)
        self.num_candidates += 1
        changed = linear ^ base
        fields: dict[str, Any] = {"layer": next(iter(changed))} if len(changed) == 1 else {"layer": None}
        fields |= {} if len(linear) == len(base) + 1 else {"num_linear": len(linear)}
        fields |= {"num_items": score.num_items} if share else {}
        self.emit(
            "candidate",
            step=step,
            **fields,
            score=score.value,
            done=self.num_candidates,
            total=max(self.max_candidates, self.num_candidates),
            replayed=replayed,
        )
        return score

    def expect(
        self, hybrids: Sequence[frozenset[int]], *, base: frozenset[int], items: Sequence[int] | None = None
    ) -> None:
        """Announce scores that will be asked for next, to a function that wants to know."""
        expect = getattr(self._score, "expect", None)
        if expect is not None:
            expect([one for one in hybrids if self._find(one, items) is None], base=base, items=items)

    def emit(self, event: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event({"event": event, **fields})

    def look_up_or_score(
        self, linear: frozenset[int], *, base: frozenset[int], items: Sequence[int] | None = None
    ) -> tuple[Score, bool]:
        """The score, and whether it came from the journal; neither counted nor announced."""
        if (known := self._find(linear, items)) is not None:
            return known, True
        # Score functions without blocks need not know of items.
        score = self._score(linear, base=base, **({} if items is None else {"items": items}))
        if self._journal is not None:
            self._journal.record(linear, score, items=_key(items), task=self._task)
        return score, False

    def _find(self, linear: frozenset[int], items: Sequence[int] | None) -> Score | None:
        return None if self._journal is None else self._journal.find(linear, items=_key(items), task=self._task)


def _key(items: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if items is None else tuple(items)
