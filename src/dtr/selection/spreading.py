"""The candidates of a search, shared out over the ranks that torchrun started.

Every rank runs the same search and asks for the same scores in the same order. What is announced as a round
(`expect`) is shared out, each rank works on its part, and all exchange what they found: so all know the same scores and
decide alike, and the path is that of one rank. A single score is worked out by one rank while the others wait. Only the
first rank has the journal's file; the others start from what it holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from dtr.distributed import World
from dtr.errors import DeviceError
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.score import Score
from dtr.selection.journal import Journal, ScoreBook
from dtr.tasks.base import Response

T = TypeVar("T")


class SpreadEvaluator:
    """An evaluator's scores, each worked out by one of the ranks and known to all.

    Args:
        evaluator: this rank's own.
        world: all ranks; each makes one of these with the same task, and asks it for the same things.
    """

    def __init__(self, evaluator: Evaluator, world: World) -> None:
        self._evaluator, self._world = evaluator, world
        self._known: dict[tuple[frozenset[int], tuple[int, ...] | None], Score] = {}
        self.ranking: SpreadEvaluator | None = None
        """Cheaper scores that rank layers, where the task's own are of written text (`dtr.selection.ranking`)."""

    def expect(
        self,
        hybrids: Sequence[frozenset[int]],
        *,
        base: frozenset[int] | None = None,
        items: Sequence[int] | None = None,
    ) -> None:
        """Work out these scores now, together; asking for them is free from then on. Nothing to do for one rank.

        Raises:
            DeviceError: another rank failed; says which and why.
        """
        if self._world.size == 1:
            return
        key = None if items is None else tuple(items)
        new = [one for one in dict.fromkeys(hybrids) if (one, key) not in self._known]
        if not new:
            return
        found = on_every_rank(
            self._world,
            lambda: {one: self._evaluator(one, base=base, items=items) for one in self._world.share(new)},
        )
        for part in found:
            self._known.update({(one, key): score for one, score in part.items()})

    def __call__(
        self,
        linear: frozenset[int] = frozenset(),
        *,
        base: frozenset[int] | None = None,
        items: Sequence[int] | None = None,
    ) -> Score:
        """As `Evaluator`."""
        if self._world.size == 1:
            return self._evaluator(linear, base=base, items=items)
        self.expect([linear], base=base, items=items)
        return self._known[linear, None if items is None else tuple(items)]

    def measure(
        self, name: str, layers: Sequence[int], items: Sequence[int] | None = None
    ) -> Mapping[int, float | None]:
        """`divergence` or `impact` of each layer."""
        of_layer = getattr(self._evaluator, name)
        parts = on_every_rank(
            self._world, lambda: {layer: of_layer(layer, items) for layer in self._world.share(list(layers))}
        )
        found = {layer: value for part in parts for layer, value in part.items()}
        return {layer: found[layer] for layer in layers}

    def warm_up(self, hybrids: Sequence[Sequence[int]]) -> None:
        """Score these on this rank, whatever the others do, so that what is built at the first use is there."""
        for linear in hybrids:
            self._evaluator(frozenset(linear))

    @property
    def pass_share(self) -> float:
        """As `Evaluator`; the same on every rank, as all lay out the same pairs."""
        return self._evaluator.pass_share

    @property
    def pass_equivalents_about(self) -> float:
        """The same as this rank can tell without asking the others, as if all had worked alike."""
        return self._evaluator.pass_equivalents * self._world.size

    def pass_equivalents(self) -> float:
        """Work of all ranks so far, in full passes over the split, rankings included; all ranks ask together."""
        ranking = self.ranking.pass_equivalents() if self.ranking is not None else 0.0
        return ranking + sum(self._world.collect(self._evaluator.pass_equivalents))

    def respond(self) -> list[list[Response]]:
        """What the teacher answers to every item, worked out by this rank itself."""
        return self._evaluator.respond()


@contextmanager
def shared_journal(world: World, opened: Callable[[], Journal]) -> Iterator[ScoreBook]:
    """The first rank's journal, and on the others its scores as they were when it was opened."""
    books = on_every_rank(
        world, lambda: opened() if world.is_first else None, lambda book: None if book is None else book.scores
    )
    if not world.is_first:
        yield ScoreBook(books[0])
        return
    with books[0] as own:
        yield own


def clock_of(world: World) -> Callable[[], float]:
    """Seconds on a clock that all ranks read alike, the first one's; all ranks read it together."""
    return time.monotonic if world.size == 1 else lambda: world.collect(time.monotonic())[0]


def on_every_rank(world: World, work: Callable[[], T], keep: Callable[[T], Any] = lambda result: result) -> list[Any]:
    """What `keep` makes of each rank's result, in the order of ranks; this rank's own result as it is.

    Raises:
        DeviceError: another rank failed; says which and why. What this rank raises itself passes through.
    """
    own: T | None = None
    failure: Exception | None = None
    try:
        own = work()
    except Exception as error:
        failure = error
        if world.size == 1:
            raise
    told = (None, " ".join(f"{type(failure).__name__}: {failure}".split())) if failure else (keep(own), "")  # type: ignore[arg-type]
    try:
        answers = world.collect(told)
    except RuntimeError as error:
        raise failure or DeviceError(
            "torchrun",
            got=f"no answer from another rank ({str(error).splitlines()[0]})",
            expected="every rank to stay",
            hint="Look for what that rank said; the journal keeps every score, so the run can be resumed.",
        ) from error
    if failure:
        raise failure
    for rank, (_, reason) in enumerate(answers):
        if reason:
            raise DeviceError(
                f"rank {rank}",
                got=reason,
                expected="every rank to work out its share",
                hint="The journal keeps every score that was exchanged, so the run can be resumed.",
            )
    results: list[Any] = [result for result, _ in answers]
    results[world.rank] = own
    return results
