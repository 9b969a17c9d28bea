"""Write docs/long_context.md from benchmarks/results/long_context.json: what hybrids find in long texts.

python docs/make_long_context.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "long_context.json"
TARGET = ROOT / "docs" / "long_context.md"
RECIPES = {"short": "blocks of 512 tokens", "segments": "segments of 512, targets of 4,096"}
ORDERS = {"reach": "by attention to the answer", "even": "evenly spread"}


def page() -> str:
    """The page's text."""
    record = json.loads(SOURCE.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = record["rows"]
    errors = [row for row in rows if row["kind"] == "errors"]
    needles = [row for row in rows if row["kind"] == "needle"]
    lengths = sorted({row["length"] for row in needles})
    found = {(row["model"], row.get("order"), row.get("share"), row["length"]): row["score"] for row in needles}
    models = list(dict.fromkeys(key[:3] for key in found if key[0] != "teacher"))
    buckets = list(errors[0]["nmse_by_position"])
    parts = [
        "# Long texts",
        f"{record['model']}, mixers of two states with quadratic features, {record['distil_tokens']:,} tokens of "
        f"distillation. Far fewer than the recipe's; these are first figures, and no hybrid here holds at "
        f"{lengths[-1]:,} tokens.",
        "## Error by position",
        "Normalised error of a layer on text that the teacher reads whole, mean over all layers. With "
        "`distill.segment_tokens` the teacher reads 4,096 tokens while mixers learn on segments of 512, half of the "
        "steps on short texts: the error no longer grows with the position, and is larger near the beginning.",
        _table(
            ["trained on", *buckets],
            [[RECIPES[e["bank"]], *(f"{e['nmse_by_position'][b]:.3f}" for b in buckets)] for e in errors],
        ),
        "## Needles found",
        f"One of four facts is asked for; share of {record['num_items']} test items answered exactly. Layers that keep "
        "attention are chosen evenly, or those whose heads look most at the answer (`attention_reach`, one pass of the "
        "teacher over ten validation items of the longest length).",
        _table(
            ["model", "layers linear", "kept layers", *(f"{length:,} tokens" for length in lengths)],
            [["teacher", "0%", "", *(f"{found['teacher', None, None, length]:.3f}" for length in lengths)]]
            + [
                [
                    RECIPES[name],
                    f"{share:.0%}",
                    ORDERS[order],
                    *(f"{found[name, order, share, n]:.3f}" for n in lengths),
                ]
                for name, order, share in models
            ],
        ),
        f"Hardware: {record['hardware']['gpu']}. Commit: {record['commit']}. Made by `benchmarks/long_context.py`.",
    ]
    return "\n\n".join(p if p[0] in "#|" else textwrap.fill(p, 120) for p in parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(TARGET)
