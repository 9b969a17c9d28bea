"""Write docs/measurements.md: what was tried in distillation and search, from the records in benchmarks/results.

    python docs/make_measurements.py

Numbers reach the page no other way; `tests/test_docs.py` compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "measurements.md"
QUALITY = ROOT / "benchmarks" / "results" / "distil_quality.json"
SEARCH = ROOT / "benchmarks" / "results" / "search.json"
COSTS = ROOT / "benchmarks" / "results" / "mixer_costs.json"
HEAD = """# Measurements

Made by `python docs/make_measurements.py` from `distil_quality.json`, `mixer_costs.json` and `search.json` in
`benchmarks/results`, which hold the command, the hardware and the commit of every row, and more numbers. Everything is
of SmolLM2-135M-Instruct, speeds of random weights of its shape. What was tried in vain and has no row is in
`dev/LOG.md`.
"""
ABOUT_DISTILLATION = """Rows are `recipes/arc_easy_gpu.yaml` with these settings changed, seed 0. NMSE is the squared
error over the target's power, mean over 30 layers, on held-out text; in brackets on the same blocks of 512 tokens where
a row was trained on others. KL is KL(teacher, hybrid) on held-out text with all layers linear, in nats a token. Kept is
the mean share of the teacher's score on ARC-easy, PIQA and HellaSwag with all layers linear.
"""
ABOUT_ROWS = """Kept is on validation here. Rows in brackets are told in words; their `note` in the record says whether
they are options.
"""
ABOUT_COSTS = """NMSE is that of 3M tokens. A training step of 8 x 512 tokens is told in steps of the recipe at the same
commit: {steps}. Decoding and prefill are those of a hybrid with 27 such layers of 30
over its teacher's, each at the largest batch for which the teacher's cache fits on an H100; the cache is its share of
the teacher's. An empty cell was not measured.
"""
ABOUT_RECALL = """Recall is the share of the teacher's score at about 1,000 tokens of context, where search chose the
layers.
"""
ABOUT_SEARCH = """P_min is 0.95 of the teacher's validation score. The drop is a share of the teacher's test score, and
its 95 % interval from paired items; the difference to `exact` is in points of the score, paired as well. Passes are
pass equivalents. Other processes shared the GPU, so that seconds are upper bounds, except as the record notes. Tasks
with `_jet` have a bank of JetBlock, those with `_two_ranks` ran under torchrun on two GPUs.
"""
ABOUT_SHARES = """Test scores with the first half, three quarters and nine tenths of each strategy's order linear, and
their 95 % intervals.
"""


def page() -> str:
    quality, costs, search = (json.loads(path.read_text(encoding="utf-8")) for path in (QUALITY, COSTS, SEARCH))
    return "\n".join([HEAD, *distillation(quality), *cost(quality, costs), *searches(search)])


def distillation(record: dict[str, Any]) -> list[str]:
    """Sections on the error of layers and what it means for tasks; `record` as in distil_quality.json."""
    rows = sorted(record["ablation"], key=lambda row: row["mean_nmse"])
    linear, windows = ([row for row in rows if row["is_pure_linear"] is pure] for pure in (True, False))
    teacher = [f"{name} {scores['teacher']:.3f}" for name, scores in record["all_linear_scores"].items()]
    return [
        "## Distillation\n",
        ABOUT_DISTILLATION,
        "### On test\n",
        *_test_table([{**record, "settings": ""}, *linear]),
        f"The teacher has {', '.join(teacher)}.\n{ABOUT_RECALL}",
        "### Pure linear mixers\n",
        ABOUT_ROWS,
        *_choice_table(linear),
        "### With a window\n",
        "Every layer also attends to the last 64 tokens. On test:\n",
        *_test_table(windows),
        "On validation:\n",
        *_choice_table(windows),
    ]


def _test_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    # One old row has no recall that was measured.
    tested = [row for row in rows if "recall_retention" in row and None not in row["recall_retention"].values()]
    head = "settings | tokens | NMSE | ARC-easy | PIQA | HellaSwag | kept | recall, 50 % and 75 % linear | commit"
    return table(head, map(_test_row, tested))


def _choice_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    return table("settings | tokens | NMSE | KL | kept | commit", map(_choice, rows))


def cost(quality: dict[str, Any], entries: list[dict[str, Any]]) -> list[str]:
    """Section on what layers cost; `entries` as in mixer_costs.json, the cheapest in training first."""
    timed = [entry["training"] for entry in entries if "training" in entry]
    assert {step["step"] for step in timed} == {"8 x 512"}
    entries = sorted(entries, key=lambda entry: entry.get("training", {}).get("step_time_over_recipes", 0.0))
    rates = {step["commit"]: step["recipes_tokens_per_second"] for step in timed}
    steps = " and ".join(f"{8 * 512 / rate * 1e3:.1f} ms at {commit}" for commit, rate in rates.items())
    return [
        "### What closeness costs\n",
        ABOUT_COSTS.format(steps=steps),
        *table(
            "mixer | NMSE | training step | commit | decoding at 2K and 32K | prefill at 32K | cache at 2K and 32K",
            (_cost(entry, quality["ablation"]) for entry in entries),
        ),
    ]


def searches(record: dict[str, Any]) -> list[str]:
    """Sections on strategies; `record` as in search.json."""
    tasks = record["tasks"]
    return [
        "## Search\n",
        ABOUT_SEARCH,
        *table(
            "task, strategy | layers | validation | test | drop on test | against exact | passes | seconds",
            (_strategy(task, name, row) for task, name, row in _strategies(tasks) if not row["certificate"]),
        ),
        *_placements(tasks),
        "### Certified\n",
        "`p_min_confidence: 0.95`, strategy `auto`.\n",
        *table(
            "task | validation items | chosen | certified | drop on test | passes | seconds",
            (_certified(tasks[task], task, row) for task, _, row in _strategies(tasks) if row["certificate"]),
        ),
    ]


def table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table and an empty one."""
    lines = [" | ".join(row) for row in rows]
    rule = " | ".join(["---"] * (head.count("|") + 1))
    return [f"| {line} |" for line in (head, rule, *lines)] + [""]


