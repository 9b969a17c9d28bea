"""Run `dtr` over a list of tasks and write the table of results.

    python benchmarks/study.py benchmarks/study.yaml --data data --out runs/study

The list names a base recipe, teachers and tasks. Each teacher is distilled once and its bank serves all its tasks;
teachers with `finetune` are trained first (`benchmarks/finetune_teacher.py`). `--bank TEACHER=DIR` takes a bank that is
there already, `--model TEACHER=SOURCE` another place for a teacher's weights. A task that fails is told and left out,
the others go on. What is finished is not done again, so the command may be cut off and repeated, with `--only` for
some of the tasks.

With `--jobs N` so many processes work at once, spread over the GPUs that are there: first on the teachers, and on each
task as soon as its teacher's bank is there. Two share a GPU where N is larger than their number. A teacher's `gpus` in
the list (or `--gpus TEACHER=N`) are those that distil it together. OUT/logs holds what each of them says.

Results go to `benchmarks/results/study.json` (the table) and `benchmarks/results/study/NAME.json` (the whole record of
each run) after every task; `docs/make_study.py` makes the page.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from finetune_teacher import finetune
from study_jobs import Job, alone, end_with_parent, find_places, run_jobs
from study_plan import ROOT, Study, at_home, write_recipe

from dtr.distributed import leave_world
from dtr.errors import DtrError
from dtr.evaluation.paired import mean_confidence_interval
from dtr.evaluation.score import Score
from dtr.files import write_json
from dtr.pipeline import distill_only, run
from dtr.pipeline.folder import EVENTS, RECIPE
from dtr.recipe import read_recipe
from dtr.teacher import load_model

RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for teachers, banks and runs")
    parser.add_argument("--data", default="data", help="folder that stands for data/ in the list")
    parser.add_argument("--only", action="append", default=[], help="a task of the list; repeatable")
    parser.add_argument("--model", action="append", default=[], help="TEACHER=SOURCE, its weights; repeatable")
    parser.add_argument("--bank", action="append", default=[], help="TEACHER=DIR, its bank; repeatable")
    parser.add_argument("--gpus", action="append", default=[], help="TEACHER=N, GPUs that distil it; repeatable")
    parser.add_argument("--set", action="append", default=[], help="section.key=value for every run")
    parser.add_argument("--jobs", type=int, default=1, help="processes that work at once, spread over the GPUs")
    parser.add_argument("--step", choices=STEPS, help="this step alone, for --teacher, as jobs do")
    parser.add_argument("--teacher", help="for --step")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    end_with_parent()
    plan = at_home(yaml.safe_load(args.study.read_text(encoding="utf-8")), args.data)
    for teacher, source in named(parser, plan, args.model).items():
        plan["teachers"][teacher]["source"] = source
    for teacher, num_gpus in named(parser, plan, args.gpus).items():
        plan["teachers"][teacher]["gpus"] = int(num_gpus)
    if unknown := set(args.only) - set(plan["tasks"]):
        parser.error(f"--only {' '.join(sorted(unknown))}: the list has {', '.join(plan['tasks'])}")
    study = Study(
        plan=plan,
        out=args.out,
        results=args.results,
        settings=args.set,
        banks={teacher: Path(folder) for teacher, folder in named(parser, plan, args.bank).items()},
    )
    if args.step:
        STEPS[args.step](study, args.teacher)
        leave_world()
        return
    names = args.only or list(plan["tasks"])
    num_failed = run_apart(study, names, args.jobs) if args.jobs > 1 else run_here(study, names)
    write_table(study)
    raise SystemExit(f"{num_failed} of {len(names)} tasks failed" if num_failed else 0)


def named(parser: argparse.ArgumentParser, plan: dict[str, Any], texts: list[str]) -> dict[str, str]:
    """`TEACHER=VALUE` texts as a dictionary."""
    found = dict(text.partition("=")[::2] for text in texts)
    if unknown := [name for name, value in found.items() if name not in plan["teachers"] or not value]:
        parser.error(f"{' '.join(unknown)}: write TEACHER=VALUE; teachers are {', '.join(plan['teachers'])}")
    return found


def run_here(study: Study, names: list[str]) -> int:
    """Run tasks one after the other in this process; returns how many failed."""
    num_failed = 0
    for name in names:
        began = time.monotonic()
        try:
            record = run_task(study, name)
            keep_record(study, name, record)
            print(json.dumps(result_of(name, record)), flush=True)
        except Exception as error:
            # Whatever happens in one task must not cost the others; Ctrl-C is no Exception and ends the study.
            num_failed += 1
            if not isinstance(error, DtrError):
                traceback.print_exc()
            say(f"{name} FAILED: {error}")
        say(f"{name}: {time.monotonic() - began:.0f} s")
        release_memory()
    return num_failed


def run_apart(study: Study, names: list[str], num_at_once: int) -> int:
    """Run every step in a process of its own, `num_at_once` of them; returns how many tasks failed."""
    # Told to end, we end our jobs first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with alone(study.out):
        failed = run_jobs(
            jobs_of(study, names),
            program=Path(__file__),
            places=find_places(num_at_once),
            logs=study.out / "logs",
            say=say,
            on_end=lambda: write_table(study),
        )
    return len(failed.keys() & set(names))


def jobs_of(study: Study, names: list[str]) -> list[Job]:
    """What is still to be done for these tasks: the steps of their teachers, then the tasks."""
    given = sys.argv[1:]
    for option in ("--only", "--jobs"):
        given = without(given, option)
    left = [name for name in names if not (study.out / name / "report.json").is_file()]
    jobs: dict[str, Job] = {}

    def add(step: str, teacher: str, needs: tuple[str, ...] = (), num_gpus: int = 1) -> tuple[str, ...]:
        key = f"{step}-{teacher}"
        arguments = [*given, f"--step={step}", f"--teacher={teacher}"]
        jobs.setdefault(key, Job(name=key, arguments=arguments, needs=needs, num_gpus=num_gpus))
        return (key,)

    needs_of: dict[str, tuple[str, ...]] = {}
    for teacher in dict.fromkeys(map(study.teacher_of, left)):
        needs: tuple[str, ...] = ()
        packed = study.packed_of(teacher)
        if packed and not study.is_made(packed) and not study.is_made(teacher):
            needs = add("unpack", packed)
        if study.tuning_of(teacher) and not study.is_made(teacher):
            needs = add("tune", teacher, needs)
        if not (study.bank_of(teacher) / "bank.json").is_file():
            needs = add("distill", teacher, needs, study.plan["teachers"][teacher].get("gpus", 1))
        needs_of[teacher] = needs
    tasks = [
        Job(name=name, arguments=[*given, f"--only={name}"], needs=needs_of[study.teacher_of(name)]) for name in left
    ]
    return [*jobs.values(), *tasks]


def without(arguments: list[str], option: str) -> list[str]:
    """Command-line arguments without an option and its value."""
    kept, skip = [], False
    for text in arguments:
        if not skip and text != option and not text.startswith(f"{option}="):
            kept.append(text)
        skip = text == option
    return kept


def run_task(study: Study, name: str) -> dict[str, Any]:
    """Make the teacher and its bank where that is still to be done, then search; returns the run's record."""
    folder, teacher = study.out / name, study.teacher_of(name)
    if (folder / "report.json").is_file():
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if teacher in study.failed:
        raise RuntimeError(f"its teacher {teacher} failed before: {study.failed[teacher]}")
    try:
        for step in STEPS.values():
            step(study, teacher)
    except Exception as error:
        study.failed[teacher] = str(error)
        raise
    recipe = read_recipe(write_recipe(study, name, teacher), study.settings)
    return run(recipe, folder, bank=study.bank_of(teacher), resume=is_begun(folder), on_event=show)


