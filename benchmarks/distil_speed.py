"""Gather records of `dtr bench distill` into benchmarks/results/distil_speed.json.

    dtr bench distill smollm2-demo --sizes 32x512,8x2048 | python benchmarks/distil_speed.py
    python -m torch.distributed.run --nproc-per-node 2 -m dtr bench distill smollm2-demo --sizes 32x512 \
        | python benchmarks/distil_speed.py
    dtr bench distill smollm2-demo --device cpu --sizes 16x256 --steps 3 --baseline | python benchmarks/distil_speed.py

Each record fills in its part (one GPU, two GPUs, CPU) and leaves the others as they are; `command`, `hardware` and
`commit` say by part where its figures come from. The whole record is kept beside, as distil_speed_PART.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dtr.files import write_json

RESULTS = Path(__file__).parent / "results"
BY_LENGTH = ("ratio_to_teacher_forward", "distill_tokens_per_second", "teacher_forward_tokens_per_second")
PARTS = {
    "one_gpu": (*BY_LENGTH, "cold_start_seconds", "peak_bytes"),
    "two_gpus": ("two_gpu_speedup",),
    "cpu": ("cpu_tokens_per_second",),
}
SOURCES = ("command", "hardware", "commit")


def last_record(text: str) -> dict[str, Any]:
    """What a command of `dtr bench` printed last."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"no record of 'dtr bench' among {len(text.splitlines())} lines; nothing was written")
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def part_of(record: dict[str, Any]) -> str:
    """Which part a record fills in."""
    if record["hardware"]["device"] == "cpu":
        part, num_processes = "cpu", 1
    elif record["num_processes"] == 1:
        return "one_gpu"
    else:
        part, num_processes = "two_gpus", 2
    if record["num_processes"] != num_processes:
        raise SystemExit(f"a record of {record['num_processes']} processes; {part} takes one of {num_processes}")
    return part


def figures(record: dict[str, Any], part: str) -> dict[str, Any]:
    """The figures of one part. Where there is one for all sizes, the worst counts, and on a CPU the best step size."""
    sizes = record["sizes"]
    if part == "two_gpus":
        return {"two_gpu_speedup": min(size["together"]["speedup"] for size in sizes)}
    if part == "cpu":
        return {"cpu_tokens_per_second": max(size["distill_tokens_per_second"] for size in sizes)}
    by_length = {key: {str(size["seq_len_tokens"]): size[key] for size in sizes} for key in BY_LENGTH}
    return by_length | {
        "cold_start_seconds": max(size["cold_start_seconds"] + size["backend_check_seconds"] for size in sizes),
        "peak_bytes": max(size["peak_bytes_beyond_model_students_and_optimizer"] for size in sizes),
    }


def merge(known: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What is known with this record's part in place of an earlier one; figures not measured yet are None."""
    part = part_of(record)
    keys = [key for group in PARTS.values() for key in group]
    merged: dict[str, Any] = {key: known.get(key) for key in keys} | {key: known.get(key, {}) for key in SOURCES}
    merged |= figures(record, part)
    for key in SOURCES:
        merged[key] = {**merged[key], part: record[key]}
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", help="file whose last line is the record; stdin when left out")
    parser.add_argument("--out", type=Path, default=RESULTS / "distil_speed.json")
    options = parser.parse_args()
    record = last_record(Path(options.record).read_text(encoding="utf-8") if options.record else sys.stdin.read())
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    merged = merge(known, record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_name(f"{options.out.stem}_{part_of(record)}.json"), record)
    write_json(options.out, merged)
    print(json.dumps(merged))


if __name__ == "__main__":
    main()
