"""Do hybrids find at 32K what they find at 4K? What is trained, and which layers keep attention, one thing at a time.

    python benchmarks/long_context.py distil --model MODEL --recipe short --bank banks/short
    python benchmarks/long_context.py distil --model MODEL --recipe segments --bank banks/segments
    python benchmarks/long_context.py measure --model MODEL --banks banks/short banks/segments --out long_context.json

`distil` trains one bank; several run side by side on one GPU. `measure` scores the teacher and hybrids on `needle` with
four facts (right if greedy decoding writes exactly the answer; test items), and takes each layer's error by position on
held-out text. Layers to keep are chosen on validation items: by how much their heads look at the answer, or evenly.
Rows are written as they come; after --limit seconds no new one begins.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dtr
from dtr.bench.closeness import Sequences, layer_errors
from dtr.distillation.bank import MixerBank, load_bank
from dtr.environment import command_line, hardware, own_commit
from dtr.errors import DtrError
from dtr.evaluation.attention_reach import attention_reach
from dtr.evaluation.evaluator import Evaluator
from dtr.files import write_json
from dtr.teacher import Teacher

RECIPES: dict[str, dict[str, Any]] = {
    "short": {"seq_len_tokens": 512, "batch_size": 8},
    "segments": {"seq_len_tokens": 4096, "batch_size": 1, "segment_tokens": 512},
    "long_segments": {"seq_len_tokens": 4096, "batch_size": 1, "segment_tokens": 2048},
}
"""All of 4,096 tokens a step."""
MIXER = {"mixer": "gated_deltanet", "options": {"head_copies": 2, "quadratic": True, "exact_first": True}}
POSITIONS = (0, 128, 512, 2048, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("distil", "measure"))
    parser.add_argument("--model", required=True, help="hub name, folder or GGUF file")
    parser.add_argument("--text", default="python-docs", help="what is trained and measured on")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="short")
    parser.add_argument("--num-tokens", type=int, default=4_000_000)
    parser.add_argument("--bank", type=Path, help="folder for the bank of distil")
    parser.add_argument("--banks", type=Path, nargs="+", help="folders of banks to measure")
    parser.add_argument("--lengths", default="1024,4096,8192,16384,30720", help="tokens of an item, by commas")
    parser.add_argument("--shares", default="0.5,0.75", help="shares of the layers that are linear, by commas")
    parser.add_argument("--items", type=int, default=40, help="test items of each length")
    parser.add_argument("--orders", default="reach,even", help="how kept layers are chosen, by commas")
    parser.add_argument("--text-tokens", type=int, default=32_768, help="length of the text on which errors are taken")
    parser.add_argument("--out", type=Path, help="JSON of all rows of measure")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for measure")
    args = parser.parse_args()
    try:
        distil(args) if args.stage == "distil" else measure(args)
    except DtrError as error:
        sys.exit(f"long_context: {error}")


def distil(args: argparse.Namespace) -> None:
    teacher = dtr.load_teacher(args.model)

    def tell(event: dict[str, Any]) -> None:
        if event["event"] != "distill":
            print(json.dumps(event)[:300], flush=True)

    how = RECIPES[args.recipe] | {"num_tokens": args.num_tokens, "on_event": tell}
    bank = dtr.distill(teacher, args.text, **MIXER, **how)
    bank.save(args.bank)
    facts = {"recipe": args.recipe, "mean_nmse": bank.mean_nmse, "seconds": bank.seconds, "stopped": bank.stopped}
    print(json.dumps(facts))


def measure(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.limit
    teacher = dtr.load_teacher(args.model)
    record: dict[str, Any] = {
        "command": command_line(), "hardware": hardware(teacher.device), "commit": own_commit(),
        "model": teacher.source, "task": "needle, 4 facts", "num_items": args.items, "rows": [],
    }  # fmt: skip

    def add(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        print(json.dumps(row)[:400], flush=True)
        if args.out is not None:
            write_json(args.out, record)

    banks = {path.name: load_bank(path, teacher=teacher) for path in args.banks}
    lengths = [int(x) for x in args.lengths.split(",")]
    began = time.monotonic()
    reach = attention_reach(teacher, needle(lengths[-1], 10).splits["validation"])
    add({"kind": "reach", "length": lengths[-1], "seconds": time.monotonic() - began} | reach.to_dict())
    text = dtr.load_text(
        args.text, tokenizer=teacher.tokenizer, seq_len_tokens=args.text_tokens, max_tokens=args.text_tokens,
        num_held_out_tokens=2 * args.text_tokens,
    )  # fmt: skip
    for name, bank in banks.items():
        facts = {"kind": "errors", "bank": name, "distil_seconds": bank.seconds, "mean_nmse": bank.mean_nmse}
        add(facts | errors_by_position(teacher, bank, text.held_out))
    for length in lengths:
        for row in scores(args, teacher, banks, reach.layers(), length, deadline):
            add(row)


def needle(length: int, num_items: int) -> Any:
    options = {"lengths_tokens": [length], "num_facts": 4}
    return dtr.load_task("needle", options=options, num_validation=num_items, num_test=num_items)


def scores(
    args: argparse.Namespace,
    teacher: Teacher,
    banks: dict[str, MixerBank],
    by_reach: list[int],
    length: int,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """Rows of one length: the teacher, then for each share and order the hybrid of each bank."""
    num_layers, task = teacher.num_layers, needle(length, args.items)
    asked: dict[str, Any] = {"kind": "needle", "length": length}
    orders = {"reach": by_reach, "even": evenly(num_layers)}
    seen_teacher = False
    for name, bank in banks.items():
        evaluator = Evaluator(
            teacher.model, teacher.tokenizer, task, "test", mixers=bank.in_dtype(teacher.dtype),
            specs={number: bank.spec(number) for number in bank.mixers}, batch_tokens=max(16_384, 2 * length),
        )  # fmt: skip
        if not seen_teacher:
            yield asked | {"model": "teacher", "score": evaluator(frozenset()).value}
            seen_teacher = True
        for share in map(float, args.shares.split(",")):
            for order in args.orders.split(","):
                if time.monotonic() > deadline:
                    return
                kept = set(orders[order][: num_layers - round(share * num_layers)])
                linear = frozenset(number for number in bank.mixers if bank.layer_of[number] not in kept)
                began = time.monotonic()
                score = evaluator(linear)
                row = {"model": name, "order": order, "share": share, "kept": sorted(kept), "score": score.value}
                yield asked | row | {"seconds": round(time.monotonic() - began, 2)}


def evenly(num_layers: int) -> list[int]:
    """Layers in an order of which every beginning is spread over the depth (van der Corput's sequence)."""

    def place(number: int) -> float:
        value, unit = 0.0, 0.5
        while number:
            value, number, unit = value + unit * (number % 2), number // 2, unit / 2
        return value

    places = [int(place(number) * num_layers) for number in range(1, 8 * num_layers)]
    return list(dict.fromkeys([*places, *range(num_layers)]))


def errors_by_position(teacher: Teacher, bank: MixerBank, blocks: torch.Tensor) -> dict[str, Any]:
    """Each layer's normalised error by position, over blocks (N, T) that teacher and mixers read whole."""
    text, mixers = Sequences.of(blocks.tolist()), bank.in_dtype(teacher.dtype)
    found = layer_errors(teacher, mixers, text, batch_size=1, positions=POSITIONS)
    by_layer = {bank.layer_of[number]: one.nmse_by_position for number, one in found.items()}
    names = next(iter(by_layer.values()))
    mean = {name: sum(one[name] for one in by_layer.values()) / len(by_layer) for name in names}
    return {"nmse_by_position": mean, "nmse_by_layer": by_layer}


if __name__ == "__main__":
    main()
