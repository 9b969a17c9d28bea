"""Strategies and stops on simulated tasks: how far they go, for what work, and how often they break their word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from simulated_tasks import WORLDS, SimulatedTask

from dtr.selection.criteria import Limits
from dtr.selection.items import CONFIRMATION_SHARE, split_items
from dtr.selection.select import select_layers
from dtr.selection.trace import SearchTrace

SIZES = (40, 100, 250, 500)


def search_once(
    world: str,
    *,
    seed: int,
    num_items: int,
    strategy: str = "auto",
    p_min: float = 0.95,
    confidence: float | None = None,
    confirmation_share: float = CONFIRMATION_SHARE,
    num_layers: int = 30,
    **options: Any,
) -> tuple[SimulatedTask, SearchTrace]:
    """One search on one simulated task; `options` as `SimulatedTask` takes them."""
    task = SimulatedTask(WORLDS[world], num_layers=num_layers, num_items=num_items, seed=seed, **options)
    share = 0.0 if confidence is None else confirmation_share
    trace = select_layers(
        task,
        layers=range(num_layers),
        limits=Limits(p_min=p_min, p_min_confidence=confidence),
        strategy=strategy,
        items=split_items(num_items, confirmation_share=share, names=task.names, seed=seed),
        facts=lambda name: task.nmse,
        seed=seed,
    )
    return task, trace


def simulate_certificates(
    num_runs: int,
    *,
    sizes: Sequence[int] = SIZES,
    worlds: Iterable[str] = tuple(WORLDS),
    confidence: float = 0.95,
    p_min: float = 0.95,
    **options: Any,
) -> dict[str, Any]:
    """Certified searches, and how many of the certified hybrids are truly below P_min.

    Returns:
        `rows`, by world and number of items: `runs`, `certified` (runs with any layer certified), `wrong` (certified
        and truly below P_min), `layers` (mean) and `passes` (mean).
    """
    out: dict[str, Any] = {"runs": num_runs, "confidence": confidence, "p_min": p_min, **options, "rows": {}}
    for world in worlds:
        for num_items in sizes:
            found = [
                search_once(world, seed=seed, num_items=num_items, p_min=p_min, confidence=confidence, **options)
                for seed in range(num_runs)
            ]
            layers = [trace.m_opt.layers for _, trace in found]
            out["rows"][f"{world} {num_items}"] = {
                "runs": num_runs,
                "certified": sum(len(one) > 0 for one in layers),
                "wrong": sum(len(x) > 0 and task.is_below(x, p_min) for x, (task, _) in zip(layers, found)),
                "layers": fmean(map(len, layers)),
                "passes": fmean(task.pass_equivalents for task, _ in found),
            }
    return out


def simulate_strategies(
    num_runs: int,
    *,
    strategies: Sequence[str] = ("exact", "auto", "one_shot"),
    worlds: Iterable[str] = tuple(WORLDS),
    num_items: int = 250,
    p_min: float = 0.95,
    **options: Any,
) -> dict[str, Any]:
    """The same tasks under several strategies by the plain limit, compared run by run with the first of them.

    Returns:
        `worlds`, by world and strategy: `layers` (mean), `short` (share of runs with more than one layer less than the
        first strategy), `below_one_shot` (with fewer than `one_shot`), `passes` (median), `most_passes`, `kept` (mean
        true share of the teacher's score) and `wrong` (share of runs truly below P_min).
    """
    out: dict[str, Any] = {"runs": num_runs, "num_items": num_items, "p_min": p_min, **options, "worlds": {}}
    for world in worlds:
        found = {
            name: [
                search_once(world, seed=seed, num_items=num_items, strategy=name, p_min=p_min, **options)
                for seed in range(num_runs)
            ]
            for name in strategies
        }
        layers = {name: [len(trace.m_opt.layers) for _, trace in runs] for name, runs in found.items()}
        first, cheap = layers[strategies[0]], layers.get("one_shot", [0] * num_runs)
        out["worlds"][world] = {
            name: {
                "layers": fmean(layers[name]),
                "short": fmean(ours < theirs - 1 for ours, theirs in zip(layers[name], first)),
                "below_one_shot": fmean(ours < theirs for ours, theirs in zip(layers[name], cheap)),
                "passes": median(task.pass_equivalents for task, _ in runs),
                "most_passes": max(task.pass_equivalents for task, _ in runs),
                "kept": fmean(
                    task.truth(frozenset(trace.m_opt.layers)) / task.truth(frozenset()) for task, trace in runs
                ),
                "wrong": fmean(task.is_below(trace.m_opt.layers, p_min) for task, trace in runs),
            }
            for name, runs in found.items()
        }
    return out
