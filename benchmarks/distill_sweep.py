"""Distil with several settings in one process and compare their held-out error; search and tasks are left out.

    python benchmarks/distill_sweep.py RECIPE --try distill.learning_rate=1e-3 --try "distill.batch_size=8 seed=1"

Prints one JSON line per trial: settings, mean and worst normalised MSE, the curve, tokens per second.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dtr.distillation.trainer import distill
from dtr.environment import hardware, own_commit
from dtr.ops.backend import choose_backend
from dtr.pipeline.preparation import prepare_mixers, prepare_text
from dtr.recipe import read_recipe
from dtr.teacher import load_teacher, pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], help="section.key=value for all trials")
    parser.add_argument("--try", action="append", default=[], dest="trials", help="settings of one trial, by spaces")
    args = parser.parse_args()

    base = read_recipe(args.recipe, args.set)
    device = pick_device(base.runtime.device)
    backend = choose_backend(base.runtime.backend, device.type)
    teacher = load_teacher(base.teacher.source, device=str(device), dtype=base.teacher.dtype)
    print(json.dumps({"hardware": hardware(device), "commit": own_commit(), "backend": backend.name}), flush=True)
    texts: dict[int, object] = {}
    for trial in args.trials or [""]:
        recipe = read_recipe(args.recipe, [*args.set, *trial.split()])
        length = recipe.distill.seq_len_tokens
        if length not in texts:
            texts[length], _ = prepare_text(recipe, teacher, emit=lambda event: None)
        bank = distill(
            teacher,
            texts[length],
            **prepare_mixers(recipe),
            seed=recipe.seed,
            backend=recipe.runtime.backend,
            **recipe.distill.model_dump(exclude={"seq_len_tokens"}),
        )
        print(json.dumps(describe(trial, bank)), flush=True)


def describe(trial: str, bank) -> dict:
    worst = max(bank.nmse_after, key=bank.nmse_after.__getitem__)
    return {
        "trial": trial,
        "num_tokens": bank.num_tokens,
        "mean_nmse_before": sum(bank.nmse_before.values()) / len(bank.nmse_before),
        "mean_nmse": bank.mean_nmse,
        "worst_layer": worst,
        "worst_nmse": bank.nmse_after[worst],
        "nmse": list(bank.nmse_after.values()),
        "curve": [[point["num_tokens"], round(point["mean_nmse"], 5)] for point in bank.curve],
        "tokens_per_second": bank.num_tokens / bank.seconds,
    }


if __name__ == "__main__":
    main()
