"""Baselines: an order that is fixed beforehand, followed until P_min is missed; a pass per layer after the ranking."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from dtr.errors import RecipeError
from dtr.selection.registry import strategy
from dtr.selection.state import Search


@strategy("uniform")
def uniform(search: Search) -> None:
    """Evenly spread over the depth at every number of layers: positions in bit-reversed order."""
    layers = search.one_per_layer()
    num_bits = max(1, (len(layers) - 1).bit_length())
    reversed_bits = (int(f"{i:0{num_bits}b}"[::-1], 2) for i in range(2**num_bits))
    follow(search, [layers[i] for i in reversed_bits if i < len(layers)])


@strategy("random")
def random_order(search: Search) -> None:
    """A seeded shuffle."""
    order = list(search.layers)
    random.Random(search.seed).shuffle(order)
    follow(search, order)


@strategy("lowest_mse")
def lowest_mse(search: Search) -> None:
    """Best copied layers first, by held-out NMSE after distillation."""
    follow(search, ascending(_fact(search, "nmse"), search.layers))


@strategy("kl")
def kl(search: Search) -> None:
    """Least change of the model's output first: mean KL(teacher || teacher with that layer linear) in nats."""
    follow(search, ascending(_fact(search, "kl"), search.layers))


@strategy("impact")
def impact(search: Search) -> None:
    """Least impact first, the paper's score from linear probes: 1 - (A_linear + A_cross) / (2 A_full)."""
    follow(search, ascending(_fact(search, "impact"), search.layers))


@strategy("one_shot")
def one_shot(search: Search) -> None:
    """By the score of each layer alone in the teacher: the first step of `exact`, never updated."""
    search.expect_candidates(search.layers)
    alone = {layer: search.candidate(layer) for layer in search.layers}
    follow(search, sorted(alone, key=lambda layer: (-alone[layer].goodness, -alone[layer].log_likelihood, layer)))


def follow(search: Search, order: Sequence[int]) -> None:
    """Replace layers in this order, one by one; of several mixers for a layer, the first."""
    for layer in search.one_per_layer(order):
        if not search.goes_on():
            break
        search.take_best({layer: search.candidate(layer)})


def ascending(values: Mapping[int, float], layers: Sequence[int]) -> list[int]:
    return sorted(layers, key=lambda layer: (values[layer], layer))


def _fact(search: Search, name: str) -> Mapping[int, float]:
    values = search.facts(name) if search.facts else {}
    missing = [layer for layer in search.layers if layer not in values]
    if missing:
        raise RecipeError(
            "search.strategy",
            got=f"'{name if name != 'nmse' else 'lowest_mse'}', with no {name} known of layers {missing[:5]}",
            expected=f"a number of {name} for every layer",
            hint="Choose another strategy, or hand these numbers in.",
        )
    return values
