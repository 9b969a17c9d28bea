"""What `load_task` was asked for, and the registry of task kinds that answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from dtr.errors import RecipeError, did_you_mean, shown
from dtr.recipe import Section
from dtr.registry import Registry
from dtr.tasks.base import Task
from dtr.tasks.sources import RowSource

OptionsT = TypeVar("OptionsT", bound=Section)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The settings of one task; the fields are those of `recipe.TaskSection`."""

    name: str
    """Short name for reports."""
    kind: str
    rows: RowSource | None = None
    """Where the rows come from; None for built-in tasks."""
    metric: str = "auto"
    prompt: str | None = None
    target: str | None = None
    chat_template: bool = False
    validation: str = "validation"
    test: str = "test"
    num_validation: int | None = None
    num_test: int | None = None
    cut_validation: float | None = None
    group: str | None = None
    fields: Mapping[str, str | list[str]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


TASKS: Registry[Callable[[TaskSpec], Task]] = Registry("task kind")
"""Kind to the function that makes such a task from a spec."""


def choose_metric(spec: TaskSpec, allowed: Sequence[str], auto: str) -> str:
    """The metric to use: `auto` gives the kind's own choice.

    Raises:
        RecipeError: a metric that this kind does not have.
    """
    if spec.metric == "auto":
        return auto
    if spec.metric not in allowed:
        raise RecipeError(
            "task.metric",
            got=f"'{spec.metric}' for a {spec.kind} task",
            expected=" or ".join(("auto", *allowed)),
            hint="Leave the metric out or change task.kind.",
        )
    return spec.metric


def read_options(model: type[OptionsT], spec: TaskSpec) -> OptionsT:
    """Check `task.options` against what the kind knows.

    Raises:
        RecipeError: an unknown option or a value that does not fit; the message names all of them.
    """
    try:
        return model.model_validate(dict(spec.options))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = did_you_mean(name, model.model_fields) if model.model_fields else "It has none."
                problems.append((name, f"an option that a {spec.kind} task does not have", "a known option", known))
            else:
                problems.append((name, shown(problem["input"]), problem["msg"].replace("Input should be ", ""), ""))
        (name, got, expected, hint), *others = problems
        more = "".join(f" Also task.options.{n}: got {g}; expected {e}. {h}".rstrip() for n, g, e, h in others)
        raise RecipeError(f"task.options.{name}", got=got, expected=expected, hint=(hint + more).strip()) from None


def refuse_settings(spec: TaskSpec, *names: str) -> None:
    """Refuse settings that a kind would have to ignore.

    Raises:
        RecipeError: one of them is set.
    """
    for name in names:
        value = getattr(spec, name)
        if value not in (None, False) and value != {}:
            raise RecipeError(
                f"task.{name}",
                got=repr(value),
                expected=f"no such setting for a {spec.kind} task",
                hint=f"Leave task.{name} out.",
            )
