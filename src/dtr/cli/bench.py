"""The verbs of `dtr bench`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dtr.cli.console import show_table, watched
from dtr.cli.options import DebugOpt, LogOpt, ModelOpt, PMinOpt, RecipeArg, SetOpt, TaskOpt, make_recipe

bench = typer.Typer(help="Measure speed; each ends in one JSON line.", no_args_is_help=True)

MAX_STEPS = 1_000_000
MixerOpt = Annotated[str, typer.Option("--mixer", help="Kind of mixer.")]
MixerOptionsOpt = Annotated[
    list[str] | None, typer.Option("--mixer-option", metavar="NAME=VALUE", help="An option of the mixer; repeatable.")
]
RecordOpt = Annotated[
    Path | None, typer.Option("--out", help="Write the JSON into this file too, anew after every row.")
]


@bench.command("distill")
def bench_distill(
    model: Annotated[str, typer.Argument(help="Teacher: hub name, folder, GGUF file or smollm2-demo.")],
    sizes: Annotated[str, typer.Option("--sizes", help="Sequences x tokens of a step, by commas.")] = "32x512,8x2048",
    mixer: MixerOpt = "gated_deltanet",
    mixer_option: MixerOptionsOpt = None,
    backend: Annotated[str, typer.Option("--backend", help="auto, torch, triton, fla or amx.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    steps: Annotated[int, typer.Option("--steps", help="Timed steps per size.", min=1, max=MAX_STEPS)] = 10,
    slow: Annotated[bool, typer.Option("--slow", help="Neither compile nor record the step.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Time the plain float32 loop as well.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Time distillation against the teacher's bare forward pass; under torchrun also all processes against one."""
    from dtr.bench.measure import bench_distillation
    from dtr.bench.sizes import parse_sizes
    from dtr.cli.display import speed_table

    record = bench_distillation(
        model,
        parse_sizes(sizes),
        mixer=mixer,
        options=_options(model, mixer_option),
        backend=backend,
        device=device,
        num_steps=steps,
        slow=slow,
        baseline=baseline,
    )
    if record:
        show_table(speed_table(record))
        print(json.dumps(record))


@bench.command("generate")
def bench_generate(
    model: Annotated[str, typer.Argument(help="Saved hybrid, or teacher: hub name, folder, GGUF file, smollm2-demo.")],
    num_linear: Annotated[
        int | None, typer.Option("--num-linear", help="Of a teacher, layers to make linear.", min=1)
    ] = None,
    mixer: MixerOpt = "gated_deltanet",
    mixer_option: MixerOptionsOpt = None,
    keep: Annotated[str | None, typer.Option("--keep", help="Layers that stay as they are, by commas.")] = None,
    contexts: Annotated[str, typer.Option("--contexts", help="Tokens, by commas.")] = "512,2048,8192,32768,65536",
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            help="Sequences, by commas; fill, on a GPU: as many as the teacher's cache lets in. 1, 16 and on a GPU fill"
            " when left out.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Decoded tokens per measurement.", min=1, max=MAX_STEPS)] = 16,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    out: RecordOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Prefill, decoding and cache of a hybrid against its teacher, at several lengths and batch sizes."""
    from dtr.bench.measure import bench_generation
    from dtr.bench.sizes import numbers
    from dtr.cli.display import generation_table

    record = bench_generation(
        model,
        num_linear=num_linear,
        mixer=mixer,
        options=_options(model, mixer_option),
        keep=None if keep is None else numbers("--keep", keep, least=0),
        contexts=numbers("--contexts", contexts),
        batches=None if batch is None else numbers("--batch", batch, words=("fill",)),
        num_steps=steps,
        device=device,
        dtype=dtype,
        on_row=_writer(out),
    )
    show_table(generation_table(record))
    print(json.dumps(record))


@bench.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_serve(
    context: typer.Context,
    hybrid: Annotated[Path, typer.Argument(help="Folder of a saved hybrid, as RUN/hybrid.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Hub name or folder to compare with, as vLLM loads it.")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option("--contexts", help="Tokens of a prompt, by commas; to 2K, 8K and 32K when left out.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Tokens written after each.", min=2, max=MAX_STEPS)
    ] = 128,
    most: Annotated[int, typer.Option("--most", help="Most requests open at once.", min=1, max=MAX_STEPS)] = 256,
    out: RecordOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Teacher and hybrid in vLLM under load, by vLLM's own client; other options go to both servers."""
    from dtr.bench.measure import bench_serving
    from dtr.bench.sizes import numbers
    from dtr.cli.display import serving_table

    record = bench_serving(
        hybrid,
        teacher,
        contexts=None if contexts is None else numbers("--contexts", contexts),
        new_tokens=new_tokens,
        most_sequences=most,
        extra=tuple(context.args),
        on_row=_writer(out),
    )
    show_table(serving_table(record))
    print(json.dumps(record))


@bench.command("search")
def bench_search(
    bank: Annotated[Path, typer.Option("--bank", help="Folder of a bank from 'dtr distill' or another run.")],
    recipe: RecipeArg = None,
    model: ModelOpt = None,
    task: TaskOpt = None,
    p_min: PMinOpt = None,
    strategies: Annotated[
        str, typer.Option("--strategies", help="Names, by commas.")
    ] = "exact,auto,one_shot,lowest_mse,kl,impact,uniform,random",
    settings: SetOpt = None,
    log: LogOpt = "quiet",
    debug: DebugOpt = False,
) -> None:
    """All search strategies on one bank and task: what each finds, holds on test and costs."""
    from dtr.bench.measure import bench_strategies
    from dtr.cli.display import strategy_table
    from dtr.distributed import leave_world

    plan = make_recipe(recipe, model, task, p_min, settings)
    with watched(log) as show:
        record = bench_strategies(plan, bank, [name.strip() for name in strategies.split(",")], on_event=show)
    leave_world()
    if record:
        show_table(strategy_table(record))
        print(json.dumps(record))


def _writer(out: Path | None) -> Callable[[dict[str, Any]], None] | None:
    """What writes a record into the file of --out; raises OutputError where there can be none."""
    from dtr.errors import OutputError
    from dtr.files import write_json

    if out is None:
        return None
    if not out.resolve().parent.is_dir():
        raise OutputError(
            "--out", got=str(out), expected="a file in a folder that exists", hint="Make the folder first."
        )
    return functools.partial(write_json, out)


def _options(model: str, pairs: list[str] | None) -> dict[str, Any]:
    from dtr.errors import RecipeError
    from dtr.recipe import read_recipe

    for pair in pairs or []:
        if "=" not in pair:
            raise RecipeError(
                "--mixer-option", got=f"'{pair}'", expected="NAME=VALUE", hint="As --mixer-option head_copies=2."
            )
    given: list[str | tuple[str, Any]] = [("teacher.source", model), *(f"mixer.options.{pair}" for pair in pairs or [])]
    return read_recipe(None, given).mixer.options
