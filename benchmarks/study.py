"""Run `dtr` over a list of tasks and write the table of results.

    python benchmarks/study.py benchmarks/study.yaml --out runs/study

The list names a base recipe, teachers and tasks. Each teacher is distilled once and its bank serves all its tasks;
teachers with `finetune` are trained first (`benchmarks/finetune_teacher.py`). What is finished is not done again, so
the command may be cut off and repeated, with `--only` for some of the tasks. Results go to
`benchmarks/results/study.json` (the table) and `benchmarks/results/study/NAME.json` (the whole record of each run);
`docs/make_study.py` makes the page.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from dtr.evaluation.paired import mean_confidence_interval
from dtr.evaluation.score import Score

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for teachers, banks and runs")
    parser.add_argument("--data", default="data", help="folder that stands for data/ in the list")
    parser.add_argument("--only", action="append", default=[], help="a task of the list; repeatable")
    parser.add_argument("--set", action="append", default=[], help="section.key=value for every run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    study = at_home(yaml.safe_load(args.study.read_text(encoding="utf-8")), args.data)
    if unknown := set(args.only) - set(study["tasks"]):
        parser.error(f"--only {' '.join(sorted(unknown))}: the list has {', '.join(study['tasks'])}")
    for name in args.only or study["tasks"]:
        record = run_task(study, name, args.out, args.set)
        write_results(record, name, study, args.results)
        print(json.dumps(result_of(name, record)), flush=True)


def at_home(value: Any, data: str) -> Any:
    """The list with `data/` at the beginning of any text replaced by the folder where the data is."""
    if isinstance(value, dict):
        return {key: at_home(inner, data) for key, inner in value.items()}
    return f"{data.rstrip('/')}/{value[5:]}" if isinstance(value, str) and value.startswith("data/") else value


def run_task(study: dict[str, Any], name: str, out: Path, settings: list[str]) -> dict[str, Any]:
    """Fine-tune and distil where that is still to be done, then search; returns the run's record."""
    entry = study["tasks"][name]
    teacher_name = entry.get("teacher", next(iter(study["teachers"])))
    folder = out / name
    if (folder / "report.json").is_file():
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    teacher = study["teachers"][teacher_name]
    flags = [part for setting in settings for part in ("--set", setting)]
    recipe = write_recipe(study, name, teacher_name, out)
    trained = out / "teachers" / teacher_name
    # The tokenizer is saved last.
    if "finetune" in teacher and not (trained / "tokenizer_config.json").is_file():
        options = [f"--{key}={value}" for key, value in teacher["finetune"].items()]
        source = ["--set", f"teacher.source={json.dumps(teacher['source'])}"]
        program = str(ROOT / "benchmarks" / "finetune_teacher.py")
        call([program, str(recipe), "--out", str(trained), *options, *flags, *source])
    bank = out / "banks" / teacher_name
    if not (bank / "bank" / "bank.json").is_file():
        plan = write_recipe(study, None, teacher_name, out)
        call(["-m", "dtr", "distill", str(plan), "--out", str(bank), *resume(bank), *flags])
    where = ["--bank", str(bank / "bank"), "--out", str(folder), *resume(folder)]
    call(["-m", "dtr", "search", str(recipe), *where, *flags])
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def write_recipe(study: dict[str, Any], name: str | None, teacher_name: str, out: Path) -> Path:
    """The base recipe with the sections of study, teacher and task over it; without a task that of the teacher's bank,
    which must be the same whichever task comes first."""
    base = yaml.safe_load((ROOT / study["recipe"]).read_text(encoding="utf-8"))
    teacher = study["teachers"][teacher_name]
    task = study["tasks"][name] if name else {}
    source = str(out / "teachers" / teacher_name) if "finetune" in teacher else teacher["source"]
    recipe: dict[str, Any] = {"teacher": {**base.get("teacher", {}), "source": source}}
    for section in ("text", "mixer", "distill", *(("search",) if name else ()), "runtime"):
        layers = [layer.get(section) or {} for layer in (base, study, teacher, task)]
        if merged := {key: value for layer in layers for key, value in layer.items()}:
            recipe[section] = merged
    if name:
        recipe["task"] = task["task"]
    path = out / "recipes" / f"{name or 'bank-' + teacher_name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def resume(folder: Path) -> list[str]:
    return ["--resume"] if folder.is_dir() and any(folder.iterdir()) else []


def call(arguments: list[str]) -> None:
    """Run a Python program; what it says goes to our own error stream."""
    print(f"$ {shlex.join(['python', *arguments])}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *arguments], stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)


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


def write_results(record: dict[str, Any], name: str, study: dict[str, Any], results: Path) -> None:
    """Keep the record and put its entry into the table, in the order of the list."""
    (results / "study").mkdir(parents=True, exist_ok=True)
    (results / "study" / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    rows = []
    for known in study["tasks"]:
        path = results / "study" / f"{known}.json"
        if path.is_file():
            rows.append(result_of(known, json.loads(path.read_text(encoding="utf-8"))))
    (results / "study.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
