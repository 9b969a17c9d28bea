"""What the verbs of `dtr bench` print: the figures with what they were measured on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtr.bench.distillation import bench_distill
from dtr.bench.generation import bench_generate
from dtr.bench.sizes import pick_batches
from dtr.bench.speedups import speedups
from dtr.bench.strategies import SHARES, compare_strategies
from dtr.bench.subjects import load_subjects
from dtr.distillation.bank import MixerBank, load_bank
from dtr.distillation.start import backends_of
from dtr.distributed import join_world, leave_world
from dtr.environment import command_line, compile_caches, hardware, library_versions, own_commit
from dtr.mixers import MIXERS, check_options, options_of_new
from dtr.ops.backend import choose_backend
from dtr.pipeline.preparation import (
    Listener,
    prepare_guards,
    prepare_task,
    prepare_teacher,
    search_settings,
    tell_backends,
)
from dtr.pipeline.tryout import check_activations, check_weights
from dtr.recipe import Recipe
from dtr.selection.binding import check_search
from dtr.serving.benchmark import bench_serve, ratios
from dtr.serving.plugin import installed_version
from dtr.tasks.base import Task
from dtr.teacher import Teacher, load_teacher, pick_device


def bench_generation(
    source: str,
    *,
    num_linear: int | None,
    mixer: str,
    options: dict[str, Any],
    keep: list[int] | None,
    contexts: list[int],
    batches: list[int | str] | None,
    num_steps: int,
    device: str,
    dtype: str,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """`dtr bench generate`: teacher and hybrid at every size, their ratios, and what they were measured on.

    `on_row` is called with the record so far after every size.
    """
    batches = pick_batches(batches, pick_device(device).type)
    subjects = load_subjects(
        source, num_linear=num_linear, mixer=mixer, options=options, keep=keep, device=device, dtype=dtype
    )
    hybrid = subjects.hybrid
    specs = [spec for spec in hybrid.config.mixers if spec]
    record = {
        "command": command_line(),
        "hardware": hardware(hybrid.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "model": source,
        "weights": subjects.note,
        "dtype": str(hybrid.dtype).removeprefix("torch."),
        "num_layers": hybrid.config.num_hidden_layers,
        "linear_layers": hybrid.linear_layers,
        "mixers": [spec for i, spec in enumerate(specs) if spec not in specs[:i]],
        "max_position_embeddings": hybrid.config.max_position_embeddings,
    }
    rows: list[dict[str, Any]] = []
    for row in bench_generate(subjects, contexts=contexts, batches=batches, num_steps=num_steps):
        rows.append(row)
        if on_row is not None:
            on_row(record | speedups(rows) | {"rows": rows})
    return record | speedups(rows) | {"rows": rows}


def bench_serving(
    hybrid: Path,
    teacher: str | None,
    *,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`dtr bench serve`: teacher and hybrid in vLLM at every length, their ratios, and what they were measured on.

    `options` as `dtr.serving.benchmark.bench_serve` takes them; `on_row` is called with the record so far.
    """
    facts = {
        "command": command_line(),
        "hardware": _hardware_apart(),
        "versions": library_versions(),
        "commit": own_commit(),
        "hybrid": str(hybrid),
        "teacher": teacher,
        "vllm": installed_version(),
    }

    def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return facts | {"ratios": ratios(rows), "rows": rows}

    def tell(rows: list[dict[str, Any]]) -> None:
        if on_row is not None:
            on_row(record(rows))

    return record(bench_serve(hybrid, teacher, on_row=tell, **options))


