"""How close distilled layers come to the teacher: error, all layers linear on tasks, recall with a share replaced.

    python benchmarks/distil_quality.py RECIPE --task arc_easy=data/arc_easy --task piqa=data/piqa
    python benchmarks/distil_quality.py RECIPE --task arc_easy=data/arc_easy --try mixer.options.window=64

The recipe itself gives the main entry of the result file. Each --try (settings by spaces) is distilled as well and
becomes a row of its `ablation`; a row of the same settings is replaced. With --only-tries the main entry stays as it
is, with --bank the recipe's bank is read instead of made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.trainer import distill
from dtr.environment import hardware, own_commit
from dtr.evaluation.evaluator import Evaluator
from dtr.files import write_json
from dtr.ops.dispatch import use_backend
from dtr.preparation import prepare_text
from dtr.recipe import Recipe, read_recipe
from dtr.replace import search
from dtr.tasks.base import Task
from dtr.tasks.loading import load_task
from dtr.teacher import Teacher, load_teacher, pick_device

SHARES = (0.5, 0.75)
"""Shares of the layers that search replaces for the recall task."""
RECALL_FILLERS = 145
"""Sentences between the facts that make a passage of about 1,000 tokens."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    base = read_recipe(args.recipe, args.set)
    tasks = {name: load_task(folder, seed=base.seed) for name, folder in args.task}
    recall = load_recall(args, base.seed)
    device = pick_device(base.runtime.device)
    use_backend(base.runtime.backend, device.type)
    teacher = load_teacher(base.teacher.source, device=str(device), dtype=base.teacher.dtype)

    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    facts = {
        "command": " ".join(["python", "benchmarks/distil_quality.py", *(sys.argv[1:] if argv is None else argv)]),
        "hardware": hardware(device),
        "commit": own_commit(),
        "seeds": [base.seed],
    }
    if not args.only_tries:
        bank = load_bank(args.bank, teacher=teacher) if args.bank else make_bank(base, teacher)
        result = {**measure(base, teacher, bank, tasks, recall), **facts, "ablation": result.get("ablation", [])}
        write_json(args.out, result)
    for settings in args.trials:
        recipe = read_recipe(args.recipe, [*args.set, *settings.split()])
        row = {"settings": settings, **measure(recipe, teacher, make_bank(recipe, teacher), tasks, recall), **facts}
        row["seeds"] = [recipe.seed]
        others = [other for other in result.get("ablation", []) if other["settings"] != settings]
        result["ablation"] = [*others, row]
        # After each, so that what has been measured is kept whatever comes next.
        write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "ablation"}, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], help="section.key=value for all entries")
    parser.add_argument("--task", action="append", default=[], type=lambda text: text.split("=", 1), help="NAME=FOLDER")
    parser.add_argument("--try", action="append", default=[], dest="trials", help="settings of one row, by spaces")
    parser.add_argument("--only-tries", action="store_true", help="leave the main entry as it is")
    parser.add_argument("--bank", type=Path, help="the recipe's bank, made before")
    parser.add_argument("--recall-fillers", type=int, default=RECALL_FILLERS, help="sentences between the facts")
    parser.add_argument("--recall-items", type=int, nargs=2, default=(128, 512), help="validation and test items")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distil_quality.json"))
    return parser.parse_args(argv)


def load_recall(args: argparse.Namespace, seed: int) -> Task:
    num_validation, num_test = args.recall_items
    options = {"num_filler_sentences": args.recall_fillers}
    return load_task("recall", num_validation=num_validation, num_test=num_test, options=options, seed=seed)


def make_bank(recipe: Recipe, teacher: Teacher) -> MixerBank:
    text, _ = prepare_text(recipe, teacher, emit=lambda event: None)
    return distill(
        teacher,
        text,
        mixer=recipe.mixer.kind,
        options=recipe.mixer.options,
        seed=recipe.seed,
        **recipe.distill.model_dump(exclude={"seq_len_tokens"}),
    )


def measure(recipe: Recipe, teacher: Teacher, bank: MixerBank, tasks: dict[str, Task], recall: Task) -> dict[str, Any]:
    kept = {name: all_linear(recipe, teacher, bank, task) for name, task in tasks.items()}
    retention = {name: share_of(scores["hybrid"], scores["teacher"]) for name, scores in kept.items()}
    if retention and None not in retention.values():
        retention["mean"] = sum(retention.values()) / len(retention)
    recall_scores = by_share(recipe, teacher, bank, recall)
    return {
        "mixer": recipe.mixer.model_dump(),
        "is_pure_linear": all(mixer.is_pure_linear for mixer in bank.mixers.values()),
        "mean_nmse": bank.mean_nmse,
        "nmse": [bank.nmse_after[layer] for layer in bank.layers],
        "num_tokens": bank.num_tokens,
        "distill_seconds": bank.seconds,
        "all_linear_retention": retention,
        "all_linear_scores": kept,
        "recall_retention": {
            share: share_of(value, recall_scores["teacher"]) for share, value in recall_scores["hybrid"].items()
        },
        "recall_scores": recall_scores,
    }


def share_of(hybrid: float, teacher: float) -> float | None:
    """None where the teacher scores nothing, so that there is nothing to keep."""
    return hybrid / teacher if teacher else None


def all_linear(recipe: Recipe, teacher: Teacher, bank: MixerBank, task: Task) -> dict[str, float]:
    """Test scores of the teacher and of the hybrid without any attention."""
    evaluator = Evaluator(
        teacher.model,
        teacher.tokenizer,
        task,
        "test",
        mixers=bank.in_dtype(teacher.dtype),
        specs={number: bank.spec(number) for number in bank.mixers},
        batch_tokens=recipe.runtime.eval_batch_tokens,
    )
    return {"teacher": evaluator(frozenset()).value, "hybrid": evaluator(frozenset(bank.layers)).value}


def by_share(recipe: Recipe, teacher: Teacher, bank: MixerBank, recall: Task) -> dict[str, Any]:
    """Test scores on recall with shares of the layers replaced, in the order that search finds on validation."""
    wanted = {str(share): math.ceil(share * teacher.num_layers) for share in SHARES}
    found = search(
        teacher,
        bank,
        recall,
        strategy=recipe.search.strategy,
        # The search goes on to the largest share wherever the limit is. With a limit that no hybrid breaks `auto` would
        # see nothing to choose and give an order without meaning.
        p_min=recipe.search.p_min,
        run_to_end=True,
        max_linear_layers=max(wanted.values()),
        test_curve=True,
        seed=recipe.seed,
        batch_tokens=recipe.runtime.eval_batch_tokens,
        cache_bytes=recipe.runtime.cache_bytes,
    )
    on_path = {len(step.linear): score.value for step, score in zip(found.trace.steps, found.test_curve, strict=True)}
    return {
        "teacher": found.teacher_test.value,
        # Whoever names one of the six answers that the passage holds, without looking which.
        "chance": 1 / 6,
        "hybrid": {share: on_path[min(n for n in on_path if n >= num)] for share, num in wanted.items()},
    }


if __name__ == "__main__":
    main()