def unpack(study: Study, teacher: str) -> None:
    """Keep packed weights (GGUF) as plain ones, in float32: they are read many times, and unpacking takes longest."""
    packed = study.packed_of(teacher)
    if packed is None or study.is_made(packed):
        return
    say(f"{packed}: unpacking")
    model, tokenizer = load_model(study.start_of(packed), device="cpu", dtype="float32")
    model.save_pretrained(study.folder_of(packed))
    tokenizer.save_pretrained(study.folder_of(packed))


def tune(study: Study, teacher: str) -> None:
    """Fine-tune on the task's train split, where the list says so and it is not done yet."""
    options = study.tuning_of(teacher)
    if options is None or study.is_made(teacher):
        return
    say(f"{teacher}: fine-tuning")
    source = f"teacher.source={json.dumps(study.start_of(teacher))}"
    recipe = read_recipe(write_recipe(study, study.task_of(teacher), teacher), [*study.settings, source])
    done = finetune(
        recipe,
        study.folder_of(teacher),
        epochs=options["epochs"],
        learning_rate=options["rate"],
        batch_size=options["batch"],
    )
    say(f"{teacher}: {json.dumps(done)}")
    release_memory()


def distill(study: Study, teacher: str) -> None:
    """Distil the teacher's bank unless it is there; with the other processes that torchrun started, if any."""
    if (study.bank_of(teacher) / "bank.json").is_file():
        return
    say(f"{teacher}: distilling")
    folder = study.out / "banks" / teacher
    recipe = read_recipe(write_recipe(study, None, teacher), study.settings)
    bank = distill_only(recipe, folder, resume=is_begun(folder), on_event=show)
    say(f"{teacher}: mean NMSE {bank.mean_nmse:.4f} in {bank.seconds:.0f} s")
    del bank
    release_memory()


