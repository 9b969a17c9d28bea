"""The run folder: refused or reused with care, and everything in it that says how the run came about."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dtr.errors import OutputError
from dtr.files import write_text
from dtr.recipe import Recipe

RECIPE, EVENTS = "recipe.yaml", "events.jsonl"


class RunFolder:
    """A folder with recipe.yaml, events.jsonl, bank/, journal.jsonl, search.json, hybrid/, hybrid-best/ and report.*

    A run that realigns leaves the bank realigned/ too, and hybrid-realigned/ if that is kept.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bank = self.path / "bank"
        self.checkpoint = self.path / "distill.safetensors"
        self.journal = self.path / "journal.jsonl"
        self.search = self.path / "search.json"
        self.hybrid = self.path / "hybrid"
        self.hybrid_best = self.path / "hybrid-best"
        self.realign_checkpoint = self.path / "realign.safetensors"
        self.realigned = self.path / "realigned"
        self.hybrid_realigned = self.path / "hybrid-realigned"
        self._is_open = False
        self._waiting: list[str] = []
        """Lines of the log from before the folder was opened."""

    def check(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse what `open` would refuse, and change nothing: a run that fails before its first stage leaves no trace.

        Raises:
            OutputError: it cannot be written, holds something and neither `resume` nor `overwrite` is given, holds
                something that is not a run, or (with `resume`) a run of another recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(str(self.path), got="a file", expected="a folder", hint="Choose another --out.")
        with self._errors_told():
            there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"'{there}' is a file")
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no right to write in '{there}'")
            names = self._names()
            if names and (resume or not names <= {RECIPE, EVENTS} or RECIPE not in names):
                self._check_reuse(recipe, resume=resume, overwrite=overwrite)

    def open(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder ready, save the resolved recipe and what was logged so far; errors as `check`."""
        self.check(recipe, resume=resume, overwrite=overwrite)
        with self._errors_told():
            # A run that failed before it had done anything leaves its recipe and log; the next try may replace them.
            for item in sorted(self.path.iterdir()) if self._names() and not resume else ():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / RECIPE, recipe.to_yaml())
        self._is_open = True
        for line in self._waiting:
            self._append(line)
        self._waiting.clear()

    def log(self, event: dict[str, Any]) -> None:
        """Append one event with its time to events.jsonl, once the folder is open."""
        line = json.dumps({"time": round(time.time(), 3), **event}, default=str)
        if self._is_open:
            self._append(line)
        else:
            self._waiting.append(line)

    def _append(self, line: str) -> None:
        with (self.path / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _names(self) -> set[str]:
        return {item.name for item in self.path.iterdir()} if self.path.exists() else set()

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                str(self.path),
                got=error.strerror or str(error),
                expected="a folder that can be written",
                hint="Choose another --out, or check its rights and free space.",
            ) from None

    def _check_reuse(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        saved = self.path / RECIPE
        if not (resume or overwrite):
            raise OutputError(
                str(self.path),
                got="a folder that is not empty",
                expected="a new or empty folder",
                hint="Go on with --resume, start again with --overwrite, or choose another --out.",
            )
        if not saved.is_file():
            raise OutputError(
                str(self.path),
                got=f"files, but no {RECIPE}",
                expected="the folder of an earlier run",
                hint="Nothing was changed. Choose another --out.",
            )
        if resume:
            self._check_same(Recipe.model_validate(yaml.safe_load(saved.read_text(encoding="utf-8"))), recipe)

    def _check_same(self, saved: Recipe, recipe: Recipe) -> None:
        old, new = _flatten(saved.identity()), _flatten(recipe.identity())
        changed = [key for key in new if new[key] != old.get(key)]
        if changed:
            raise OutputError(
                str(self.path / RECIPE),
                got="; ".join(f"{key}={old.get(key)}" for key in changed),
                expected="; ".join(f"{key}={new[key]}" for key in changed),
                hint="--resume goes on with the same recipe only. Choose another --out, or --overwrite.",
            )


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
