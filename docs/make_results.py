"""Write the measured figures of README.md, docs/serving.md and docs/scale.md from the records in benchmarks/results.

    python docs/make_results.py

Each block of a page lies between two marks. Figures reach these pages no other way: `tests/test_docs.py` compares the
blocks, and finds figures that stand outside of them.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dtr.mixers import options_of_new
from dtr.reporting.verdict import verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "serving.md", ROOT / "docs" / "scale.md")
MADE_BY = "made by docs/make_results.py"
TASKS = {"arc_easy": ("ARC-easy", 4), "piqa": ("PIQA", 2), "hellaswag": ("HellaSwag", 4)}
"""Names as people know them, and the number of choices that a guess picks from."""


def quality() -> str:
    """Test scores with every layer linear, and how much is kept."""
    record = _read("distil_quality.json")
    rows, above = [], []
    for name, (title, num_choices) in TASKS.items():
        teacher, hybrid = (record["all_linear_scores"][name][whose] for whose in ("teacher", "hybrid"))
        above.append((hybrid - 1 / num_choices) / (teacher - 1 / num_choices))
        rows.append((title, f"{teacher:.3f}", f"{hybrid:.3f}", f"{hybrid / teacher:.1%}", f"{above[-1]:.1%}"))
    rows.append(("mean", "", "", f"{record['all_linear_retention']['mean']:.1%}", f"{sum(above) / len(above):.1%}"))
    recall = record["recall_scores"]
    for share, name in (("0.5", "half"), ("0.75", "three quarters")):
        hybrid, teacher, chance = recall["hybrid"][share], recall["teacher"], recall["chance"]
        kept = (f"{hybrid / teacher:.1%}", f"{(hybrid - chance) / (teacher - chance):.1%}")
        rows.append((f"recall in 1,000 tokens, {name} of the layers linear", f"{teacher:.3f}", f"{hybrid:.3f}", *kept))
    table = _table(("test split", "teacher", "hybrid", "kept", "kept above chance"), rows)
    cost = f"Distilled on {record['num_tokens'] / 1e6:.3g}M tokens in {record['distill_seconds']:.0f} seconds"
    made_on = _made_on(record["hardware"], record["commit"])
    return f"{table}\n\n{cost}, mean normalised error {record['mean_nmse']:.3f}. {made_on}"


def tasks() -> str:
    """What searches on tasks of the study ended with."""
    rows = _read("study.json")
    records = {row["name"]: _read(f"study/{row['name']}.json") for row in rows}
    states = [verdict(record).status for record in records.values()]
    share = sum(row["num_replaced"] / row["num_layers"] for row in rows) / len(rows)
    drop = sum(row["test_drop"] or 0.0 for row in rows) / len(rows)
    held, unsure, broken = (states.count(state) for state in ("held", "within noise", "not held"))
    return _prose(
        f"Search on {len(rows)} tasks replaced a mean of {share:.0%} of the layers at a mean test drop of {drop:.1%}.",
        f"By the paired 95 % interval on test, the promise was held on {held}, within noise on {unsure} and not held",
        f"on {broken}.",
    )


def speed() -> str:
    """Speed and cache over the teacher's, by context, of a hybrid with the default mixer in 27 of 30 layers."""
    default = {"kind": "gated_deltanet", "options": options_of_new("gated_deltanet")}
    (record,) = (entry["serving"] for entry in _read("mixer_costs.json") if entry["mixer"] == default)
    rows = []
    for context, decode in record["decode_speedup"].items():
        prefill = record["prefill_speedup"][context]
        cells = (f"{decode['1']:.2f}", f"{decode['fill']:.2f}", f"{prefill['1']:.2f}", f"{prefill['fill']:.2f}")
        rows.append((f"{int(context):,}", *cells, f"{record['cache_ratio'][context]:.1%}"))
    kinds = [f"{what}, {batch}" for what in ("decode", "prefill") for batch in ("1 sequence", "full GPU")]
    head = ("context, tokens", *kinds, "cache")
    return f"{_table(head, rows)}\n\n{_made_on(record['hardware'], record['commit'])}"


