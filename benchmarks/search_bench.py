"""Search strategies side by side on several tasks and numbers of items, and the certificate's errors by simulation.

    python benchmarks/search_bench.py --model MODEL --bank BANK --task arc_easy=DATA/arc_easy --task needle=needle \
        --items 40,100,250,500 --time-limit 120 --tables TABLES --out results.json
    python benchmarks/search_bench.py --simulate 500
    python benchmarks/search_bench.py --simulate-strategies 40 --simulated-items 250 --pass-share 0.45
    python benchmarks/search_bench.py --merge arc_easy.json recall.json

With --items every task is searched with so many validation items, as `needle 40`, where it has them. --tables keeps the
scores of real models for the development of search: for each task a JSONL of hybrids (teacher, all linear, each layer
alone, each layer's attention alone given back, beginnings by distillation error, random subsets) with the value and
the signal of every validation item.

All write into one file: a run with tasks replaces those tasks and keeps the simulations, and the other way round. The
file is written after every strategy, so what a time limit leaves is there. With several GPUs either give each task to
one of them, with an --out of its own, and `--merge` the files, or start the program by torchrun. The order in which
layers fall is drawn beside the file. The last line on stdout is the record as JSON.
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
STRATEGIES = "auto,one_shot,lowest_mse,uniform,random,kl,impact,exact"
"""Those that take long last, for the time limit; each is searched from nothing and paired with `exact` in the end."""


def main() -> None:
    args = read_arguments()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    provenance = {"command": command_line(), "commit": own_commit()}
    if args.simulate:
        from search_trials import SIZES, simulate_certificates

        started = time.monotonic()
        sizes = [args.simulated_items] if args.simulated_items else SIZES
        found = simulate_certificates(
            args.simulate, sizes=sizes, confidence=args.confidence or 0.95, p_min=args.p_min, signal=args.signal
        )
        found |= {**provenance, "hardware": hardware(), "seconds": round(time.monotonic() - started, 1)}
        record["certificate_simulation"] = found
    if args.simulate_strategies:
        from search_trials import simulate_strategies

        found = simulate_strategies(
            args.simulate_strategies,
            num_items=args.simulated_items or 250,
            pass_share=args.pass_share,
            signal=args.signal,
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
    parser.add_argument("--shares", default="0.5,0.75,0.9", help="also score so much of each path on test; none by ''")
    parser.add_argument("--items", default="", help="numbers of validation items, by commas; all when left out")
    parser.add_argument("--tables", type=Path, help="folder for score tables of the tasks, one JSONL each")
    parser.add_argument("--num-subsets", type=int, default=60, help="random hybrids in a score table")
    parser.add_argument("--simulate", type=int, default=0, metavar="RUNS", help="simulate the certificate")
    parser.add_argument("--simulate-strategies", type=int, default=0, metavar="RUNS", help="simulate the plain limit")
    parser.add_argument("--simulated-items", type=int, help="validation items of simulated tasks")
    parser.add_argument("--pass-share", type=float, default=1.0, help="what a simulated pass costs; prompts are shared")
    parser.add_argument("--signal", choices=("margin", "likelihood", "none"), default="margin", help="of simulations")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], metavar="FILE", help="add the tasks of these files"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    is_asked = args.simulate or args.simulate_strategies or args.merge or args.task
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
    counts = [int(one) for one in args.items.split(",") if one] or [None]
    for named, count in [(named, count) for named in args.task for count in counts]:
        name, _, source = named.partition("=")
        settings = [*args.set, *(one.partition(":")[2] for one in args.task_set if one.startswith(f"{name}:"))]
        settings += [f"task.num_validation={count}"] if count else []
        base = {"teacher": {"source": args.model}, "task": {"source": source or name}, "search": {"p_min": args.p_min}}
        base["search"]["p_min_confidence"] = None
        recipe = read_recipe(None, settings, base)
        teacher = teacher or prepare_teacher(recipe, report_steps)
        label = f"{name} {count}" if count else name
        try:
            if args.tables and count == counts[-1]:
                from score_tables_of_models import write_table

                write_table(
                    args.tables / f"{label.replace(' ', '_')}.jsonl", recipe, args.bank, teacher, args.num_subsets
                )
            measure_task(args, record, recipe, teacher, label)
        except DtrError as error:
            # The other tasks are worth having.
            print(f"{label}: {error}", file=sys.stderr, flush=True)
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
        shares=[float(one) for one in args.shares.split(",") if one],
        time_limit_seconds=args.time_limit,
        on_event=report_steps,
        on_row=keep,
    )
    if found:
        # Also what has no row, and why.
        record["tasks"][name] = {**found, "command": record["command"]}
        write(args.out, record)


def report_steps(event: dict[str, Any]) -> None:
    if event["event"] in ("teacher", "stop", "certificate", "warning", "left_out"):
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