def _strategies(tasks: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(task, name, row) for task, found in tasks.items() for name, row in found["strategies"].items()]


def _settings(row: dict[str, Any]) -> str:
    """Without what all rows say and columns show."""
    shown = [part for part in row["settings"].split() if not part.startswith("distill.num_tokens=")]
    names = " ".join(part.removeprefix("mixer.").removeprefix("options.") for part in shown)
    # What stands in brackets are words.
    return (names if names.startswith("(") else f"`{names}`") if shown else "the recipe"


def _tokens(row: dict[str, Any]) -> str:
    return f"{row['num_tokens'] / 1e6:.3g}M"


def _error(row: dict[str, Any]) -> str:
    text = f" ({row['text_nmse']:.4f})" if "seq_len_tokens" in row["settings"] and "text_nmse" in row else ""
    return f"{row['mean_nmse']:.4f}{text}"


def _test_row(row: dict[str, Any]) -> list[str]:
    tasks = [f"{scores['hybrid']:.3f}" for scores in row["all_linear_scores"].values()]
    recall = " and ".join(f"{share:.1%}" for share in row["recall_retention"].values())
    kept = f"{row['all_linear_retention']['mean']:.1%}"
    return [_settings(row), _tokens(row), f"{row['mean_nmse']:.4f}", *tasks, kept, recall, row["commit"]]


def _choice(row: dict[str, Any]) -> list[str]:
    divergence = row.get("all_linear_kl", {}).get("held_out")
    kept = row.get("validation_all_linear_retention", {}).get("mean")
    return [
        _settings(row),
        _tokens(row),
        _error(row),
        "" if divergence is None else f"{divergence:.3f}",
        "" if kept is None else f"{kept:.3f}",
        row["commit"] or "",
    ]