def _hardware_apart() -> dict[str, Any]:
    """Hardware, asked for in a process of its own: one that looks at a GPU keeps some of its memory."""
    code = (
        "import json; from dtr.devices import pick_device; from dtr.environment import hardware;"
        "print(json.dumps(hardware(pick_device('auto'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench_strategies(
    recipe: Recipe,
    bank: str | Path,
    strategies: list[str],
    *,
    teacher: Teacher | None = None,
    confidence: float | None = None,
    shares: Sequence[float] = SHARES,
    time_limit_seconds: float | None = None,
    on_event: Listener | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """`dtr bench search`: each strategy on the recipe's task, with what it was measured on.

    Under torchrun the ranks share out the candidates, as in a search; they stay together until `leave_world`. Nothing
    is told or returned on any but the first.

    Args:
        recipe: teacher, task and limits.
        bank: folder of the bank.
        strategies: names.
        teacher: one that is loaded already, to compare on several tasks.
        confidence, shares, time_limit_seconds: as in `compare_strategies`.
        on_event: called with the events of every search.
        on_row: called with the record so far after every strategy.

    Returns:
        what it was measured on; `strategies`, their rows by name; and `left_out`, why others have none.
    """
    world, _ = join_world(pick_device(recipe.runtime.device))
    left_out: dict[str, str] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "left_out":
            left_out[event["strategy"]] = event["reason"]
        if on_event is not None and world.is_first:
            on_event(event)

    task = prepare_task(recipe)
    settings = search_settings(recipe, [])
    for strategy in strategies:
        check_search(task, settings.changed(strategy=strategy))
    settings = settings.changed(guards=prepare_guards(recipe), run_to_end=False)
    teacher = teacher or prepare_teacher(recipe, emit)
    mixers = load_bank(bank, teacher=teacher, backend=recipe.runtime.backend)
    tell_backends(recipe, teacher, mixers, emit)
    record = _measured_on(teacher, mixers, task) | {
        "p_min": recipe.search.p_min,
        "strategies": {},
        "left_out": left_out,
    }
    for row in compare_strategies(
        teacher,
        mixers,
        task,
        settings,
        strategies=strategies,
        confidence=confidence,
        shares=shares,
        time_limit_seconds=time_limit_seconds,
        on_event=emit,
    ):
        record["strategies"][row["strategy"]] = row
        if on_row is not None and world.is_first:
            on_row(record)
    return record if world.is_first else {}


def _measured_on(teacher: Teacher, bank: MixerBank, task: Task) -> dict[str, Any]:
    return {
        "hardware": hardware(teacher.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "teacher": teacher.source,
        "num_layers": teacher.num_layers,
        "mixers": list(bank.kinds),
        "task": task.name,
        "metric": task.metric,
        "num_validation": len(task.splits["validation"]),
        "num_test": len(task.splits["test"]),
    }


def bench_distillation(
    source: str,
    sizes: list[tuple[int, int]],
    *,
    mixer: str,
    options: dict[str, Any],
    backend: str,
    device: str,
    num_steps: int,
    slow: bool,
    baseline: bool = False,
) -> dict[str, Any]:
    """`dtr bench distill`: the figures of every size, with what they were measured on.

    Under torchrun every rank takes part; nothing is returned on any but the first.
    """
    caches, began = compile_caches(), time.monotonic()
    check_options(mixer, options)
    world, place = join_world(pick_device(device))

    def say(phase: str) -> None:
        rank = f"rank {world.rank}, " if world.size > 1 else ""
        # In one piece, as lines of several processes would run into each other.
        print(f"[{rank}{time.monotonic() - began:.0f} s] {phase}\n", end="", file=sys.stderr, flush=True)

    began_choosing = time.monotonic()
    choose_backend(backend, place.type)
    # Our kernel for CPUs is built here when it has not been before.
    choice_seconds = time.monotonic() - began_choosing
    say(f"loading {source}")
    teacher = load_teacher(source, device=str(place))
    (choice,) = backends_of(teacher, [(MIXERS[mixer].operation, backend)])
    check_weights(teacher, [{"kind": mixer, **options_of_new(mixer, options)}], teacher.num_layers)
    for num_sequences, num_tokens in sizes:
        check_activations(teacher, num_sequences, num_tokens, where="--sizes", hint="Lower them.")
    results = list(
        bench_distill(
            teacher,
            sizes=sizes,
            mixer=mixer,
            options=options,
            backend=backend,
            num_steps=num_steps,
            fast=not slow,
            baseline=baseline,
            world=world,
            on_phase=say,
        )
    )
    say("parting from the other processes" if world.size > 1 else "done")
    leave_world()
    if not world.is_first:
        return {}
    return {
        "hardware": hardware(teacher.device),
        "versions": library_versions(),
        "commit": own_commit(),
        "command": command_line(),
        "teacher": teacher.source,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "mixer": mixer,
        "mixer_options": options,
        "backend": {"name": choice.name, "reason": choice.reason, "seconds_to_load": choice_seconds},
        "num_processes": world.size,
        "compile_caches": caches,
        "sizes": results,
    }