STEPS = {"unpack": unpack, "tune": tune, "distill": distill}
"""What makes a teacher and its bank, in order."""


def is_begun(folder: Path) -> bool:
    """Whether a run has left work to go on with; its recipe and log alone are replaced by the next try."""
    return folder.is_dir() and any(path.name not in (RECIPE, EVENTS) for path in folder.iterdir())


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def show(event: dict[str, Any]) -> None:
    """The stages of a run, on the error stream; everything else is in its events.jsonl."""
    if event["event"] == "stage":
        say(f"  {event['text']}")


def release_memory() -> None:
    """Nothing of one task or teacher is left for the next: models, compiled functions, peaks of memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def result_of(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """One entry of the table, for M_opt; `seconds` is distillation, search and scoring, fine-tuning left out."""
    test = record["m_opt"]["test"]
    interval = mean_confidence_interval(Score(**test))
    in_run = record["seconds"].get("distill", 0.0)
    return {
        "name": name,
        "num_layers": record["num_layers"],
        "num_replaced": record["m_opt"]["num_replaced"],
        "teacher_test": record["teacher"]["test"]["value"],
        "test": test["value"],
        "test_ci95": [round(end, 6) for end in interval],
        "test_drop": record["m_opt"]["relative_test_drop"],
        "mixer": record["mixer"]["kind"],
        "pass_equivalents": record["search"]["pass_equivalents"],
        # The bank was loaded, not made, in the run itself; its own time stands in its record.
        "seconds": round(record["seconds"]["total"] - in_run + record["distill"]["seconds"], 1),
        "command": record["command"],
        "hardware": record["hardware"],
        "commit": record["commit"],
    }


def keep_record(study: Study, name: str, record: dict[str, Any]) -> None:
    """Keep the record beside the table and put its entry into the table."""
    (study.results / "study").mkdir(parents=True, exist_ok=True)
    write_json(study.results / "study" / f"{name}.json", record)
    write_table(study)


def write_table(study: Study) -> None:
    """The entries of all tasks that have a record, in the order of the list."""
    paths = {name: study.results / "study" / f"{name}.json" for name in study.plan["tasks"]}
    found = {name: path for name, path in paths.items() if path.is_file()}
    rows = [result_of(name, json.loads(path.read_text(encoding="utf-8"))) for name, path in found.items()]
    if rows:
        write_json(study.results / "study.json", rows)


if __name__ == "__main__":
    main()
