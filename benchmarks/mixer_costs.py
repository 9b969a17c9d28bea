"""Gather what layers of several kinds cost into benchmarks/results/mixer_costs.json.

    dtr bench distill smollm2-demo --sizes 8x512 --mixer-option head_copies=2 > two.txt
    dtr bench generate smollm2-demo --num-linear 27 --mixer-option head_copies=2 > two_serving.txt
    python benchmarks/mixer_costs.py recipes/arc_easy_gpu.yaml two.txt two_serving.txt

Files end in a record of either command. Training is told in steps of the recipe's own mixer, so a record of that, of
the same size and commit, must be among them. Entries of other mixers stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distil_speed import RESULTS, SOURCES, last_record

from dtr.files import write_json
from dtr.mixers import options_of_new
from dtr.recipe import read_recipe


def mixer_of(record: dict[str, Any]) -> dict[str, Any]:
    """Kind and options of the one mixer that was measured."""
    if "sizes" in record:
        return {"kind": record["mixer"], "options": options_of_new(record["mixer"], record["mixer_options"])}
    (found,) = record["mixers"]
    return {"kind": found["kind"], "options": {name: value for name, value in found.items() if name != "kind"}}


def costs(record: dict[str, Any], recipes: dict[tuple[str, str], float]) -> dict[str, Any]:
    """The figures of one record by the command that it is of; `recipes` has tokens a second by commit and size."""
    if "sizes" not in record:
        figures = {key: record[key] for key in ("decode_speedup", "prefill_speedup", "cache_ratio")}
        return {"serving": figures | {key: record[key] for key in SOURCES}}
    (size,) = record["sizes"]
    rate, key = size["distill_tokens_per_second"], step_of(record)
    if key not in recipes:
        raise SystemExit(f"no record of the recipe's own mixer with a step of {key[1]} at commit {key[0]}")
    figures = {
        "step": key[1],
        "tokens_per_second": rate,
        "recipes_tokens_per_second": recipes[key],
        "step_time_over_recipes": recipes[key] / rate,
    }
    return {"training": figures | {key: record[key] for key in SOURCES}}


def step_of(record: dict[str, Any]) -> tuple[str, str]:
    (size,) = record["sizes"]
    return record["commit"], f"{size['batch']} x {size['seq_len_tokens']}"


def merge(known: list[dict[str, Any]], records: Iterable[dict[str, Any]], recipe: dict[str, Any]) -> list[Any]:
    """Entries {mixer, training, serving}, by mixer."""
    entries = {json.dumps(entry["mixer"], sort_keys=True): entry for entry in known}
    records = list(records)
    recipes = {
        step_of(record): record["sizes"][0]["distill_tokens_per_second"]
        for record in records
        if "sizes" in record and mixer_of(record) == recipe
    }
    for record in records:
        mixer = mixer_of(record)
        entries.setdefault(json.dumps(mixer, sort_keys=True), {"mixer": mixer}).update(costs(record, recipes))
    return list(entries.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="whose mixer the others are compared with")
    parser.add_argument("records", type=Path, nargs="+", help="files whose last line is a record")
    parser.add_argument("--out", type=Path, default=RESULTS / "mixer_costs.json")
    args = parser.parse_args(argv)
    mixer = read_recipe(args.recipe).mixer
    recipe = {"kind": mixer.kind, "options": options_of_new(str(mixer.kind), mixer.options)}
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    records = (last_record(path.read_text(encoding="utf-8")) for path in args.records)
    write_json(args.out, merge(known, records, recipe))


if __name__ == "__main__":
    main()
