"""How close distilled layers come to the teacher: error, all layers linear on tasks, recall with a share replaced.

    python benchmarks/distil_quality.py RECIPE --task arc_easy=data/arc_easy --task piqa=data/piqa
    python benchmarks/distil_quality.py RECIPE --task arc_easy=data/arc_easy --try mixer.options.window=64

The recipe itself gives the main entry of the result file. Each --try (settings by spaces) is distilled as well and
becomes a row of its `ablation`; a row of the same settings is replaced, and one that fails is told and left out. With
--only-tries the main entry stays as it is, with --bank the recipe's bank is read instead of made. --by-position says
where the hybrids part from the teacher on held-out text and on the tasks' validation prompts: by position, and layer by
layer. --for-choosing leaves out all that is only for a final report (test scores, recall) and scores the tasks on
validation.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from dtr.bench.closeness import Sequences, divergences, layer_errors
from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.realignment import realign
from dtr.distillation.trainer import distill
from dtr.environment import hardware, own_commit
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.generation import encode_context
from dtr.files import write_json
from dtr.ops.dispatch import use_backend
from dtr.pipeline.preparation import prepare_text
from dtr.recipe import Recipe, read_recipe
from dtr.replacement.search import search
from dtr.tasks.base import Task
from dtr.tasks.loading import load_task
from dtr.tasks.training import right_answer
from dtr.teacher import Teacher, load_teacher, pick_device

SHARES = (0.5, 0.75)
"""Shares of the layers that search replaces for the recall task."""
RECALL_FILLERS = 145
"""Sentences between the facts that make a passage of about 1,000 tokens."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    base = read_recipe(args.recipe, args.set)
    tasks = {name: load_task(folder, seed=base.seed) for name, folder in args.task}
    recall = None if args.for_choosing else load_recall(args, base.seed)
    device = pick_device(base.runtime.device)
    use_backend(base.runtime.backend, device.type)
    teacher = load_teacher(base.teacher.source, device=str(device), dtype=base.teacher.dtype)

    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    facts = {
        "command": " ".join(["python", "benchmarks/distil_quality.py", *(sys.argv[1:] if argv is None else argv)]),
        "hardware": hardware(device),
        "commit": own_commit(),
    }

    def row(recipe: Recipe, bank: MixerBank | None = None) -> dict[str, Any]:
        text, _ = prepare_text(recipe, teacher, emit=lambda event: None)
        if bank is None:
            bank = make_bank(recipe, teacher, text)
        # In blocks of the same length whatever a trial trains on.
        held_out = text.held_out.flatten()
        held_out = held_out[: len(held_out) // length * length].view(-1, length)

        def describe(bank: MixerBank) -> dict[str, Any]:
            found = measure(recipe, teacher, bank, tasks, recall)
            if args.by_position:
                found |= partings(teacher, bank, held_out, tasks, args.text_blocks, args.layer_blocks)
            return found

        measured = describe(bank)
        if recipe.realign.num_tokens:
            # Reported apart: it is no part of the plain method.
            measured["realigned"] = describe(realign_all(recipe, teacher, bank, text))
        return {**measured, **facts, "seeds": [recipe.seed]}

    length = base.distill.seq_len_tokens
    if not args.only_tries:
        bank = load_bank(args.bank, teacher=teacher) if args.bank else None
        result = {**row(base, bank), "ablation": result.get("ablation", [])}
        write_json(args.out, result)
    failed = []
    for settings in args.trials:
        try:
            new = {"settings": settings, **row(read_recipe(args.recipe, [*args.set, *settings.split()]))}
        except Exception:
            traceback.print_exc()
            failed.append(settings)
            continue
        others = [other for other in result.get("ablation", []) if other["settings"] != settings]
        result["ablation"] = [*others, new]
        # After each, so that what has been measured is kept whatever comes next.
        write_json(args.out, result)
        # Recorded steps hold their memory in cycles.
        gc.collect()
    if failed:
        sys.exit(f"{len(failed)} rows failed: {'; '.join(failed)}")
    print(json.dumps({key: value for key, value in result.items() if key != "ablation"}, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], help="section.key=value for all entries")
    parser.add_argument("--task", action="append", default=[], type=lambda text: text.split("=", 1), help="NAME=FOLDER")
    parser.add_argument("--try", action="append", default=[], dest="trials", help="settings of one row, by spaces")
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


def load_recall(args: argparse.Namespace, seed: int) -> Task:
    num_validation, num_test = args.recall_items
    options = {"num_filler_sentences": args.recall_fillers}
    return load_task("recall", num_validation=num_validation, num_test=num_test, options=options, seed=seed)


def make_bank(recipe: Recipe, teacher: Teacher, text: Text) -> MixerBank:
    return distill(
        teacher,
        text,
        mixer=recipe.mixer.kind,
        options=recipe.mixer.options,
        seed=recipe.seed,
        **recipe.distill.model_dump(exclude={"seq_len_tokens"}),
    )


def realign_all(recipe: Recipe, teacher: Teacher, bank: MixerBank, text: Text) -> MixerBank:
    """The bank's layers once more, on the hidden states of the hybrid that has all of them."""
    own = {"num_tokens", "seq_len_tokens", "learning_rate", "refit_tokens", "layers"}
    return realign(
        teacher,
        bank,
        text,
        list(bank.mixers),
        **recipe.realign.model_dump(),
        **recipe.distill.model_dump(exclude=own),
        seed=recipe.seed,
    )


def measure(
    recipe: Recipe, teacher: Teacher, bank: MixerBank, tasks: dict[str, Task], recall: Task | None
) -> dict[str, Any]:
    """Without `recall` what is for choosing between settings: the tasks' validation items instead of their test."""
    split = "validation" if recall is None else "test"
    kept = {name: all_linear(recipe, teacher, bank, task, split) for name, task in tasks.items()}
    retention = {name: share_of(scores["hybrid"], scores["teacher"]) for name, scores in kept.items()}
    if retention and None not in retention.values():
        retention["mean"] = sum(retention.values()) / len(retention)
    prefix = "all_linear" if recall is not None else "validation_all_linear"
    facts: dict[str, Any] = {
        "mixer": recipe.mixer.model_dump(),
        "is_pure_linear": all(mixer.is_pure_linear for mixer in bank.mixers.values()),
        "mean_nmse": bank.mean_nmse,
        "nmse": [bank.nmse_after[layer] for layer in bank.layers],
        "num_tokens": bank.num_tokens,
        "distill_seconds": bank.seconds,
        f"{prefix}_retention": retention,
        f"{prefix}_scores": kept,
    }
    if recall is not None:
        scores = by_share(recipe, teacher, bank, recall)
        shares = {share: share_of(value, scores["teacher"]) for share, value in scores["hybrid"].items()}
        facts |= {"recall_retention": shares, "recall_scores": scores}
    return facts


def partings(
    teacher: Teacher,
    bank: MixerBank,
    held_out: torch.Tensor,
    tasks: dict[str, Task],
    num_text_blocks: int,
    num_layer_blocks: int,
) -> dict[str, Any]:
    """KL(teacher || hybrid) on text and on the right answers of the tasks' validation items; errors of the layers."""
    mixers, numbers = bank.in_dtype(teacher.dtype), frozenset(bank.mixers)
    everything = {"all_linear": numbers}
    alone = {f"only {number}": frozenset({number}) for number in bank.mixers}
    without = {f"without {number}": numbers - {number} for number in bank.mixers}
    texts = {"held_out": Sequences.of(held_out[:num_text_blocks].tolist())}
    texts |= {name: Sequences.of(validation_prompts(teacher, task)) for name, task in tasks.items()}
    some = Sequences.of(held_out[:num_layer_blocks].tolist())
    found = {name: divergences(teacher, mixers, text, everything)["all_linear"] for name, text in texts.items()}
    by_layer = divergences(teacher, mixers, some, {**everything, **alone, **without})
    errors = layer_errors(teacher, mixers, texts["held_out"])
    buckets = {name for error in errors.values() for name in error.nmse_by_position}
    return {
        "all_linear_kl": {name: one.kl for name, one in found.items()},
        "all_linear_agreement": {name: one.agreement for name, one in found.items()},
        "all_linear_kl_by_position": {name: one.by_position for name, one in found.items()},
        # Both on the same few blocks.
        "kl_by_layer": {name: by_layer[name].kl for name in ("all_linear", *alone, *without)},
        "nmse_by_position": {
            bucket: [error.nmse_by_position[bucket] for error in errors.values()]
            for bucket in sorted(buckets, key=lambda name: int(name.partition("-")[0]))
        },
    }


def validation_prompts(teacher: Teacher, task: Task) -> list[list[int]]:
    """Token ids of each validation item with its right answer."""
    rows = []
    for item in task.splits["validation"]:
        request = right_answer(item)
        answer = teacher.tokenizer(request.target, add_special_tokens=False)["input_ids"]
        rows.append(encode_context(teacher.tokenizer, request.context, chat_template=task.chat_template) + answer)
    return rows


def share_of(hybrid: float, teacher: float) -> float | None:
    """None where the teacher scores nothing, so that there is nothing to keep."""
    return hybrid / teacher if teacher else None


def all_linear(recipe: Recipe, teacher: Teacher, bank: MixerBank, task: Task, split: str) -> dict[str, float]:
    """Scores of the teacher and of the hybrid without any attention."""
    evaluator = Evaluator(
        teacher.model,
        teacher.tokenizer,
        task,
        split,
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
