"""Run `dtr` over a list of tasks and write the table of results.

    python benchmarks/study.py benchmarks/study.yaml --data data --out runs/study

The list names a base recipe, teachers and tasks. Each teacher is distilled once and its bank serves all its tasks;
teachers with `finetune` are trained first (`benchmarks/finetune_teacher.py`). `--bank TEACHER=DIR` takes a bank that is
there already, `--model TEACHER=SOURCE` another place for a teacher's weights. A task that fails is told and left out,
the others go on. What is finished is not done again, so the command may be cut off and repeated, with `--only` for
some of the tasks; with `--jobs` several teachers are worked on at once, each in a process of its own.

Results go to `benchmarks/results/study.json` (the table) and `benchmarks/results/study/NAME.json` (the whole record of
each run) after every task; `docs/make_study.py` makes the page.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from finetune_teacher import finetune

from dtr.errors import DtrError
from dtr.evaluation.paired import mean_confidence_interval
from dtr.evaluation.score import Score
from dtr.files import write_json
from dtr.pipeline import distill_only, run
from dtr.recipe import read_recipe
from dtr.runfolder import EVENTS, RECIPE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(kw_only=True)
class Study:
    """The list, where everything lies, and which teachers could not be made."""

    plan: dict[str, Any]
    out: Path
    results: Path
    settings: list[str]
    """section.key=value for every run."""
    banks: dict[str, Path]
    """Folders of banks that were made before, by teacher."""
    failed: dict[str, str] = field(default_factory=dict)
    """Teachers that failed, and why: their other tasks need not try again."""

    def teacher_of(self, name: str) -> str:
        return self.plan["tasks"][name].get("teacher", next(iter(self.plan["teachers"])))

    def source_of(self, teacher: str) -> str:
        """Where the weights come from; a fine-tuned teacher starts from those of its `base`."""
        entry = self.plan["teachers"][teacher]
        return entry["source"] if "source" in entry else self.source_of(entry["base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for teachers, banks and runs")
    parser.add_argument("--data", default="data", help="folder that stands for data/ in the list")
    parser.add_argument("--only", action="append", default=[], help="a task of the list; repeatable")
    parser.add_argument("--model", action="append", default=[], help="TEACHER=SOURCE, its weights; repeatable")
    parser.add_argument("--bank", action="append", default=[], help="TEACHER=DIR, its bank; repeatable")
    parser.add_argument("--set", action="append", default=[], help="section.key=value for every run")
    parser.add_argument("--jobs", type=int, default=1, help="teachers that are worked on at once")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    plan = at_home(yaml.safe_load(args.study.read_text(encoding="utf-8")), args.data)
    sources, banks = (named(parser, plan, texts) for texts in (args.model, args.bank))
    for teacher, source in sources.items():
        plan["teachers"][teacher]["source"] = source
    if unknown := set(args.only) - set(plan["tasks"]):
        parser.error(f"--only {' '.join(sorted(unknown))}: the list has {', '.join(plan['tasks'])}")
    study = Study(
        plan=plan,
        out=args.out,
        results=args.results,
        settings=args.set,
        banks={teacher: Path(folder) for teacher, folder in banks.items()},
    )
    names = args.only or list(plan["tasks"])
    num_failed = run_apart(study, names, args.jobs) if args.jobs > 1 else run_here(study, names)
    write_table(study)
    raise SystemExit(f"{num_failed} of {len(names)} tasks failed" if num_failed else 0)


def at_home(value: Any, data: str) -> Any:
    """The list with `data/` at the beginning of any text replaced by the folder where the data is."""
    if isinstance(value, dict):
        return {key: at_home(inner, data) for key, inner in value.items()}
    return f"{data.rstrip('/')}/{value[5:]}" if isinstance(value, str) and value.startswith("data/") else value


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


def run_apart(study: Study, names: list[str], jobs: int) -> int:
    """Run each teacher's tasks in a process of their own, `jobs` at once; returns how many tasks failed."""
    by_teacher: dict[str, list[str]] = {}
    for name in names:
        by_teacher.setdefault(study.teacher_of(name), []).append(name)
    (study.out / "logs").mkdir(parents=True, exist_ok=True)
    given = without(without(sys.argv[1:], "--only"), "--jobs")

    def work(teacher: str) -> None:
        command = [sys.executable, __file__, *given, *(f"--only={name}" for name in by_teacher[teacher])]
        path = study.out / "logs" / f"{teacher}.log"
        say(f"{teacher}: {path}")
        with path.open("w", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=log)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, by_teacher))
    missing = [name for name in names if not (study.out / name / "report.json").is_file()]
    for name in missing:
        say(f"{name} FAILED: see {study.out / 'logs' / study.teacher_of(name)}.log")
    return len(missing)


