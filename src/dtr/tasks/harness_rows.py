"""Finding and opening a task of lm-evaluation-harness, and its documents as rows. No torch in here."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.errors import DataError, DeviceError, RecipeError, did_you_mean
from dtr.tasks.jsonl import Row
from dtr.tasks.sources import CUT_HINT

HARNESS_PREFIX = "lm_eval:"


@dataclass(frozen=True, kw_only=True)
class HarnessRows:
    """The splits of a harness task as rows; `task` is its object."""

    name: str
    task: Any

    def names(self) -> list[str]:
        there = {
            "validation": self.task.has_validation_docs(),
            "test": self.task.has_test_docs(),
            "train": self.task.has_training_docs(),
        }
        return [split for split, has in there.items() if has]

    def rows(self, split: str, where: str) -> list[Row]:
        if split not in self.names():
            raise DataError(
                where,
                got=f"no {split} split in the harness's task '{self.name}'",
                expected="one of its splits",
                hint=f"It has: {', '.join(self.names())}. {CUT_HINT}",
            )
        docs = {
            "validation": self.task.validation_docs,
            "test": self.task.test_docs,
            "train": self.task.training_docs,
        }[split]()
        return [Row(file=Path(self.name, split), line=n, data=doc) for n, doc in enumerate(docs, start=1)]


def open_harness(name: str, path: str | None) -> HarnessRows:
    """A task of the harness by name; with `path`, one of a folder with YAML files.

    Raises:
        DeviceError: the library is not installed.
        RecipeError: no task of that name, or a group of tasks.
        DataError: its data cannot be read, as a hub data set without a network.
    """
    path = str(Path(path).expanduser().resolve()) if path is not None else None
    manager = _task_manager(path)
    where = f"task.source {HARNESS_PREFIX}{name}"
    if name not in manager.all_tasks:
        hint = did_you_mean(name, manager.all_subtasks)
        raise RecipeError(
            where,
            got=f"no task of that name{f' in {path}' if path else ''}",
            expected="a task of lm-evaluation-harness",
            hint=hint if len(hint) < 200 else "'lm-eval ls tasks' lists them.",
        )
    if name not in manager.all_subtasks:
        raise RecipeError(
            where,
            got="a group of tasks",
            expected="a single task",
            hint="Name one task of the group; search needs one score.",
        )
    try:
        with _inside(path):
            found = manager.load(name)["tasks"]
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            where,
            got=f"{type(error).__name__}: {first}",
            expected="a task whose data can be read",
            hint="A hub data set needs the network once. Without it, give a folder of YAML files with local data "
            "files as task.path.",
        ) from error
    (task,) = found.values()
    return HarnessRows(name=name, task=task)


def _task_manager(path: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise DeviceError(
            "task.source",
            got="a task of lm-evaluation-harness, which is not installed",
            expected="the extra lm-eval",
            hint="pip install 'distill-then-replace[lm-eval]'",
        ) from None
    # It reports every default that it takes; what concerns the user comes as an error.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if path is not None and not Path(path).is_dir():
        raise DataError("task.path", got=f"'{path}', which is no folder", expected="a folder with the task's YAML file")
    return TaskManager(include_path=path, include_defaults=path is None)


@contextmanager
def _inside(path: str | None) -> Iterator[None]:
    """Work in the folder of the YAML files: the harness takes data files from where it runs."""
    if path is None:
        yield
        return
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