def _cost(entry: dict[str, Any], choices: list[dict[str, Any]]) -> list[str]:
    mixer, trained, served = entry["mixer"], entry.get("training"), entry.get("serving")
    known = {"kind": mixer["kind"], "options": _told(mixer["options"])}
    errors = [f"{row['mean_nmse']:.4f}" for row in choices if _tells_mixers_apart(row) and _mixer(row) == known]
    assert len(errors) <= 1, mixer
    step = ["", ""] if trained is None else [f"{trained['step_time_over_recipes']:.2f}", trained["commit"]]
    speeds = ["", "", ""]
    if served is not None:
        decoding = " and ".join(f"{served['decode_speedup'][n]['fill']:.2f}" for n in ("2048", "32768"))
        cache = " and ".join(f"{served['cache_ratio'][n]:.0%}" for n in ("2048", "32768"))
        speeds = [decoding, f"{served['prefill_speedup']['32768']['fill']:.2f}", cache]
    return [_named(mixer), *(errors or [""]), *step, *speeds]


def _tells_mixers_apart(row: dict[str, Any]) -> bool:
    """Whether a row of 3M tokens differs from the recipe in its mixer alone, with what new mixers have."""
    parts = row["settings"].split()
    is_mixers = all(part.startswith(("distill.num_tokens=", "mixer.")) for part in parts)
    return row["num_tokens"] == 3_000_000 and is_mixers and "exact_first=" not in row["settings"]


def _mixer(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row's mixer as records of costs have it; None where layers differ."""
    kind, options = row["mixer"]["kind"], row["mixer"].get("options", {})
    return {"kind": kind, "options": _told(options)} if isinstance(kind, str) else None


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """Options beyond one state with an exact first token, whose own options a record may name or leave out."""
    return {
        k: v for k, v in options.items() if v is not False and (k, v) not in (("exact_first", True), ("head_copies", 1))
    }


def _named(mixer: dict[str, Any]) -> str:
    options = " ".join(f"{k}={json.dumps(v)}" for k, v in _told(mixer["options"]).items())
    return f"`{mixer['kind']} {options}`".replace(" `", "`")


def _drop(row: dict[str, Any]) -> str:
    paired, teacher = row["paired"], row["teacher_test"]
    low, high = (-paired[end] / teacher for end in ("ci95_high", "ci95_low"))
    return f"{row['test_drop']:.1%} ({low:.1%} to {high:.1%})"


def _strategy(task: str, name: str, row: dict[str, Any]) -> list[str]:
    against = row["test_minus_exact"]
    difference = ""
    if against is not None and name != "exact":
        difference = f"{against['mean']:+.3f} ({against['ci95_low']:+.3f} to {against['ci95_high']:+.3f})"
    scores = f"{row['val']:.3f}", f"{row['test']:.3f}"
    cost = f"{row['pass_equivalents']:.1f}", f"{row['seconds']:.1f}"
    return [f"{task}, {name}", str(row["num_replaced"]), *scores, _drop(row), difference, *cost]


def _placements(tasks: dict[str, Any]) -> list[str]:
    """Test scores at shares of each order, where a run has measured them."""
    rows = [_shares(task, name, row) for task, name, row in _strategies(tasks) if row["at_share"]]
    head = "task, strategy | 50 % | 75 % | 90 %"
    return ["### Placements at equal numbers of layers\n", ABOUT_SHARES, *table(head, rows)] if rows else []


def _shares(task: str, name: str, row: dict[str, Any]) -> list[str]:
    parts = row["at_share"].values()
    return [
        f"{task}, {name}",
        *(f"{part['test']:.3f} ({part['test_ci95'][0]:.3f} to {part['test_ci95'][1]:.3f})" for part in parts),
    ]


def _certified(found: dict[str, Any], task: str, row: dict[str, Any]) -> list[str]:
    items, verdict = str(found["num_validation"]), row["certificate"]
    numbers = str(verdict.get("num_selected", verdict.get("num_proposed"))), str(verdict["num_certified"])
    return [task, items, *numbers, _drop(row), f"{row['pass_equivalents']:.1f}", f"{row['seconds']:.1f}"]


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(TARGET)
