"""Gather what was measured about serving into one file, `benchmarks/results/serving.json`.

    python benchmarks/serving.py --speed speed.json --served granite.json --served qwen.json

`--speed` is the JSON of `dtr bench generate`, several of them where sizes were measured one by one on the same hardware
and commit, `--served` what `benchmarks/export_and_serve.py` writes. Command, hardware and commit at the
top are those of the speeds; parts that were measured elsewhere carry their own. `--plot` draws the speeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OUT = Path(__file__).parent / "results" / "serving.json"
ORIGIN = ("command", "hardware", "commit")
TABLES = ("decode_speedup", "prefill_speedup", "cache_ratio", "fill_batch")
"""Of a speed's JSON, by context."""
LLAMA_CPP = {
    "version": None,
    "works": False,
    "note": "not exported: its Granite graph wants mamba_expand 2 and one or two groups; see docs/export.md",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", type=Path, action="append", required=True, help="output of dtr bench generate")
    parser.add_argument("--served", type=Path, action="append", default=[], help="output of export_and_serve.py")
    parser.add_argument("--plot", type=Path, help="picture of the speeds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    speed = together([read_last_line(file) for file in args.speed])
    result = gather(speed, [read_last_line(file) for file in args.served])
    if args.plot:
        draw(speed, args.plot)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(args.out)


def read_last_line(file: Path) -> dict[str, Any]:
    """A JSON file, or the last line of a program's output."""
    text = file.read_text(encoding="utf-8").strip()
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.splitlines()[-1])


def together(speeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Speeds of several contexts as if one command had measured them."""
    places = {json.dumps([speed["hardware"], speed["commit"]], sort_keys=True) for speed in speeds}
    if len(places) > 1:
        sys.exit(
            f"--speed: got measurements of {len(places)} machines or commits; expected one, as ratios are compared"
        )
    tables = {name: {} for name in TABLES}
    for speed in speeds:
        for name, table in tables.items():
            for context, found in speed[name].items():
                # Batches of one context may come from several commands, too.
                table[context] = table.get(context, {}) | found if isinstance(found, dict) else found
    tables = {name: dict(sorted(table.items(), key=lambda row: int(row[0]))) for name, table in tables.items()}
    return speeds[0] | tables | {"command": "; ".join(dict.fromkeys(speed["command"] for speed in speeds))}


def gather(speed: dict[str, Any], served: list[dict[str, Any]]) -> dict[str, Any]:
    """The result with exactly the keys that it promises."""
    result: dict[str, Any] = {
        key: {context: named_by_size(by_batch, speed["fill_batch"].get(context)) for context, by_batch in table.items()}
        for key, table in ((name, speed[name]) for name in ("decode_speedup", "prefill_speedup"))
    }
    result |= {"cache_ratio": speed["cache_ratio"], "export_parity": {}, "servers": {}}
    for part in served:
        origin = {key: part[key] for key in ORIGIN}
        for target, parity in part["export_parity"].items():
            result["export_parity"][target] = parity | origin
        for name, found in part["servers"].items():
            # A server that fails for one target is not said to work because of another.
            before = result["servers"].get(name, {"works": True})
            if before["works"] or not found["works"]:
                result["servers"][name] = found | {"target": list(part["export_parity"])} | origin
    result["servers"]["llama_cpp"] = LLAMA_CPP
    return result | {key: speed[key] for key in ORIGIN}


def named_by_size(by_batch: dict[str, Any], fill: int | None) -> dict[str, Any]:
    """The batch that fills the GPU under its size too."""
    return by_batch | ({str(fill): by_batch["fill"]} if fill is not None else {})


def draw(record: dict[str, Any], file: Path) -> None:
    """Decode and prefill speed-up and cache size by context length, as a picture in the format of the file's name."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, key, title in zip(axes, ("decode_speedup", "prefill_speedup"), ("decoding", "prefill")):
        batches = dict.fromkeys(batch for by_batch in record[key].values() for batch in by_batch)
        for batch in batches:
            points = [(int(c), by[batch]) for c, by in record[key].items() if by.get(batch)]
            ax.plot(*zip(*points), marker="o", label="fills the GPU" if batch == "fill" else f"batch {batch}")
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.set(title=f"{title}: times the teacher's tokens/s", xlabel="context tokens", ylim=(0, None))
        ax.legend()
    points = [(int(c), 100 * ratio) for c, ratio in record["cache_ratio"].items() if ratio]
    axes[2].plot(*zip(*points), marker="o")
    axes[2].set(title="cache: % of the teacher's bytes", xlabel="context tokens", ylim=(0, None))
    for ax in axes:
        ax.set_xscale("log", base=2)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
