"""Do stops keep their word? Many simulated searches, each judged by the truth it could not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from dtr.errors import DataError
from dtr.selection.criteria import Limits
from dtr.selection.items import CONFIRMATION_SHARE, split_items
from dtr.selection.simulation import PRESETS, SimulatedTask
from dtr.selection.strategies import select_layers


def simulate_certificates(
    num_runs: int,
    *,
    strategy: str = "auto",
    presets: Iterable[str] = ("arc_easy", "hard", "pairs", "easy"),
    num_layers: int = 30,
    num_items: int = 1000,
    confirmation_share: float = CONFIRMATION_SHARE,
    p_min: float = 0.95,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Search on simulated tasks, with and without a certificate, and count the hybrids that are truly below P_min.

    Both kinds of search take the same tasks and the same number of validation items. The truth of a task is known
    exactly, and so is the limit: p_min times the true accuracy of the teacher.

    Returns:
        `runs`, `violations` (certified hybrids below P_min), `certified` (runs with any layer certified), mean layers,
        and the same for the plain limit, in all and by preset.
    """
    names = list(presets)
    out: dict[str, Any] = {"runs": num_runs, "num_items": num_items, "confirmation_share": confirmation_share}
    out |= {"p_min": p_min, "confidence": confidence, "strategy": strategy, "presets": {}}
    common: dict[str, Any] = {"num_layers": num_layers, "num_items": num_items, "strategy": strategy, "p_min": p_min}
    for index, name in enumerate(names):
        seeds = range(index, num_runs, len(names))
        counts = {"runs": len(seeds), "certified": 0, "violations": 0, "layers": 0, "layers_plain": 0}
        counts["violations_plain"] = 0
        for seed in seeds:
            for certify in (True, False):
                limits: dict[str, Any] = {}
                if certify:
                    limits = {"confidence": confidence, "confirmation_share": confirmation_share}
                num_found, is_below = _search_once(name, seed=seed, **common, **limits)
                kind = "" if certify else "_plain"
                counts[f"violations{kind}"] += is_below
                counts[f"layers{kind}"] += num_found
                counts["certified"] += certify and num_found > 0
        out["presets"][name] = {
            **{key: counts[key] for key in ("runs", "certified", "violations", "violations_plain")},
            "mean_layers": counts["layers"] / max(len(seeds), 1),
            "mean_layers_plain": counts["layers_plain"] / max(len(seeds), 1),
        }
    for key in ("certified", "violations", "violations_plain"):
        out[key] = sum(found[key] for found in out["presets"].values())
    return out


def simulate_stops(
    num_runs: int,
    *,
    safeties: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    confidences: Sequence[float] = (0.8, 0.9, 0.95),
    strategy: str = "auto",
    presets: Iterable[str] = ("arc_easy", "hard", "pairs", "easy"),
    num_layers: int = 30,
    num_items: int = 500,
    p_min: float = 0.95,
) -> dict[str, Any]:
    """The same searches under each safety and each confidence: what share falls below P_min, and how many layers go.

    All see the same tasks and the same number of validation items; a confidence keeps its share of them apart.

    Returns:
        by the name of the stop, as `safety 1.5`: `violations` (share of runs) and `mean_layers`, in all and by preset.
    """
    names = list(presets)
    stops: dict[str, dict[str, float]] = {f"safety {safety:g}": {"safety": safety} for safety in safeties}
    stops |= {
        f"p_min_confidence {level:g}": {"confidence": level, "confirmation_share": CONFIRMATION_SHARE}
        for level in confidences
    }
    common: dict[str, Any] = {"num_layers": num_layers, "num_items": num_items, "strategy": strategy, "p_min": p_min}
    out: dict[str, Any] = {"runs": num_runs, **common, "stops": {}}
    for stop, limits in stops.items():
        found: dict[str, list[tuple[int, bool]]] = {name: [] for name in names}
        for seed in range(num_runs):
            name = names[seed % len(names)]
            found[name].append(
                _search_once(
                    name,
                    seed=seed,
                    num_layers=num_layers,
                    num_items=num_items,
                    strategy=strategy,
                    p_min=p_min,
                    **limits,
                )
            )
        every = [run for runs in found.values() for run in runs]
        out["stops"][stop] = {
            **_summary(every),
            "presets": {name: _summary(runs) for name, runs in found.items() if runs},
        }
    return out


def simulate_strategies(
    num_runs: int,
    *,
    strategies: Sequence[str] = ("exact", "auto"),
    presets: Iterable[str] = tuple(PRESETS),
    num_layers: int = 30,
    num_items: int = 250,
    pass_share: float = 1.0,
    p_min: float = 0.95,
) -> dict[str, Any]:
    """The same tasks under several strategies, compared run by run with the first of them.

    Args:
        pass_share: as if a pass cost so many pass equivalents, because choices share prompts.

    Returns:
        `presets`, by preset and strategy: `mean_layers`, `short` (share of runs with more than one layer less than the
        first strategy), `mean_passes`, `most_passes`, `true_drop` (mean share of the teacher's true accuracy that is
        lost) and `violations` (share of runs truly below P_min).
    """
    out: dict[str, Any] = {"runs": num_runs, "num_items": num_items, "pass_share": pass_share, "p_min": p_min}
    out["presets"] = {name: {} for name in presets}
    for name, rows in out["presets"].items():
        first: list[int] = []
        for strategy in strategies:
            layers, passes, drops = [], [], []
            for seed in range(num_runs):
                task = SimulatedTask(
                    PRESETS[name], num_layers=num_layers, num_items=num_items, seed=seed, pass_share=pass_share
                )
                trace = select_layers(
                    task,
                    layers=range(num_layers),
                    limits=Limits(p_min=p_min),
                    strategy=strategy,
                    items=split_items(num_items, seed=seed),
                    seed=seed,
                )
                layers.append(len(trace.m_opt.layers))
                passes.append(task.pass_equivalents)
                drops.append(1 - task.truth(frozenset(trace.m_opt.layers)) / task.truth(frozenset()))
            first = first or layers
            rows[strategy] = {
                "mean_layers": fmean(layers),
                "short": fmean(ours < theirs - 1 for ours, theirs in zip(layers, first)),
                "mean_passes": fmean(passes),
                "most_passes": max(passes),
                "true_drop": fmean(drops),
                "violations": fmean(drop > 1 - p_min for drop in drops),
            }
    return out


def _summary(runs: Sequence[tuple[int, bool]]) -> dict[str, float]:
    return {
        "violations": sum(is_below for _, is_below in runs) / len(runs),
        "mean_layers": sum(num_found for num_found, _ in runs) / len(runs),
    }


def _search_once(
    name: str,
    *,
    seed: int,
    num_layers: int,
    num_items: int,
    strategy: str,
    p_min: float,
    safety: float = 0.0,
    confidence: float | None = None,
    confirmation_share: float = 0.0,
) -> tuple[int, bool]:
    """How many layers a search on a simulated task finds, and whether that hybrid is truly below P_min."""
    task = SimulatedTask(PRESETS[name], num_layers=num_layers, num_items=num_items, seed=seed)
    try:
        trace = select_layers(
            task,
            layers=range(num_layers),
            limits=Limits(p_min=p_min, p_min_confidence=confidence, safety=safety),
            strategy=strategy,
            items=split_items(num_items, confirmation_share=confirmation_share, seed=seed),
            seed=seed,
        )
    except DataError:
        # Too few items even for the teacher itself: nothing is replaced.
        return 0, False
    layers = trace.m_opt.layers
    return len(layers), task.truth(frozenset(layers)) < p_min * task.truth(frozenset())
