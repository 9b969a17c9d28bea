"""Scores of many hybrids of a real model, item by item: what search strategies are developed on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from dtr.distillation.bank import load_bank
from dtr.pipeline.preparation import prepare_task, search_settings
from dtr.recipe import Recipe
from dtr.selection.binding import make_validation
from dtr.teacher import Teacher


def write_table(path: Path, recipe: Recipe, bank: Path, teacher: Teacher, num_subsets: int) -> None:
    """One line for each hybrid: `kind`, `linear` (numbers of mixers), `value`, and by item `values` and `signals`.

    The first line says of what model, bank and task they are. Written as it goes; lines that are there stay, so that a
    table that was cut off goes on where it ended.
    """
    mixers, task = load_bank(bank, teacher=teacher), prepare_task(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {tuple(json.loads(line).get("linear", [-1])) for line in path.open()} if path.exists() else set()
    score = make_validation(teacher, mixers, task, search_settings(recipe, []))
    ranker = score.ranking or score
    with path.open("a", encoding="utf-8") as file:

        def write(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

        if not known:
            identity = {"teacher": teacher.source, "bank": mixers.fingerprint, "task": task.name, "metric": task.metric}
            write(
                **identity,
                num_items=len(task.splits["validation"]),
                pass_share=score.pass_share,
                nmse=mixers.nmse_after,
            )
        for kind, base, linear in _hybrids(mixers, num_subsets):
            if tuple(sorted(linear)) in known:
                continue
            found = score(linear, base=base)
            signals = found.signals if ranker is score else ranker(linear, base=base).signals
            rounded = [round(x, 5) for x in signals]
            write(kind=kind, linear=sorted(linear), value=found.value, values=found.per_item, signals=rounded)


def _hybrids(mixers: Any, num_subsets: int) -> list[tuple[str, frozenset[int], frozenset[int]]]:
    """Kind, base and linear layers; one mixer for each layer, the one with the lowest error."""
    best: dict[int, int] = {}
    for number in sorted(mixers.mixers, key=lambda n: (mixers.nmse_after.get(n, 0.0), n)):
        best.setdefault(mixers.layer_of[number], number)
    order, rng, nothing = list(best.values()), random.Random(0), frozenset[int]()
    every = frozenset(order)
    found = [("teacher", nothing, nothing), ("all", every, every)]
    found += [("alone", nothing, frozenset({number})) for number in sorted(order)]
    found += [("restored", every, every - {number}) for number in sorted(order)]
    found += [("by error", frozenset(order[:size]), frozenset(order[:size])) for size in range(2, len(order))]
    for _ in range(num_subsets):
        subset = frozenset(rng.sample(order, rng.randint(2, len(order) - 1)))
        found.append(("random", subset, subset))
    return found
