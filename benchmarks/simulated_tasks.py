"""Score functions with known truths: search is measured on them, and its certificate checked, without a model.

Item i is answered rightly while its margin is positive. A linear layer moves the margin of every item by a damage, the
same for all items, and by a deviation of its own for each item; pairs of layers add damage. As items keep their
margins and deviations, hybrids err on the same items, and hybrids that share layers err most alike, as real ones do.
The truth of a hybrid is its score on many further items of the same world.

The worlds differ in what makes a search hard: `arc_easy` follows SmolLM2-135M with Gated DeltaNet on ARC-easy (single
layers move 1.6 % of the items, all together a tenth, and some do good), `needle` a long-context task (right on all
items alone, on none all together), `dominant` has three layers that matter, `pairs` layers that hurt in pairs only,
`rare` layers that break few items for good, `clustered` items that err together in fives, `saturated` a teacher that is
nearly always right; `weighted` is a perplexity over windows of unequal length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dtr.evaluation.score import Grade, Score, in_groups, mean_score, perplexity_score
from dtr.selection.meter import PassMeter

TRUTH_ITEMS = 8000


@dataclass(frozen=True, kw_only=True)
class World:
    """What a simulated task is like; margins have standard deviation 1."""

    accuracy: float = 0.7
    total_damage: float = 0.35
    """Sum of the layers' damages, without pairs and the dominant layers."""
    spread: float = 1.0
    """Standard deviation of the logarithm of a layer's damage."""
    deviation: float = 0.08
    """Typical movement of a single item by one layer."""
    gain: float = 0.0
    """Share of `total_damage` that is handed back evenly, so that the least damaging layers do good; the sum stays."""
    num_pairs: int = 0
    pair_damage: float = 0.0
    num_dominant: int = 0
    dominant_damage: float = 0.0
    growth: float = 0.0
    """How much the damage of a layer depends on how many are linear: 0 not at all, 1 in proportion."""
    cluster_size: int = 1
    rare: float = 0.0
    """Share of the items that one layer breaks for good."""
    is_perplexity: bool = False


WORLDS = {
    "independent": World(),
    "arc_easy": World(accuracy=0.51, total_damage=0.12, deviation=0.05, gain=1.0),
    "hard": World(total_damage=0.9, spread=1.2),
    "easy": World(accuracy=0.65, total_damage=0.03),
    "pairs": World(accuracy=0.6, total_damage=0.15, num_pairs=25, pair_damage=0.04),
    "dominant": World(accuracy=0.95, total_damage=0.3, num_dominant=3, dominant_damage=0.9),
    "needle": World(accuracy=0.999, total_damage=5.5, deviation=0.15, growth=0.8),
    "clustered": World(cluster_size=5),
    "rare": World(accuracy=0.97, total_damage=0.1, deviation=0.05, rare=0.006),
    "saturated": World(accuracy=0.98, total_damage=0.5),
    "weighted": World(total_damage=0.1, deviation=0.02, is_perplexity=True),
}


