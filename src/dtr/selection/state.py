"""What every strategy works with: scores to ask for, the path so far, the limits, and the trace that comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtr.evaluation.score import Score
from dtr.selection.criteria import Threshold, argmax
from dtr.selection.meter import PassMeter
from dtr.selection.path import Path
from dtr.selection.scorer import Scorer
from dtr.selection.trace import Chosen, SearchStep, StopReason


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Where search may stop although more layers could go; None for no such limit."""

    num_linear: int | None = None
    """Stop once this many layers are linear."""
    num_linear_text: str = ""
    """Why that many, if it follows from another budget, as the bytes of a cache."""
    seconds: float | None = None
    """Stop after this time. Where it strikes depends on the machine."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Another task that must keep a floor, with the score function of its own items."""

    name: str
    scorer: Scorer
    threshold: Threshold
    teacher: Score

    def is_kept_by(self, linear: frozenset[int]) -> bool:
        return self.threshold.is_met_by(self.score(linear))

    def score(self, linear: frozenset[int]) -> Score:
        return self.scorer.look_up_or_score(linear, base=linear)[0]


class OutOfTime(Exception):
    """The budget of seconds is spent; the path so far stands."""


class Search:
    """One search, while it goes on.

    Args:
        layers: candidates, ascending: layers, or numbers of mixers where `layer_of` says which layer each is for.
        num_model_layers: layers of the model, for the estimate of the work.
        scorer: the task.
        teacher: its score over the items that search may look at.
        threshold: P_min.
        blocks: these items in blocks that may be scored alone; empty where the score function knows only all items.
        run_to_end: go on below P_min, to draw the curve.
        guards: floors on other tasks.
        budget: other reasons to stop.
        facts: numbers per layer by name (`nmse`, `kl`, `impact`), looked up when a strategy needs them.
        seed: for strategies that draw.
        clock: seconds, for the budget.
        layer_of: the layer that each candidate makes linear, where a layer has several; itself when left out.
        pass_share: what one pass over the items that search may look at costs, in pass equivalents; below 1 where
            choices share prompts, or where other items are kept for confirmation.
        ranker: cheaper scores that say how much a layer matters, as likelihoods of reference answers where the task's
            own score is of written text; the scorer itself when left out.
        is_certified: whether other items will decide how far the proposed order goes; see `propose`.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        num_model_layers: int,
        scorer: Scorer,
        teacher: Score,
        threshold: Threshold,
        blocks: Sequence[Sequence[int]] = (),
        run_to_end: bool = False,
        guards: Sequence[Guard] = (),
        budget: Budget | None = None,
        facts: Callable[[str], Mapping[int, float]] | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        layer_of: Mapping[int, int] | None = None,
        pass_share: float = 1.0,
        ranker: Scorer | None = None,
        is_certified: bool = False,
    ) -> None:
        self.layer_of = layer_of or {number: number for number in layers}
        self.layers, self.teacher, self.threshold, self.scorer = tuple(layers), teacher, threshold, scorer
        self.run_to_end, self.guards, self.seed = run_to_end, tuple(guards), seed
        self.budget = budget or Budget()
        self.facts = facts
        self.blocks = tuple(tuple(sorted(block)) for block in blocks)
        self._items = tuple(sorted(item for block in self.blocks for item in block))
        self.pass_share, self._ranker, self.is_certified = pass_share, ranker or scorer, is_certified
        self._meter = PassMeter(
            num_layers=num_model_layers,
            num_items=teacher.num_items,
            layer_of=layer_of,
            pass_share=pass_share,
            writing=0.0 if ranker is None else 1.0,
        )
        self.proposal: tuple[int, ...] = ()
        """Candidates in the order in which they may go, for the certificate to cut off."""
        # The teacher has been scored already.
        self._meter.add(frozenset(), base=frozenset(), items=self._items or range(teacher.num_items))
        self._clock = clock
        self._deadline = clock() + self.budget.seconds if self.budget.seconds else None

        self.path = Path.of(teacher)
        self.reason = ""

    @property
    def linear(self) -> frozenset[int]:
        return frozenset(self.path.order)

    @property
    def passes(self) -> float:
        """Estimated work so far, in pass equivalents over all items of the split."""
        return self._meter.passes

    @property
    def num_layers(self) -> int:
        """How many layers can become linear."""
        return len(set(self.layer_of.values()))

    def remaining(self) -> list[int]:
        """Candidates whose layer is not linear yet, and that were not refused."""
        taken = {self.layer_of[number] for number in self.path.order}
        refused = self.path.refused
        return [number for number in self.layers if self.layer_of[number] not in taken and number not in refused]

    def one_per_layer(self, ranked: Sequence[int] | None = None) -> list[int]:
        """The first candidate of each layer in this order; by default the best copy of each layer, layers ascending."""
        if ranked is None:
            nmse = self.facts("nmse") if self.facts and self.num_layers < len(self.layers) else {}
            ranked = sorted(self.layers, key=lambda number: (self.layer_of[number], nmse.get(number, 0.0), number))
        first: dict[int, int] = {}
        for number in ranked:
            first.setdefault(self.layer_of[number], number)
        return list(first.values())

    def goes_on(self) -> bool:
        """Whether a further step is wanted."""
        num_wanted = self.budget.num_linear
        if num_wanted is not None and len(self.path.order) >= num_wanted:
            why = self.budget.num_linear_text or "as many as asked for"
            self.stop("budget", f"{len(self.path.order)} layers are linear, {why}.")
        return bool(self.remaining()) and (self.run_to_end or self.path.stop_reason is None)

    def price(self, linear: frozenset[int], *, base: frozenset[int]) -> float:
        """What a score over all items costs, in pass equivalents."""
        return self._meter.price(linear, base=base)

    def score(
        self, linear: Iterable[int], *, base: frozenset[int] | None = None, blocks: Sequence[int] | None = None
    ) -> Score:
        """Score of a hybrid, over some blocks of items or over all that search may look at.

        Raises:
            OutOfTime: the budget of seconds is spent.
        """
        self._check_time()
        return self._score(frozenset(linear), self.linear if base is None else base, blocks)

    def _check_time(self) -> None:
        if self._deadline is not None and self._clock() > self._deadline:
            raise OutOfTime

    def signals(self, linear: frozenset[int], *, base: frozenset[int], num_blocks: int) -> Score:
        """The ranker's score of a hybrid over the first blocks; raises OutOfTime as `score`."""
        self._check_time()
        if self._ranker is self.scorer:
            return self._score(linear, base, range(num_blocks))
        items = self._items_of(range(num_blocks))
        self._meter.add_ranking(linear, base=base, items=range(self.teacher.num_items) if items is None else items)
        return self._ranker.look_up_or_score(linear, base=base, items=items)[0]

    def expect_signals(self, hybrids: Sequence[frozenset[int]], *, base: frozenset[int], num_blocks: int) -> None:
        """Announce a round of `signals`."""
        self._ranker.expect(hybrids, base=base, items=self._items_of(range(num_blocks)))

    def score_while_open(self, linear: frozenset[int], *, base: frozenset[int] | None = None) -> Score | None:
        """The score over all items, or None as soon as no outcome of the other items could bring it to P_min."""
        for num_blocks in range(1, len(self.blocks)):
            part = self.score(linear, base=base, blocks=range(num_blocks))
            if not self.threshold.may_be_met(part, self.teacher.num_items):
                return None
        return self.score(linear, base=base)

    def expect(
        self,
        hybrids: Iterable[frozenset[int]],
        *,
        base: frozenset[int] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Announce a round: scores, as `score` gives them, that will all be asked for."""
        self.scorer.expect(list(hybrids), base=self.linear if base is None else base, items=self._items_of(blocks))

    def expect_candidates(self, layers: Iterable[int]) -> None:
        """Announce a round of `candidate`."""
        self.expect([self.linear | {layer} for layer in layers])

    def score_untimed(self, linear: Iterable[int]) -> Score:
        """Score over all items that search may look at, after a search whose time may be spent."""
        return self._score(frozenset(linear), frozenset(linear), None)

    def _score(self, linear: frozenset[int], base: frozenset[int], blocks: Sequence[int] | None) -> Score:
        items = self._items_of(blocks)
        share = items is not None and len(items) < len(self._items)
        self._meter.add(linear, base=base, items=range(self.teacher.num_items) if items is None else items)
        return self.scorer.hybrid(linear, base=base, step=len(self.path.order) + 1, items=items, share=share)

    def _items_of(self, blocks: Sequence[int] | None) -> tuple[int, ...] | None:
        """The items of some blocks, or of all; None where the score function knows only all."""
        if blocks is None or not self._items:
            return self._items or None
        return tuple(sorted(item for block in blocks for item in self.blocks[block]))

    def candidate(self, layer: int) -> Score:
        """Score of the current hybrid with one more layer."""
        return self.score(self.linear | {layer})

    def keeps_guards(self, linear: frozenset[int], layers: Sequence[int]) -> bool:
        """Whether every guard keeps its floor; announces the one that does not."""
        broken = next((guard for guard in self.guards if not guard.is_kept_by(linear)), None)
        if broken is not None:
            self.scorer.emit("refused", layers=list(layers), guard=broken.name, num_linear=len(linear))
        return broken is None

    def take_best(self, candidates: Mapping[int, Score]) -> int | None:
        """Take the best candidate, or the next best where a guard refuses; None where all are refused."""
        left = dict(candidates)
        while left:
            layer = argmax(left)
            may_accept = self.path.stop_reason is None and self.threshold.is_met_by(left[layer])
            if not may_accept or self.keeps_guards(self.linear | {layer}, [layer]):
                self.take([layer], left[layer], candidates)
                return layer
            self.path = replace(self.path, refused=self.path.refused | {layer})
            del left[layer]
        return None

    def take(
        self,
        layers: Sequence[int],
        score: Score,
        candidates: Mapping[int, Score] | None = None,
        *,
        is_ranked: bool = True,
    ) -> None:
        """Make layers linear, in a measured order if `is_ranked`.

        Guards have been asked; below P_min the step is kept for the curve, and search stops.
        """
        self.path = self.path.with_step(layers, score, self.threshold, candidates or {}, is_ranked=is_ranked)
        step = self.path.steps[-1]
        fields: dict[str, Any] = {"layers": list(layers)} if len(layers) > 1 else {}
        self.scorer.emit(
            "step",
            step=step.index,
            layer=step.layer,
            score=score.value,
            accepted=step.accepted,
            num_layers=self.num_layers,
            **fields,
        )
        if not step.accepted:
            self.stop("p_min", self._below_p_min(step))

    def propose(self, order: Sequence[int]) -> None:
        """Hand over an order of layers that search itself does not cut off; only where `is_certified`."""
        self.proposal = tuple(order)[: self.budget.num_linear]

    def end_with(self, num_layers: int, sizes: Sequence[int], text: str | None) -> None:
        """End with as many layers of the proposal, or else of the path, as a certificate allows.

        Args:
            num_layers: that number.
            sizes: beginnings of a proposal that become steps; those beyond only to draw the curve.
            text: why no more, if that is the certificate's doing.
        """
        order, done = self.proposal, 0
        for size in sizes if order else ():
            if size > num_layers:
                if not self.run_to_end:
                    break
                self._stop_by_certificate(text)
            layers, score = order[done:size], self.score_untimed(order[:size])
            # What is certified stands, whatever the few items say that ranked the layers.
            accepted = size <= num_layers
            self.path = self.path.with_step(layers, score, self.threshold, {}, is_ranked=True, is_certified=accepted)
            done = size
        kept = (order or self.path.m_opt.layers)[:num_layers]
        if kept != self.path.m_opt.layers:
            score = self.score_untimed(kept) if kept else self.teacher
            self.path = replace(self.path, m_opt=Chosen(layers=kept, score=score))
        if len(self.path.m_best.layers) > num_layers:
            self.path = replace(self.path, m_best=self.path.m_opt)
        self._stop_by_certificate(text)
        if order and text is None:
            # All that was proposed; where that was as many as asked for, that is the reason.
            self.goes_on()

    def _stop_by_certificate(self, text: str | None) -> None:
        if text is not None and self.path.stop_reason != "guard":
            self.path = replace(self.path, stop_reason="certificate", stop_text=text)

    def stop(self, reason: StopReason, text: str) -> None:
        """End Algorithm 1; the first reason stands."""
        self.path = self.path.ended(reason, text)

    def conclude(self) -> None:
        """Name the reason where a strategy simply ran out of layers."""
        refused, taken = ({self.layer_of[number] for number in x} for x in (self.path.refused, self.path.order))
        left = refused - taken
        if left:
            guards = " and ".join(guard.name for guard in self.guards)
            names = ", ".join(map(str, sorted(left)))
            self.stop("guard", f"Layers {names} are left, and each would break a floor of {guards}.")
        self.stop("all_linear", f"All {self.num_layers} candidate layers are linear.")

    def _below_p_min(self, step: SearchStep) -> str:
        metric, value = step.score.metric, step.score.value
        side = "below" if step.score.higher_is_better else "above"
        return (
            f"Step {step.index}: the best candidate, layer {self.layer_of[step.layer]}, has {metric} {value:.6g}, "
            f"{side} the limit of {self.threshold.value:.6g}."
        )
