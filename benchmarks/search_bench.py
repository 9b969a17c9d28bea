"""Search strategies side by side on several tasks, and the certificate's error rate by simulation.

    python benchmarks/search_bench.py --model MODEL --bank BANK --task arc_easy=DATA/arc_easy --task recall=recall
    python benchmarks/search_bench.py --simulate 500
    python benchmarks/search_bench.py --simulate-stops 240 --simulated-items 500
    python benchmarks/search_bench.py --simulate-strategies 40 --simulated-items 250 --pass-share 0.33
    python benchmarks/search_bench.py --merge arc_easy.json recall.json

All write into one file: a run with tasks replaces those tasks and keeps the simulations, and the other way round. The
file is written after every strategy. With several GPUs either give each task to one of them, with an --out of its own,
and `--merge` the files, or start the program by torchrun. The order in which layers fall is drawn beside the file. The
last line on stdout is the record as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from dtr.environment import command_line, hardware, own_commit

OUT = Path(__file__).parent / "results" / "search.json"
STRATEGIES = "auto,one_shot,lowest_mse,uniform,random,kl,impact,restore,lazy,exact"
"""Those that take long last, for the time limit; each is searched from nothing and paired with `exact` in the end."""


def main() -> None:
    args = read_arguments()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    provenance = {"command": command_line(), "commit": own_commit()}
    if args.simulate:
        from dtr.selection.trials import simulate_certificates

        started = time.monotonic()
        found = simulate_certificates(
            args.simulate, num_items=args.simulated_items, confidence=args.confidence or 0.95, p_min=args.p_min
        )
        found |= {**provenance, "hardware": hardware(), "seconds": round(time.monotonic() - started, 1)}
        record["certificate_simulation"] = found
    if args.simulate_stops:
        from dtr.selection.trials import simulate_stops

        started = time.monotonic()
        found = simulate_stops(args.simulate_stops, num_items=args.simulated_items)
        found |= {**provenance, "hardware": hardware(), "seconds": round(time.monotonic() - started, 1)}
        record["stop_simulation"] = found
    if args.simulate_strategies:
        from dtr.selection.trials import simulate_strategies

        found = simulate_strategies(
            args.simulate_strategies, num_items=args.simulated_items, pass_share=args.pass_share
        )
        record["strategy_simulation"] = found | {**provenance, "hardware": hardware()}
    if args.task:
        record |= provenance
        if not measure(args, record):
            return
    if args.merge:
        merge(record, args.merge)
    if args.task or args.merge:
        draw_orders(record, args.out.with_name(args.out.stem + "_order.png"))
    write(args.out, record)
    print(json.dumps(record))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="teacher: hub name, folder or GGUF file")
    parser.add_argument("--bank", type=Path, help="folder of its mixer bank")
    parser.add_argument("--task", action="append", default=[], help="name=source, repeatable; source as in a recipe")
    parser.add_argument("--strategies", default=STRATEGIES, help="names, by commas; none for `auto_certified` alone")
    parser.add_argument("--p-min", type=float, default=0.95)
    parser.add_argument(
        "--confidence", type=float, help="p_min_confidence, for `auto_certified` after the first strategy"
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds for each task, test scores included; `left_out` says what has no row"
    )
    parser.add_argument("--set", action="append", default=[], help="further recipe settings, section.key=value")
    parser.add_argument(
        "--task-set", action="append", default=[], metavar="NAME:KEY=VALUE", help="the same, for one of the tasks"
    )
    parser.add_argument("--simulate", type=int, default=0, metavar="RUNS", help="simulate the certificate")
    parser.add_argument(
        "--simulate-stops", type=int, default=0, metavar="RUNS", help="simulate search.safety and confidences"
    )
    parser.add_argument("--simulate-strategies", type=int, default=0, metavar="RUNS", help="simulate auto and exact")
    parser.add_argument("--pass-share", type=float, default=1.0, help="of a simulated pass, as if prompts were shared")
    parser.add_argument("--simulated-items", type=int, default=800)
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], metavar="FILE", help="add the tasks of these files"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    is_asked = args.simulate or args.simulate_stops or args.simulate_strategies or args.merge or args.task
    if not is_asked or (args.task and not (args.model and args.bank)):
        parser.error("give a --simulate... RUNS, --merge FILES, or --model, --bank and some --task")
    if missing := [str(path) for path in args.merge if not path.is_file()]:
        parser.error(f"--merge: no such file: {', '.join(missing)}")
    return args


def merge(record: dict[str, Any], paths: list[Path]) -> None:
    """Add what other runs found to the record, theirs in place of its own."""
    before = record.get("tasks", {})
    found = [json.loads(path.read_text()) for path in paths]
    for one in found:
        record |= one
    record["tasks"] = {name: task for one in ({"tasks": before}, *found) for name, task in one.get("tasks", {}).items()}
    # What each task was measured with stands in its own entry, too.
    for key in ("command", "commit"):
        record[key] = "; ".join(dict.fromkeys(str(one[key]) for one in found if key in one))


def measure(args: argparse.Namespace, record: dict[str, Any]) -> bool:
    """All strategies on every task. False on all but torchrun's first rank."""
    from dtr.distributed import current_world, leave_world
    from dtr.errors import DtrError
    from dtr.pipeline.preparation import prepare_teacher
    from dtr.recipe import read_recipe

    record.setdefault("tasks", {})
    teacher = None
    for named in args.task:
        name, _, source = named.partition("=")
        settings = [*args.set, *(one.partition(":")[2] for one in args.task_set if one.startswith(f"{name}:"))]
        base = {"teacher": {"source": args.model}, "task": {"source": source or name}, "search": {"p_min": args.p_min}}
        recipe = read_recipe(None, settings, base)
        teacher = teacher or prepare_teacher(recipe, report_steps)
        try:
            measure_task(args, record, recipe, teacher, name)
        except DtrError as error:
            # The other tasks are worth having.
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    is_first = current_world().is_first
    leave_world()
    return is_first


