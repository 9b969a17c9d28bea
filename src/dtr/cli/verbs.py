"""The command line: each verb is a thin shell over one public function. Heavy imports stay inside the verbs."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from dtr.cli.bench import bench
from dtr.cli.console import Stopped, conclude, say, show_table, watched
from dtr.cli.options import (
    BoardOpt,
    DebugOpt,
    LogOpt,
    MixerOpt,
    ModelOpt,
    OutOpt,
    OverwriteOpt,
    PMinOpt,
    RecipeArg,
    ResumeOpt,
    SetOpt,
    TaskOpt,
    make_recipe,
)
from dtr.errors import DtrError, RecipeError

app = typer.Typer(
    help="Distil linear attention layers from a pretrained Transformer, then replace as many as a task allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        from dtr.environment import own_version

        say(f"dtr {own_version()}")
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
    mixer: MixerOpt = None,
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    log: LogOpt = "rich",
    board: BoardOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Distil, search, save the hybrids and write the report."""
    from dtr.pipeline import run as run_pipeline

    plan = make_recipe(recipe, model, task, p_min, settings, mixer)
    with watched(log, out / "tensorboard" if board else None) as show:
        record = run_pipeline(plan, out, resume=resume, overwrite=overwrite, on_event=show)
    conclude(record, out, log)


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
        run(out, recipe, None, None, None, None, settings, resume, overwrite, log, board, debug)


@app.command()
def distill(
    out: OutOpt,
    recipe: RecipeArg = None,
    model: ModelOpt = None,
    mixer: MixerOpt = None,
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    overwrite: OverwriteOpt = False,
    log: LogOpt = "rich",
    board: BoardOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Phase 1 alone: train one linear mixer per layer; leaves OUT/bank."""
    from dtr.pipeline import distill_only

    plan = make_recipe(recipe, model, None, None, settings, mixer)
    with watched(log, out / "tensorboard" if board else None) as show:
        bank = distill_only(plan, out, resume=resume, overwrite=overwrite, on_event=show)
    means = bank.mean_nmse_by_kind
    each = ", ".join(f"{value:.4f}" + (f" ({kind})" if len(means) > 1 else "") for kind, value in means.items())
    say(f"{len(bank.mixers)} mixers, mean NMSE {each}: {out / 'bank'}")


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

    plan = make_recipe(recipe, model, task, p_min, settings)
    with watched(log, out / "tensorboard" if board else None) as show:
        record = run_pipeline(plan, out, bank=bank, resume=resume, overwrite=overwrite, on_event=show)
    conclude(record, out, log)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hybrid folder, or teacher: hub name, folder, GGUF file, smollm2-demo.")],
    task: TaskOpt = "recall",
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    settings: SetOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Score any model, teacher or hybrid, on a task; prints one JSON line."""
    from dtr.pipeline import evaluate_model

    plan = make_recipe(None, model, task, None, settings)
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
        say(str(page))
        return
    if out is not None:
        raise RecipeError("--out", got=f"'{out}' without --compare", expected="--compare, whose page it names")
    for folder in folders:
        record = reporting.read_report(folder)
        conclude(record, reporting.write_report(folder, record).parent, "rich")


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    hybrid: Annotated[Path, typer.Argument(help="Folder of a saved hybrid, as RUN/hybrid.")],
    port: Annotated[int, typer.Option("--port", help="Port on this machine.", min=1, max=65535)] = 8000,
    show: Annotated[bool, typer.Option("--print", help="Print the command and leave.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Serve a hybrid with vLLM, or transformers where vLLM is not installed; other options go to the server."""
    from dtr.serving.command import serve_command

    command = serve_command(hybrid, port=port, extra=tuple(context.args))
    say(f"Health: {command.health_check}")
    say(f"Ask:    {command.example}")
    print(command.shell)
    if not show:
        raise typer.Exit(command.run())


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="A model, to say what would be done with it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: DebugOpt = False,
) -> None:
    """Say what this machine can do: devices, backends and why, versions, missing extras; or what MODEL is made of."""
    from dtr.cli.display import doctor_table, model_table
    from dtr.environment import doctor as examine
    from dtr.environment import doctor_of_model

    if model is not None:
        found = doctor_of_model(model)
        if as_json:
            print(json.dumps(found))
        else:
            show_table(model_table(found))
        return
    facts = examine()
    if as_json:
        print(json.dumps(facts))
    else:
        show_table(doctor_table(facts))


def main() -> None:
    """Entry point: errors that users cause become one line and exit code 2, Ctrl-C exit code 130."""
    debug = "--debug" in sys.argv or os.environ.get("DTR_DEBUG") == "1"
    warnings.formatwarning = _format_warning
    try:
        app(standalone_mode=True)
    except DtrError as error:
        _fail(error, debug)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        # A file that the system refuses, as one whose name is too long; what has no file is a fault of ours.
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        _fail(DtrError(name, got=str(error.strerror).lower(), expected="a file or folder that can be used"), debug)
        raise SystemExit(DtrError.exit_code) from None
    except Stopped as stopped:
        kept = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        command = shlex.join(["dtr", *kept, "--resume"])
        # A terminal that was closed takes no words.
        with suppress(OSError):
            print(f"\n{stopped}\nGo on with: {command}", file=sys.stderr)
        raise SystemExit(130) from None


def _format_warning(message: Any, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings as people read them; those of libraries keep their place in the code."""
    is_ours = Path(__file__).parent.parent in Path(filename).parents
    return f"dtr: warning: {message}\n" if is_ours else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _fail(error: DtrError, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"dtr: {error}", file=sys.stderr)
