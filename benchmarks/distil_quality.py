"""How close distilled layers come to the teacher: error, all layers linear on tasks, recall with a share replaced.

    python benchmarks/distil_quality.py RECIPE --task arc_easy=data/arc_easy --task piqa=data/piqa
    python benchmarks/distil_quality.py RECIPE --task arc_easy=data/arc_easy --try mixer.options.window=64
    python benchmarks/distil_quality.py RECIPE --merge part1.json part2.json

The recipe itself gives the main entry of the result file. Each --try (settings by spaces) is distilled as well and
becomes a row of its `ablation`; a row of the same settings is replaced, and one that fails is told and left out. With
--only-tries the main entry stays as it is, with --bank the recipe's bank is read instead of made. --by-position says
where the hybrids part from the teacher on held-out text and on the tasks' validation prompts: by position, and layer by
layer. --for-choosing leaves out all that is only for a final report (test scores, recall) and scores the tasks on
validation. --part 1/2 makes every second row, for processes side by side, each with an --out of its own; --merge then
takes their rows over.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from distil_measures import Measures

from dtr.corpus.mixing import Text
from dtr.distillation import loop
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.realignment import NOT_OF_DISTILLATION, realign
from dtr.distillation.trainer import distill
from dtr.environment import hardware, own_commit
from dtr.files import write_json
from dtr.ops.backend import choose_backend
from dtr.pipeline.preparation import prepare_mixers, prepare_text
from dtr.recipe import Recipe, read_recipe
from dtr.tasks.base import Task
from dtr.tasks.loading import load_task
from dtr.teacher import Teacher, load_teacher, pick_device

RECALL_FILLERS = 145
"""Sentences between the facts that make a passage of about 1,000 tokens."""
MAX_STUDENTS = 256
"""Kinds and shapes of students that one process may compile; beyond torch's own 8 it would stop compiling."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    result = read_result(args.out) if args.out.exists() else {}
    if args.merge:
        result["ablation"] = merged(result, *map(read_result, args.merge))
        write_json(args.out, result)
        return
    # Errors on the way are in no row, and measuring them takes as long as a third of a short training.
    loop.NUM_MEASURES = 1
    rows = Rows(args, argv)
    if not args.only_tries:
        result = {**rows.make(rows.base, args.bank), "ablation": result.get("ablation", [])}
        write_json(args.out, result)
    failed = []
    first, num_parts = args.part
    for settings in args.trials[first - 1 :: num_parts]:
        began = time.monotonic()
        try:
            with torch._dynamo.config.patch(recompile_limit=MAX_STUDENTS):
                made = rows.make(read_recipe(args.recipe, [*args.set, *settings.split()]))
        except Exception:
            traceback.print_exc()
            failed.append(settings)
            continue
        result["ablation"] = merged(result, {"ablation": [{"settings": settings, **made}]})
        # After each, so that what has been measured is kept whatever comes next.
        write_json(args.out, result)
        print(f"{made['mean_nmse']:.4f} in {time.monotonic() - began:.0f} s: {settings}", file=sys.stderr, flush=True)
        # Recorded steps hold their memory in cycles.
        gc.collect()
    if failed:
        sys.exit(f"{len(failed)} rows failed: {'; '.join(failed)}")
    print(json.dumps({key: value for key, value in result.items() if key != "ablation"}, indent=1))


