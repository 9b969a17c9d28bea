"""Write docs/results.md, the page of the study, from benchmarks/results/study.json and the records beside it.

    python docs/make_study.py

Numbers reach the page no other way; `tests/test_study.py` compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dtr.reporting.page import kept_above_chance
from dtr.reporting.verdict import verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STUDY = ROOT / "benchmarks" / "study.yaml"
TARGET = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "images" / "study.png"
COLUMNS = (
    *("task", "teacher", "mixer", "distilled on", "P_min", "metric", "teacher, test", "M_best, test (layers)"),
    *("M_opt, test (95 %)", "layers replaced", "test drop", "kept above chance", "promise on test"),
    *("search, passes", "time"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
INTRO = """# Results

Made by `python docs/make_study.py` from the study's table in benchmarks/results; the record of each run lies beside it.
Layers were chosen on validation; test was scored once, at the end. M_opt has the most linear layers above the limit,
M_best the most that lost nothing. The drop is a share of the teacher's test score (negative: a gain). Intervals are
those of one score, over items. Kept above chance is the share of the teacher's score above that of guessing, where the
metric has such a level. The promise is the verdict of the run's own report: whether the paired 95 % interval clears
P_min on test. Time is distillation, search and scoring; fine-tuning is left out.
"""
PAPER = """## Beside the paper

The paper (arXiv 2601.11667, Llama-3.2-3B, JetBlock, 18 tasks) replaces a mean of 10.5 of 28 layers (37 %) at a mean
test drop of 4.8 %, with 7 of 18 tasks above 5 %. Its tasks, models and data differ from these, so only shares and drops
compare.
"""
PICTURE_LINK = "![Share of the teacher's test score that is lost, by task, with 95 % intervals](images/study.png)"
AIM_SHARE, AIM_DROP = 0.8, 0.05
NONE_YET = "No result is committed yet.\n"


def page() -> str:
    """The whole page."""
    path = RESULTS / "study.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not rows:
        return f"{INTRO}\n{NONE_YET}\n{PAPER}"
    records = {row["name"]: _record(row["name"]) for row in rows}
    plan = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    table = "\n".join([HEAD, *(_line(row, records[row["name"]], _teacher(plan, row["name"])) for row in rows)])
    share = sum(map(_share, rows)) / len(rows)
    drops = [row["test_drop"] for row in rows if row["test_drop"] is not None]
    within = sum(drop <= AIM_DROP for drop in drops)
    summary = (
        f"Mean share of layers replaced: {share:.0%} over {len(rows)} tasks (the aim: {AIM_SHARE:.0%} or more). Mean "
        f"test drop: {sum(drops) / len(drops):.1%}; at most {AIM_DROP:.0%} on {within} of {len(rows)} tasks."
    )
    missing = [f"`{name}`" for name in plan["tasks"] if name not in records]
    if missing:
        summary += f" Not measured: {', '.join(missing)}."
    parts = [
        INTRO,
        PICTURE_LINK,
        table,
        summary,
        _made_on(rows),
        *_notes(plan, records),
        *_missed(rows, records),
        PAPER,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _share(row: dict[str, Any]) -> float:
    return row["num_replaced"] / row["num_layers"]


def _teacher(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The list's entry for a task's teacher, with its name."""
    teacher = plan["tasks"].get(name, {}).get("teacher", next(iter(plan["teachers"])))
    return {"title": teacher, **plan["teachers"][teacher]}


def _notes(plan: dict[str, Any], records: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader must know of a task, from the list and from its record."""
    lines = []
    for name, record in records.items():
        mix = _teacher(plan, name).get("text", {}).get("mix", {})
        notes = [plan["tasks"].get(name, {}).get("note"), *record["task"]["notes"]]
        if "task" in mix:
            notes.append(f"{mix['task']:.0%} of what its mixers were distilled on are rows of the task's train split.")
        lines += [f"- `{name}`: {note}" for note in notes if note]
    return ["## Notes", "\n".join(lines)] if lines else []


def _missed(rows: list[dict[str, Any]], records: dict[str, dict[str, Any]]) -> list[str]:
    """Tasks below the aimed share or beyond the aimed drop, and why their search stopped."""
    lines = []
    for row in rows:
        drop = row["test_drop"] or 0.0
        if _share(row) < AIM_SHARE or drop > AIM_DROP:
            reason = records[row["name"]]["search"]["stop_reason"]
            lines.append(f"- `{row['name']}`: {_share(row):.0%} of the layers, test drop {drop:.1%}. {reason}")
    return ["## Where the aim was missed", "\n".join(lines)] if lines else []


def _record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / "study" / f"{name}.json").read_text(encoding="utf-8"))


def _line(row: dict[str, Any], record: dict[str, Any], teacher: dict[str, Any]) -> str:
    low, high = row["test_ci95"]
    best = record["m_best"]
    cells = (
        row["name"],
        teacher["title"],
        " ".join([record["mixer"]["kind"], *(f"{key}={value}" for key, value in record["mixer"]["options"].items())]),
        f"{record['distill']['num_tokens'] / 1e6:.3g}M",
        f"{record['search']['p_min']:.3g}",
        record["task"]["metric"],
        f"{row['teacher_test']:.3f}",
        f"{best['test']['value']:.3f} ({best['num_replaced']})",
        f"{row['test']:.3f} ({low:.3f} to {high:.3f})",
        f"{row['num_replaced']} of {row['num_layers']} ({_share(row):.0%})",
        "no score to lose" if row["test_drop"] is None else f"{row['test_drop']:.1%}",
        "" if record["task"].get("chance") is None else kept_above_chance(record, "m_opt"),
        verdict(record).status,
        f"{row['pass_equivalents']:.1f}",
        f"{row['seconds'] / 60:.1f} min",
    )
    return f"| {' | '.join(cells)} |"


def _made_on(rows: list[dict[str, Any]]) -> str:
    machines = sorted({row["hardware"].get("gpu") or row["hardware"]["cpu"] for row in rows})
    commits = sorted({str(row["commit"])[:12] for row in rows})
    mixers = sorted({row["mixer"] for row in rows})
    return f"Mixer: {', '.join(mixers)}. Hardware: {', '.join(machines)}. Commit: {', '.join(commits)}."


def draw() -> Path | None:
    """Each task's drop on test, paired and with its 95 % interval, and the layers that are linear for it."""
    path = RESULTS / "study.json"
    if not path.is_file():
        return None
    from matplotlib.figure import Figure

    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["test_drop"] is not None]
    figure = Figure(figsize=(7.2, 0.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#6b7280", linewidth=0.8)
    axes.axvline(100 * AIM_DROP, color="#D55E00", linewidth=1, linestyle=":")
    for at, row in enumerate(reversed(rows)):
        paired = _record(row["name"])["m_opt"]["paired"]
        # Of a score that should be low the difference has the sign of the drop.
        half = 100 * (paired["ci95_high"] - paired["ci95_low"]) / 2 * abs(row["test_drop"] / (paired["mean"] or 1))
        is_within = row["test_drop"] <= AIM_DROP
        axes.errorbar(100 * row["test_drop"], at, xerr=half, fmt="o" if is_within else "X", color="#0072B2", capsize=3)
        axes.annotate(
            f"{row['num_replaced']} of {row['num_layers']}",
            (1.01, at),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axes.set_xlabel("test score lost, % of the teacher's (negative: gained); on the right, layers that are linear")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=200)
    return PICTURE


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(TARGET, draw())
