"""The command line: each verb is a thin shell over one public function. Heavy imports stay inside the verbs."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from dtr.errors import DtrError, Interrupted

app = typer.Typer(
    help="Distil linear attention layers from a pretrained Transformer, then replace as many as a task allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArg = Annotated[Path | None, typer.Argument(help="YAML recipe; see recipes/ for examples.", metavar="RECIPE")]
OutOpt = Annotated[Path, typer.Option("--out", help="Run folder.")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", help="Change one setting: section.key=value. Repeatable.")]
ModelOpt = Annotated[str | None, typer.Option("--model", help="Teacher: hub name, folder or GGUF file.")]
TaskOpt = Annotated[str | None, typer.Option("--task", help="Task: recall, or a folder with JSONL splits.")]
PMinOpt = Annotated[float | None, typer.Option("--p-min", help="Share of the teacher's score to keep, as 0.95.")]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in --out first.")]
LogOpt = Annotated[str, typer.Option("--progress", help="What to show meanwhile: rich, json or quiet.")]
BoardOpt = Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard as well (extra tensorboard).")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(asked: bool) -> None:
    if asked:
        from dtr.environment import own_version

        _say(f"dtr {own_version()}")
        raise typer.Exit


VersionOpt = Annotated[
    bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
]


@app.callback()
def _common(version: VersionOpt = False) -> None:
    """Options before the verb."""


@app.command()
def run(
    out: OutOpt,
    recipe: RecipeArg = None,
    model: ModelOpt = None,
    task: TaskOpt = None,
    p_min: PMinOpt = None,
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    log: LogOpt = "rich",
    board: BoardOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Distil, search, save the hybrids and write the report."""
    from dtr.pipeline import run as run_pipeline

    plan = _recipe(recipe, model, task, p_min, settings)
    with _display(log, out / "tensorboard" if board else None) as show:
        record = run_pipeline(plan, out, resume=resume, overwrite=overwrite, on_event=show)
    _conclude(record, out, log)


@app.command()
def demo(
    out: OutOpt = Path("demo-run"),
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    log: LogOpt = "rich",
    board: BoardOpt = False,
    debug: DebugOpt = False,
) -> None:
    """The whole method on a real 135M model, on a CPU, in about ten minutes."""
    with as_file(files("dtr") / "demo.yaml") as recipe:
        run(out, recipe, None, None, None, settings, resume, overwrite, log, board, debug)


