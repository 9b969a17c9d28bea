"""How much work a score is, in passes over the items, for an evaluator that keeps its base's hidden states."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


class PassMeter:
    """Adds up pass equivalents: item-layers run over item-layers of one full pass.

    An upper half of the layers run on all items counts as 0.5, and what was scored before counts nothing. Items count
    alike here; an evaluator, which knows their tokens, counts tokens. Where the choices of a question share its prompt
    a pass costs less than 1, its `pass_share`. Strategies plan with this estimate, so that they
    decide alike on any machine.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_items: int,
        layer_of: Mapping[int, int] | None = None,
        pass_share: float = 1.0,
        writing: float = 0.0,
    ) -> None:
        """Args:

        writing: passes for what a hybrid writes to all items, where the task asks for text; no base saves any of it.
        """
        self.passes, self._writing = 0.0, writing
        self._pass_share = pass_share
        self._layer_of = layer_of or {}
        self._num_layers, self._num_items = num_layers, num_items
        self._base: frozenset[int] = frozenset()
        self._depths: dict[int, int] = {}
        """Layers of the base that were run, by item."""
        self._scored: dict[frozenset[int], set[int]] = {}

    def add(self, linear: frozenset[int], *, base: frozenset[int], items: Iterable[int]) -> None:
        """Count the scoring of `linear` on these items: the base up to the first change, then the hybrid from there."""
        scored = self._scored.setdefault(linear, set())
        new = [item for item in items if item not in scored]
        if not new:
            return
        scored.update(new)
        first_change = self._lowest(base ^ self._base)
        if first_change < self._num_layers:
            self._depths = {item: min(depth, first_change) for item, depth in self._depths.items()}
            self._base = base
        start = self._lowest(linear ^ base)
        num_run = 0
        for item in new:
            depth = self._depths.get(item, 0)
            num_run += max(0, start - depth) + self._num_layers - start
            self._depths[item] = max(depth, start)
        self.passes += self._pass_share * num_run / (self._num_layers * self._num_items)
        self.passes += self._writing * len(new) / self._num_items

    def add_ranking(self, linear: frozenset[int], *, base: frozenset[int], items: Collection[int]) -> None:
        """Count a score of another kind over these items, from the first change on; its base is taken to be there."""
        num_run = self._num_layers - self._lowest(linear ^ base)
        self.passes += self._pass_share * num_run / self._num_layers * len(items) / self._num_items

    def price(self, linear: frozenset[int], *, base: frozenset[int]) -> float:
        """What `linear` costs on all items, with what of its base has to be run anew."""
        start, known = self._lowest(linear ^ base), self._lowest(base ^ self._base)
        num_run = max(0, start - known) + self._num_layers - start
        return self._pass_share * num_run / self._num_layers + self._writing

    def _lowest(self, changed: frozenset[int]) -> int:
        return min((self._layer_of.get(number, number) for number in changed), default=self._num_layers)