class Rows:
    """Makes rows of the result file; teacher, texts and tasks are read once for all of them."""

    def __init__(self, args: argparse.Namespace, argv: list[str] | None) -> None:
        self.base = base = read_recipe(args.recipe, args.set)
        tasks = {name: load_task(folder, seed=base.seed) for name, folder in args.task}
        recall = None if args.for_choosing else load_recall(args, base.seed)
        device = pick_device(base.runtime.device)
        choose_backend(base.runtime.backend, device.type)
        self._teacher = load_teacher(base.teacher.source, device=str(device), dtype=base.teacher.dtype)
        self._measures = Measures(
            teacher=self._teacher,
            tasks=tasks,
            recall=recall,
            num_text_blocks=args.text_blocks if args.by_position else 0,
            num_layer_blocks=args.layer_blocks,
        )
        self._facts = {
            "command": " ".join(["python", "benchmarks/distil_quality.py", *(sys.argv[1:] if argv is None else argv)]),
            "hardware": hardware(device),
            "commit": own_commit(),
        }
        self._texts: dict[tuple[str, int, int], Text] = {}

    def make(self, recipe: Recipe, folder: Path | None = None) -> dict[str, Any]:
        """A row for a recipe, with its bank from `folder` if it is there already."""
        text, length = self._text(recipe), self.base.distill.seq_len_tokens
        given = {"teacher": self._teacher, "backend": recipe.runtime.backend}
        bank = load_bank(folder, **given) if folder else make_bank(recipe, self._teacher, text)
        # In blocks of the same length whatever a trial trains on.
        held_out = text.held_out.flatten()
        held_out = held_out[: len(held_out) // length * length].view(-1, length)
        measured = self._measures(recipe, bank, held_out)
        if recipe.realign.num_tokens:
            # Reported apart: it is no part of the plain method.
            again = realign_all(recipe, self._teacher, bank, text)
            measured["realigned"] = self._measures(recipe, again, held_out)
        return {**measured, **self._facts, "seeds": [recipe.seed]}

    def _text(self, recipe: Recipe) -> Text:
        """The text of a recipe; those that read the same share it."""
        read = recipe.model_dump_json(include={"text", "task", "seed"})
        key = (read, recipe.distill.seq_len_tokens, recipe.distill.num_tokens)
        # A stream knows how far it has been read.
        if key not in self._texts or recipe.text.streaming:
            self._texts[key], _ = prepare_text(recipe, self._teacher, emit=lambda event: None)
        return self._texts[key]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], help="section.key=value for all entries")
    parser.add_argument("--task", action="append", default=[], type=lambda text: text.split("=", 1), help="NAME=FOLDER")
    parser.add_argument("--try", action="append", default=[], dest="trials", help="settings of one row, by spaces")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="I/N: every Nth row of --try, from the Ith on")
    parser.add_argument("--merge", type=Path, nargs="+", help="take over rows of other result files; nothing is run")
    parser.add_argument("--only-tries", action="store_true", help="leave the main entry as it is")
    parser.add_argument("--bank", type=Path, help="the recipe's bank, made before")
    parser.add_argument("--by-position", action="store_true", help="KL to the teacher by position and by layer")
    parser.add_argument("--for-choosing", action="store_true", help="tasks on validation; no test scores, no recall")
    parser.add_argument("--text-blocks", type=int, default=128, help="held-out blocks for --by-position")
    parser.add_argument("--layer-blocks", type=int, default=16, help="those that each layer is looked at on alone")
    parser.add_argument("--recall-fillers", type=int, default=RECALL_FILLERS, help="sentences between the facts")
    parser.add_argument("--recall-items", type=int, nargs=2, default=(128, 512), help="validation and test items")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distil_quality.json"))
    return parser.parse_args(argv)


def part_of(text: str) -> tuple[int, int]:
    """I and N of I/N; a ValueError where that names no part."""
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


def read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def merged(*results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of all results in order; of the same settings the last one counts."""
    rows = [row for result in results for row in result.get("ablation", [])]
    last = {row["settings"]: row for row in rows}
    return [row for row in rows if row is last[row["settings"]]]


def load_recall(args: argparse.Namespace, seed: int) -> Task:
    num_validation, num_test = args.recall_items
    options = {"num_filler_sentences": args.recall_fillers}
    return load_task("recall", num_validation=num_validation, num_test=num_test, options=options, seed=seed)


def make_bank(recipe: Recipe, teacher: Teacher, text: Text) -> MixerBank:
    return distill(
        teacher,
        text,
        **prepare_mixers(recipe),
        seed=recipe.seed,
        backend=recipe.runtime.backend,
        **recipe.distill.model_dump(exclude={"seq_len_tokens"}),
    )


def realign_all(recipe: Recipe, teacher: Teacher, bank: MixerBank, text: Text) -> MixerBank:
    """The bank's layers once more, on the hidden states of the hybrid that has all of them."""
    return realign(
        teacher,
        bank,
        text,
        list(bank.mixers),
        **recipe.realign.model_dump(),
        **recipe.distill.model_dump(exclude=set(NOT_OF_DISTILLATION)),
        seed=recipe.seed,
    )


if __name__ == "__main__":
    main()