@app.command()
def distill(
    out: OutOpt,
    recipe: RecipeArg = None,
    model: ModelOpt = None,
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    log: LogOpt = "rich",
    board: BoardOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Phase 1 alone: train one linear mixer per layer; leaves OUT/bank."""
    from dtr.pipeline import distill_only

    plan = _recipe(recipe, model, None, None, settings)
    with _display(log, out / "tensorboard" if board else None) as show:
        bank = distill_only(plan, out, resume=resume, overwrite=overwrite, on_event=show)
    _say(f"{len(bank.layers)} mixers, mean NMSE {bank.mean_nmse:.4f}: {out / 'bank'}")


@app.command()
def search(
    out: OutOpt,
    bank: Annotated[Path, typer.Option("--bank", help="Folder of a bank from 'dtr distill' or another run.")],
    recipe: RecipeArg = None,
    model: ModelOpt = None,
    task: TaskOpt = None,
    p_min: PMinOpt = None,
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    log: LogOpt = "rich",
    board: BoardOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Phase 2 alone: replace layers with a bank that is there already."""
    from dtr.pipeline import run as run_pipeline

    plan = _recipe(recipe, model, task, p_min, settings)
    with _display(log, out / "tensorboard" if board else None) as show:
        record = run_pipeline(plan, out, bank=bank, resume=resume, overwrite=overwrite, on_event=show)
    _conclude(record, out, log)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hybrid folder, hub name or GGUF file.")],
    task: TaskOpt = "recall",
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    settings: SetOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Score any model, teacher or hybrid, on a task; prints one JSON line."""
    from dtr.pipeline import evaluate_model

    plan = _recipe(None, model, task, None, settings)
    print(json.dumps(evaluate_model(plan, split)))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folder; several with --compare.")],
    compare: Annotated[bool, typer.Option("--compare", help="Overlay the curves of several runs.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for --compare.")] = None,
    debug: DebugOpt = False,
) -> None:
    """Draw report.html again from report.json, or compare runs."""
    from dtr import reporting
    from dtr.files import write_text

    if compare:
        page = out or Path("compare.html")
        write_text(page, reporting.compare(folders))
        _say(str(page))
        return
    for folder in folders:
        record = reporting.read_report(folder)
        _conclude(record, reporting.write_report(folder, record).parent, "rich")


@app.command()
def export(
    hybrid: Annotated[Path, typer.Argument(help="Folder of a saved hybrid, as RUN/hybrid.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the stock model.")],
    to: Annotated[
        str, typer.Option("--to", help="Stock architecture; docs/export.md says what each can hold.")
    ] = "granite",
    layer_types: Annotated[
        str,
        typer.Option("--layer-types", help="Spelling in config.json: linear_attention, or mamba for older servers."),
    ] = "linear_attention",
    debug: DebugOpt = False,
) -> None:
    """Write a hybrid as a stock model that servers run without this package; prints the proof as one JSON line."""
    from dtr.export.exporter import export_hybrid

    print(json.dumps(export_hybrid(hybrid, out, to=to, layer_types=layer_types)))


bench = typer.Typer(help="Measure speed; each ends in one JSON line.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("distill")
def bench_distill(
    model: Annotated[str, typer.Argument(help="Teacher: hub name, folder, GGUF file or smollm2-demo.")],
    sizes: Annotated[str, typer.Option("--sizes", help="Sequences x tokens of a step, by commas.")] = "32x512,8x2048",
    mixer: Annotated[str, typer.Option("--mixer", help="Kind of mixer.")] = "gated_deltanet",
    backend: Annotated[str, typer.Option("--backend", help="auto, torch, triton or fla.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    steps: Annotated[int, typer.Option("--steps", help="Timed steps per size.", min=1)] = 10,
    slow: Annotated[bool, typer.Option("--slow", help="Neither compile nor replay the step.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Time the plain float32 loop as well.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Time distillation against the teacher's bare forward pass; under torchrun also all processes against one."""
    from dtr.bench.distillation import parse_sizes
    from dtr.display import speed_table
    from dtr.pipeline import bench_distillation

    record = bench_distillation(
        model,
        parse_sizes(sizes),
        mixer=mixer,
        backend=backend,
        device=device,
        num_steps=steps,
        slow=slow,
        baseline=baseline,
    )
    if record:
        _print(speed_table(record))
        print(json.dumps(record))


@bench.command("generate")
def bench_generate(
    model: Annotated[str, typer.Argument(help="Saved hybrid, or teacher: hub name, folder, GGUF file, smollm2-demo.")],
    num_linear: Annotated[int | None, typer.Option("--num-linear", help="Of a teacher, layers to make linear.")] = None,
    mixer: Annotated[str, typer.Option("--mixer", help="Kind of mixer.")] = "gated_deltanet",
    keep: Annotated[str | None, typer.Option("--keep", help="Layers that stay as they are, by commas.")] = None,
    contexts: Annotated[str, typer.Option("--contexts", help="Tokens, by commas.")] = "512,2048,8192,32768,65536",
    batch: Annotated[
        str, typer.Option("--batch", help="Sequences, by commas; fill: as many as the teacher's cache lets in.")
    ] = "1,16,fill",
    steps: Annotated[int, typer.Option("--steps", help="Decoded tokens per measurement.", min=1)] = 16,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios into this PNG, SVG or PDF.")] = None,
    debug: DebugOpt = False,
) -> None:
    """Prefill, decoding and cache of a hybrid against its teacher, at several lengths and batch sizes."""
    from dtr.bench.speedups import draw, numbers
    from dtr.display import generation_table
    from dtr.measure import bench_generation

    record = bench_generation(
        model,
        num_linear=num_linear,
        mixer=mixer,
        keep=None if keep is None else numbers("--keep", keep, least=0),
        contexts=numbers("--contexts", contexts),
        batches=numbers("--batch", batch, words=("fill",)),
        num_steps=steps,
        device=device,
        dtype=dtype,
    )
    if plot is not None:
        draw(record, plot)
    _print(generation_table(record))
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
    ] = "exact,auto,lazy,restore,one_shot,lowest_mse,kl,impact,uniform,random",
    settings: SetOpt = None,
    log: LogOpt = "quiet",
    debug: DebugOpt = False,
) -> None:
    """All search strategies on one bank and task: what each finds, holds on test and costs."""
    from dtr.display import strategy_table
    from dtr.pipeline import bench_strategies

    plan = _recipe(recipe, model, task, p_min, settings)
    with _display(log) as show:
        record = bench_strategies(plan, bank, strategies.split(","), on_event=show)
    _print(strategy_table(record))
    print(json.dumps(record))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, debug: DebugOpt = False
) -> None:
    """Say what this machine can do: devices, backends and why, versions, missing extras."""
    from dtr.display import doctor_table
    from dtr.environment import doctor as examine

    facts = examine()
    if as_json:
        print(json.dumps(facts))
    else:
        _print(doctor_table(facts))


