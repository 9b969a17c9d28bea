"""Does the certificate keep its word? Many simulated searches, each judged by the truth it could not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dtr.selection.items import split_items
from dtr.selection.simulation import PRESETS, SimulatedTask
from dtr.selection.strategies import select_layers


def simulate_certificates(
    num_runs: int,
    *,
    strategy: str = "auto",
    presets: Iterable[str] = ("arc_easy", "hard", "pairs", "easy"),
    num_layers: int = 30,
    num_items: int = 1000,
    confirmation_share: float = 0.5,
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
    for index, name in enumerate(names):
        seeds = range(index, num_runs, len(names))
        counts = {"runs": len(seeds), "certified": 0, "violations": 0, "layers": 0, "layers_plain": 0}
        counts["violations_plain"] = 0
        for seed in seeds:
            for certify in (True, False):
                task = SimulatedTask(PRESETS[name], num_layers=num_layers, num_items=num_items, seed=seed)
                trace = select_layers(
                    task,
                    layers=range(num_layers),
                    p_min=p_min,
                    p_min_kind="relative",
                    strategy=strategy,
                    items=split_items(num_items, confirmation_share=confirmation_share if certify else 0.0, seed=seed),
                    p_min_confidence=confidence if certify else None,
                    seed=seed,
                )
                is_below = task.truth(frozenset(trace.m_opt.layers)) < p_min * task.truth(frozenset())
                kind = "" if certify else "_plain"
                counts[f"violations{kind}"] += is_below
                counts[f"layers{kind}"] += len(trace.m_opt.layers)
                counts["certified"] += certify and bool(trace.m_opt.layers)
        out["presets"][name] = {
            **{key: counts[key] for key in ("runs", "certified", "violations", "violations_plain")},
            "mean_layers": counts["layers"] / max(len(seeds), 1),
            "mean_layers_plain": counts["layers_plain"] / max(len(seeds), 1),
        }
    for key in ("certified", "violations", "violations_plain"):
        out[key] = sum(found[key] for found in out["presets"].values())
    return out