def without(arguments: list[str], option: str) -> list[str]:
    """Command-line arguments without an option and its value."""
    kept, skip = [], False
    for text in arguments:
        if not skip and text != option and not text.startswith(f"{option}="):
            kept.append(text)
        skip = text == option
    return kept


def run_task(study: Study, name: str) -> dict[str, Any]:
    """Fine-tune and distil where that is still to be done, then search; returns the run's record."""
    folder, teacher = study.out / name, study.teacher_of(name)
    if (folder / "report.json").is_file():
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if teacher in study.failed:
        raise RuntimeError(f"its teacher {teacher} failed before: {study.failed[teacher]}")
    try:
        make_teacher(study, name, teacher)
        bank = make_bank(study, teacher)
    except Exception as error:
        study.failed[teacher] = str(error)
        raise
    recipe = read_recipe(write_recipe(study, name, teacher), study.settings)
    return run(recipe, folder, bank=bank, resume=is_begun(folder), on_event=show)


def make_teacher(study: Study, name: str, teacher: str) -> None:
    """Fine-tune on the task's train split, where the list says so and it is not done yet."""
    folder, options = study.out / "teachers" / teacher, study.plan["teachers"][teacher].get("finetune")
    # The tokenizer is saved last.
    if options is None or (folder / "tokenizer_config.json").is_file():
        return
    say(f"{teacher}: fine-tuning")
    source = f"teacher.source={json.dumps(study.source_of(teacher))}"
    recipe = read_recipe(write_recipe(study, name, teacher), [*study.settings, source])
    done = finetune(
        recipe, folder, epochs=options["epochs"], learning_rate=options["rate"], batch_size=options["batch"]
    )
    say(f"{teacher}: {json.dumps({key: done[key] for key in ('num_examples', 'seconds')})}")
    release_memory()


def make_bank(study: Study, teacher: str) -> Path:
    """The teacher's bank: the one given, or else distilled unless that is done."""
    if teacher in study.banks:
        given = study.banks[teacher]
        return given if (given / "bank.json").is_file() else given / "bank"
    folder = study.out / "banks" / teacher
    if not (folder / "bank" / "bank.json").is_file():
        say(f"{teacher}: distilling")
        recipe = read_recipe(write_recipe(study, None, teacher), study.settings)
        bank = distill_only(recipe, folder, resume=is_begun(folder), on_event=show)
        say(f"{teacher}: mean NMSE {bank.mean_nmse:.4f} in {bank.seconds:.0f} s")
        del bank
        release_memory()
    return folder / "bank"


def write_recipe(study: Study, name: str | None, teacher: str) -> Path:
    """The base recipe with the sections of study, teacher and task over it; without a task that of the teacher's bank,
    which must be the same whichever task comes first."""
    plan = study.plan
    base = yaml.safe_load((ROOT / plan["recipe"]).read_text(encoding="utf-8"))
    entry, task = plan["teachers"][teacher], plan["tasks"][name] if name else {}
    source = str(study.out / "teachers" / teacher) if "finetune" in entry else study.source_of(teacher)
    recipe: dict[str, Any] = {"teacher": {**base.get("teacher", {}), "source": source}}
    for section in ("text", "mixer", "distill", *(("search",) if name else ()), "runtime"):
        layers = [layer.get(section) or {} for layer in (base, plan, entry, task)]
        if merged := {key: value for layer in layers for key, value in layer.items()}:
            recipe[section] = merged
    if name:
        recipe["task"] = task["task"]
    path = study.out / "recipes" / f"{name or 'bank-' + teacher}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def is_begun(folder: Path) -> bool:
    """Whether a run has left work to go on with; its recipe and log alone are replaced by the next try."""
    return folder.is_dir() and any(path.name not in (RECIPE, EVENTS) for path in folder.iterdir())


def say(text: str) -> None:
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