def main() -> None:
    """Entry point: errors that users cause become one line and exit code 2, Ctrl-C exit code 130."""
    debug = "--debug" in sys.argv or os.environ.get("DTR_DEBUG") == "1"
    warnings.formatwarning = _format_warning
    try:
        app(standalone_mode=True)
    except DtrError as error:
        _fail(error, debug)
        raise SystemExit(error.exit_code) from None
    except _Stopped as stopped:
        kept = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        command = shlex.join(["dtr", *kept, "--resume"])
        print(f"\n{stopped}\nGo on with: {command}", file=sys.stderr)
        raise SystemExit(130) from None


def _format_warning(message: Any, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings as people read them; those of libraries keep their place in the code."""
    is_ours = Path(__file__).parent in Path(filename).parents
    return f"dtr: warning: {message}\n" if is_ours else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _fail(error: DtrError, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"dtr: {error}", file=sys.stderr)


def _recipe(
    path: Path | None, model: str | None, task: str | None, p_min: float | None, settings: list[str] | None
) -> Any:
    """A recipe from a file, the few flags and --set, later ones winning."""
    from dtr.recipe import read_recipe

    flags = {"teacher.source": model, "task.source": task, "search.p_min": p_min}
    overrides = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return read_recipe(path, [*overrides, *(settings or [])])


@contextmanager
def _display(log: str, board: Path | None = None) -> Iterator[Any]:
    from transformers.utils import logging

    from dtr.board import open_board
    from dtr.display import open_display

    # Bars of the library would run across our own, and between the lines of a JSON log.
    logging.disable_progress_bar()
    try:
        with open_display(log) as show, open_board(board) if board else nullcontext() as draw:
            yield show if draw is None else lambda event: (show(event), draw(event))
    except KeyboardInterrupt as error:
        text = str(error) if isinstance(error, Interrupted) else "Stopped. Every finished candidate is saved."
        raise _Stopped(text) from None


class _Stopped(Exception):
    """Ctrl-C with the state saved; typer would end a KeyboardInterrupt without a word."""


def _conclude(record: dict[str, Any], out: Path, log: str) -> None:
    if log != "rich" or not record:
        return
    from dtr.reporting import summary_table

    _print(summary_table(record))
    if sample := record.get("sample"):
        _say(f"The hybrid writes: {sample['prompt']} {' '.join(sample['hybrid'].split())}")
    _say(f"Report: {(out / 'report.html').resolve()}")


def _print(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    # Piped output has no width of its own; 100 columns keep tables whole.
    (console if console.is_terminal else Console(width=100)).print(renderable)


def _say(text: str) -> None:
    print(text, flush=True)