def measure_task(args: argparse.Namespace, record: dict[str, Any], recipe: Any, teacher: Any, name: str) -> None:
    """The rows of one task; the file is written after every one of them."""
    from dtr.bench.measure import bench_strategies

    def keep(found: dict[str, Any]) -> None:
        record["hardware"] = found["hardware"]
        record["tasks"][name] = {**found, "command": record["command"]}
        write(args.out, record)
        print(f"{name}: {list(found['strategies'])[-1]} is done", file=sys.stderr, flush=True)

    found = bench_strategies(
        recipe,
        args.bank,
        [strategy for strategy in args.strategies.split(",") if strategy],
        teacher=teacher,
        confidence=args.confidence,
        time_limit_seconds=args.time_limit,
        on_event=report_steps,
        on_row=keep,
    )
    if found:
        # Also what has no row, and why.
        record["tasks"][name] = {**found, "command": record["command"]}


def report_steps(event: dict[str, Any]) -> None:
    if event["event"] in ("teacher", "stop", "certificate", "left_out"):
        print(json.dumps(event), file=sys.stderr, flush=True)


def draw_orders(record: dict[str, Any], path: Path) -> None:
    """When each layer falls, by task, mixer and strategy: dark falls early; in brackets how many were replaced."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        (
            ", ".join([task, *found.get("mixers", ()), f"{name} ({row['num_replaced']})"]),
            row["order"],
            found["num_layers"],
        )
        for task, found in record["tasks"].items()
        for name, row in found["strategies"].items()
        if row["order"]
    ]
    if not rows:
        return
    num_layers = max(num for _, _, num in rows)
    ranks = [[float("nan")] * num_layers for _ in rows]
    for line, (_, order, _) in zip(ranks, rows):
        for rank, layer in enumerate(order, start=1):
            line[layer] = rank
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    image = axes.imshow(ranks, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_xlabel("layer")
    figure.colorbar(image, label="replaced as number")
    figure.savefig(path, dpi=150)


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