def distillation() -> str:
    """Speed of distillation on a GPU, two of them and a CPU."""
    record = _read("distil_speed.json")
    gpu, cpu = record["hardware"]["one_gpu"], record["hardware"]["cpu"]
    speeds = record["distill_tokens_per_second"]
    rows = [
        (f"{gpu['gpu']}, {tokens} tokens a sequence", f"{speeds[tokens]:,.0f}", f"{ratio:.2f}")
        for tokens, ratio in record["ratio_to_teacher_forward"].items()
    ]
    on_cpu = f"{cpu['num_cores']} CPU cores with AMX, 256 tokens a sequence"
    rows.append((on_cpu, f"{record['cpu_tokens_per_second']:,.0f}", ""))
    head = ("hardware", "tokens a second", "of the teacher's forward pass as transformers runs it")
    told = _prose(
        f"Two GPUs together train {record['two_gpu_speedup']:.2f} times as fast as one. From empty compiler caches to",
        f"the first recorded step {record['cold_start_seconds']:.0f} seconds; beyond teacher, students and optimizer a",
        f"step takes {record['peak_bytes'] / 1e9:.1f} GB. Commits: {_commits(record['commit'].values())}.",
    )
    return f"{_table(head, rows)}\n\n{told}"


def vllm() -> str:
    """Hybrid over teacher in vLLM, by length of the prompt."""
    record = next(run for run in _read("vllm.json")["runs"] if any(row["kind"] == "speed" for row in run["rows"]))
    found = {(row["model"], row["context"]): row for row in record["rows"]}
    keys = ("most_sequences", "decode_tokens_per_second", "prompt_tokens_per_second", "requests_per_second")
    rows = []
    for context in record["rows"][0]["contexts"]:
        hybrid, teacher = found["hybrid", context], found["teacher", context]
        ratios = [f"{hybrid[key] / teacher[key]:.2f}" for key in keys]
        firsts = [f"{1000 * row['time_to_first_token_seconds']:.0f}" for row in (hybrid, teacher)]
        rows.append((f"{context:,}", *ratios, " against ".join(firsts)))
    row = record["rows"][0]
    head = (
        "prompt, tokens",
        "sequences that fit",
        f"decode, at most {row['most_at_once']} sequences",
        "prompts",
        f"requests of {row['new_tokens']} new tokens",
        "first token of one, ms",
    )
    return f"{_table(head, rows)}\n\nHardware: {record['hardware']}. Commit: {record['commit']}. vLLM {record['vllm']}."


BLOCKS: dict[str, Callable[[], str]] = {f.__name__: f for f in (quality, tasks, speed, distillation, vllm)}


def with_blocks(page: str) -> str:
    """A page with each of its blocks made anew."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name}: {MADE_BY} -->", f"<!-- end of {name} -->"
        if start in page:
            before, _, rest = page.partition(start)
            _, mark, after = rest.partition(end)
            assert mark, f"the mark '{end}' is lost"
            page = f"{before}{start}\n{make()}\n{end}{after}"
    return page


def without_blocks(page: str) -> str:
    """A page without its blocks, for tests of what is written by hand."""
    for name in BLOCKS:
        before, start, rest = page.partition(f"<!-- {name}: {MADE_BY} -->")
        page = before + rest.partition(f"<!-- end of {name} -->")[2] if start else page
    return page


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 120)


def _made_on(hardware: dict[str, Any], commit: str) -> str:
    return f"Hardware: {hardware.get('gpu') or hardware['cpu']}. Commit: {_commits([commit])}."


def _commits(commits: Iterable[str]) -> str:
    return ", ".join(sorted({commit[:7] for commit in commits}))


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_blocks(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
