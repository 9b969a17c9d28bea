"""Arguments and options that several verbs share, and the recipe they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArg = Annotated[Path | None, typer.Argument(help="YAML recipe; see recipes/ for examples.", metavar="RECIPE")]
OutOpt = Annotated[Path, typer.Option("--out", help="Run folder.")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", help="Change one setting: section.key=value. Repeatable.")]
ModelOpt = Annotated[str | None, typer.Option("--model", help="Teacher: hub name, folder, GGUF file or smollm2-demo.")]
TaskOpt = Annotated[
    str | None, typer.Option("--task", help="Task: a folder with JSONL splits, datasets:NAME, lm_eval:NAME or recall.")
]
PMinOpt = Annotated[float | None, typer.Option("--p-min", help="Share of the teacher's score to keep, as 0.95.")]
MixerOpt = Annotated[
    str | None,
    typer.Option("--mixer", help="Kind of mixer; several by commas, and search chooses for each layer."),
]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in --out first.")]
LogOpt = Annotated[str, typer.Option("--progress", help="What to show meanwhile: rich, json or quiet.")]
BoardOpt = Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard as well (extra tensorboard).")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def make_recipe(
    path: Path | None,
    model: str | None,
    task: str | None,
    p_min: float | None,
    settings: list[str] | None,
    mixer: str | None = None,
) -> Any:
    """A recipe from a file, the few flags and --set, later ones winning."""
    from dtr.recipe import read_recipe

    kinds = mixer.split(",") if mixer else []
    # The whole section, as options of a kind that the recipe names would not fit another.
    section = {"kind": kinds[0] if len(kinds) == 1 else kinds} if kinds else None
    flags = {"teacher.source": model, "task.source": task, "search.p_min": p_min, "mixer": section}
    # As they are, not as YAML, to which a path may look like a list and "null" like nothing.
    overrides = [(key, value) for key, value in flags.items() if value is not None]
    return read_recipe(path, [*overrides, *(settings or [])])
