"""Score functions that are dictionaries: search is tested with them in milliseconds, without a model."""

from __future__ import annotations

import itertools
import random
from typing import Any

from dtr.evaluation.score import Score
from dtr.selection.criteria import Limits
from dtr.selection.select import select_layers
from dtr.selection.trace import SearchTrace


def acc(value: float, log_likelihood: float = 0.0, items: tuple[float, ...] = ()) -> Score:
    return Score(metric="acc", value=value, stderr=0.01, num_items=100, log_likelihood=log_likelihood, per_item=items)


def ppl(value: float) -> Score:
    return Score(metric="perplexity", value=value, stderr=0.1, num_items=9, log_likelihood=0.0, higher_is_better=False)


class Table:
    """A score function over a dictionary that notes every call, and can be interrupted at the k-th."""

    def __init__(self, scores: dict[tuple[int, ...], Score], interrupt_at: int | None = None) -> None:
        self.scores = {frozenset(linear): score for linear, score in scores.items()}
        self.calls: list[tuple[frozenset[int], frozenset[int]]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, linear: frozenset[int], *, base: frozenset[int]) -> Score:
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append((linear, base))
        return self.scores[linear]


def table(**values: float | Score) -> Table:
    """`table(full=0.6, l0=0.5, l02=0.4)`: accuracy of the full model and of the sets {0} and {0, 2}."""
    return Table(
        {
            () if name == "full" else tuple(map(int, name[1:])): value if isinstance(value, Score) else acc(value)
            for name, value in values.items()
        }
    )


def search(score: Table, *, layers=(0, 1, 2), p_min=0.5, p_min_kind="absolute", **options: Any) -> SearchTrace:
    return select_layers(
        score,
        layers=layers,
        strategy=options.pop("strategy", "exact"),
        limits=Limits(p_min=p_min, p_min_kind=p_min_kind),
        **options,
    )


def random_table(seed: int, num_layers: int, num_values: int = 6) -> Table:
    """Every subset gets one of a few accuracies, so that ties are common, and one of three likelihoods."""
    rng = random.Random(seed)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(num_layers), size) for size in range(num_layers + 1)
    )
    return Table(
        {
            subset: acc(rng.randrange(1, num_values + 1) / num_values, rng.choice((-1.0, -2.0, -3.0)), items)
            for subset in subsets
            for items in [rng.choice(((1.0, 0.0, 1.0), (0.1, 1 / 3, 2.0)))]
        }
    )