class SimulatedTask:
    """A score function as search takes it, with its truth and an account of the work.

    Args:
        world: what the task is like.
        num_layers: layers of the model, all of them candidates.
        num_items: validation items.
        seed: draws layers, pairs and items.
        pass_share: what one pass costs in pass equivalents; below 1 as if choices shared prompts.
        signal: what items say beside their score: `margin`, `likelihood` (of the right answer, which loses fluency as
            well), or `none`.
    """

    def __init__(
        self,
        world: World,
        *,
        num_layers: int = 30,
        num_items: int = 500,
        seed: int = 0,
        pass_share: float = 1.0,
        signal: str = "margin",
    ) -> None:
        self.pass_share, self._world, self._signal = pass_share, world, signal
        rng = np.random.default_rng(seed)
        self.num_layers, self.num_items = num_layers, num_items
        weights = rng.lognormal(0.0, world.spread, num_layers)
        shares = (1 + world.gain) * weights / weights.sum() - world.gain / num_layers
        self._damage = world.total_damage * shares
        self._damage[rng.choice(num_layers, world.num_dominant, replace=False)] += world.dominant_damage
        self._scale = world.deviation * np.sqrt(np.maximum(weights / weights.mean(), 0.1))
        self._rare = world.rare * weights / weights.mean()
        self._pairs = [tuple(rng.choice(num_layers, 2, replace=False)) for _ in range(world.num_pairs)]
        self._fluency = world.total_damage * (np.abs(shares) + rng.permutation(np.abs(shares))) / 2
        self._fluency += 0.012 * rng.standard_normal(num_layers)
        self.nmse = dict(enumerate((weights * rng.lognormal(0.0, 0.8, num_layers)).tolist()))
        self._items = self._draw(num_items, np.random.default_rng([seed, 1]))
        self._others: tuple[np.ndarray, ...] | None = None
        self._truth_seed = [seed, 2]
        self._meter = PassMeter(num_layers=num_layers, num_items=num_items, pass_share=pass_share)

    def _draw(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Margins (num), deviations (num, layers), weights (num) and groups (num) of items."""
        size = self._world.cluster_size
        groups = np.arange(num) // size

        def mixed(*shape: int) -> np.ndarray:
            own = rng.standard_normal((num, *shape))
            if size == 1:
                return own
            return math.sqrt(0.6) * rng.standard_normal((groups.max() + 1, *shape))[groups] + math.sqrt(0.4) * own

        margins = NormalDist().inv_cdf(self._world.accuracy) + mixed()
        deviations = mixed(self.num_layers) * self._scale
        if self._world.rare:
            deviations = deviations - 4.0 * (rng.random((num, self.num_layers)) < self._rare)
        return margins, deviations, np.ceil(rng.lognormal(5.0, 1.0, num)), groups

    @property
    def pass_equivalents(self) -> float:
        """Work so far in passes over the validation items."""
        return self._meter.passes

    @property
    def names(self) -> list[str]:
        """Groups of the validation items; empty where every item stands for itself."""
        return [str(group) for group in self._items[3]] if self._world.cluster_size > 1 else []

    def _moved(self, linear: frozenset[int], items: tuple[np.ndarray, ...]) -> np.ndarray:
        """Margins of the items with these layers linear."""
        chosen = np.array(sorted(linear), dtype=int)
        damage = float(self._damage[chosen].sum())
        damage += self._world.pair_damage * sum(a in linear and b in linear for a, b in self._pairs)
        damage *= 1 - self._world.growth + 2 * self._world.growth * len(linear) / self.num_layers
        return items[0] - damage + items[1][:, chosen].sum(axis=1)

    def truth(self, linear: frozenset[int]) -> float:
        """Goodness over many further items: accuracy, or the reciprocal of perplexity."""
        if self._others is None:
            self._others = self._draw(TRUTH_ITEMS, np.random.default_rng(self._truth_seed))
        margins, weights = self._moved(linear, self._others), self._others[2]
        if self._world.is_perplexity:
            return math.exp(float((weights * margins).sum() / weights.sum()) - 3.0)
        return float((margins > 0).mean())

    def is_below(self, linear: Sequence[int], p_min: float) -> bool:
        """Whether the hybrid truly keeps less than this share of the teacher's score."""
        return self.truth(frozenset(linear)) < p_min * self.truth(frozenset())

    def __call__(self, linear: frozenset[int], *, base: frozenset[int], items: Sequence[int] | None = None) -> Score:
        chosen = np.arange(self.num_items) if items is None else np.asarray(items)
        self._meter.add(linear, base=base, items=chosen.tolist())
        part = tuple(values[chosen] for values in self._items)
        margins = self._moved(linear, part)
        if self._world.is_perplexity:
            grades = [
                Grade(value=3.0 - m, log_likelihood=m - 3.0, weight=w)
                for m, w in zip(margins.tolist(), part[2].tolist())
            ]
            return perplexity_score(grades)
        fluency = float(sum(self._fluency[layer] for layer in linear))
        likelihoods = (-np.log1p(np.exp(-3 * margins)) - fluency) * (self._signal != "none")
        grades = [
            Grade(value=float(m > 0), log_likelihood=x, signal=3 * m if self._signal == "margin" else None)
            for m, x in zip(margins.tolist(), likelihoods.tolist())
        ]
        score = mean_score("acc", grades)
        return in_groups(score, [str(group) for group in part[3]]) if self._world.cluster_size > 1 else score
