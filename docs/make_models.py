"""Write docs/models.md from benchmarks/results/families.json: which causal model types work, and why others do not.

python docs/make_models.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "families.json"
TARGET = ROOT / "docs" / "models.md"
TITLES = {
    "works": "Works",
    "refused": "Refused by dtr",
    "wrong": "A check failed, or did not end in time",
    "not built": "Not built here",
}
COUNTED = {"works": "work", "refused": "are refused by dtr", "wrong": "failed", "not built": "were not built here"}


def page() -> str:
    """The page's text."""
    facts = json.loads(SOURCE.read_text(encoding="utf-8"))
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in TITLES}
    for record in facts["models"]:
        groups["not built" if record.get("reason") == "not built" else record["status"]].append(record)
    counts = ", ".join(f"{len(group)} {COUNTED[name]}" for name, group in groups.items())
    parts = [
        "# Model types",
        "Llama, Mistral, Qwen2 and Qwen3 (and SmolLM2, Qwen2.5) have whole mixers and fused kernels. Any other "
        "causal language model whose attention asks transformers' attention interface takes part by its own attention "
        "modules, in which a linear core takes the place of softmax: `gated_deltanet`, `gated_linear_attention`, "
        "`kimi_delta_attention` or `retention`. Layers with windows, states or convolutions stay as they are. What has "
        "no place there yet: classifiers, encoders and encoder-decoders, packed sequences, static caches, the fused "
        "decoder, `refit_tokens`, export, vLLM, teachers spread over ranks, and compiled training steps.",
        f"Below is a small random model of every causal type of transformers {facts['transformers']}, as "
        "`python benchmarks/families.py` tries it: self-check at load, distillation (errors fall), a hybrid of no "
        "linear layers bit for bit, layers run one by one, cache, padding on the left, beams, and reload in a fresh "
        f"process without dtr. Of {len(facts['models'])} types, {counts}. A type that was not built is no statement "
        f"about dtr: its config needs sizes that the program does not know, or a package. {_made(facts['models'])}",
    ]
    text = "\n\n".join(part if part.startswith("#") else textwrap.fill(part, 120) for part in parts)
    for name, group in groups.items():
        if group:
            rows = [f"| `{r['model_type']}` | {_layers(r)} | {_cell(r['message'])} |" for r in group]
            text += f"\n\n## {TITLES[name]}\n\n| type | layers that can be replaced | reason |\n| --- | --- | --- |\n"
            text += "\n".join(rows)
    return text + "\n"


def _made(records: list[dict[str, Any]]) -> str:
    commits = {record.get("commit") for record in records}
    if len(commits) == 1 and None not in commits:
        return f"All at commit {commits.pop()}."
    return "Made in several runs: types were tried again after changes, the others stayed as they were."


def _layers(record: dict[str, Any]) -> str:
    return f"{len(record['replaceable'])} of {record['layers']}" if "replaceable" in record else ""


def _cell(message: str) -> str:
    short = message.partition(" docs/models.md")[0].removeprefix("teacher.source: ")
    return " ".join(short.replace("|", "/").replace("<", "(").replace(">", ")").split())[:220]


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(TARGET)
