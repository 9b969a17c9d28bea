"""The run folder: refused or reused with care, and everything in it that says how the run came about."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from dtr.errors import OutputError, RecipeError
from dtr.files import write_text, writing
from dtr.recipe import Recipe, read_recipe

try:
    import fcntl
except ImportError:
    # Not on Windows, where a second process is not noticed.
    fcntl = None  # type: ignore[assignment]

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
        self._log: IO[str] | None = None
        """events.jsonl, from `open` on."""
        self._waiting: list[str] = []
        """Lines of the log from before the folder was opened."""

    def check(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse what `open` would refuse, and change nothing: a run that fails before its first stage leaves no trace.

        Raises:
            OutputError: it cannot be written, holds something and neither `resume` nor `overwrite` is given, holds
                something that is not a run, is in use by another process, or (with `resume`) is a run of another
                recipe.
        """
        if resume and overwrite:
            raise OutputError(
                str(self.path),
                got="--resume and --overwrite",
                expected="one of them",
                hint="--resume goes on with the run that is there, --overwrite deletes it.",
            )
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(str(self.path), got="a file", expected="a folder", hint="Choose another --out.")
        with writing(self.path):
            there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"a file, '{there}', in its path")
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no right to write in '{there}'")
            names = self._names()
            if EVENTS in names and self._log is None:
                with (self.path / EVENTS).open("a", encoding="utf-8") as file:
                    _lock(file, self.path)
            if names and (resume or not names <= {RECIPE, EVENTS} or RECIPE not in names):
                self._check_reuse(recipe, resume=resume, overwrite=overwrite)

    def open(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder ready, save the resolved recipe and what was logged so far; errors as `check`."""
        self.check(recipe, resume=resume, overwrite=overwrite)
        with writing(self.path):
            # A run that failed before it had done anything leaves its recipe and log; the next try may replace them.
            for item in sorted(self.path.iterdir()) if self._names() and not resume else ():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / RECIPE, recipe.to_yaml())
            self._take()
        for line in self._waiting:
            self._append(line)
        self._waiting.clear()

    def _take(self) -> None:
        """Keep other processes out for as long as this one lives; the system ends that, however the process ends."""
        self._log = (self.path / EVENTS).open("a", encoding="utf-8")
        _lock(self._log, self.path)

    def log(self, event: dict[str, Any]) -> None:
        """Append one event with its time to events.jsonl, once the folder is open."""
        line = json.dumps({"time": round(time.time(), 3), **event}, default=str)
        if self._log is not None:
            self._append(line)
        else:
            self._waiting.append(line)

    def _append(self, line: str) -> None:
        assert self._log is not None, "the folder is not open"
        with writing(self.path):
            self._log.write(line + "\n")
            self._log.flush()

    def _names(self) -> set[str]:
        return {item.name for item in self.path.iterdir()} if self.path.exists() else set()

    def _check_reuse(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        saved = self.path / RECIPE
        if not saved.is_file():
            wanted = "the folder of an earlier run" if resume or overwrite else "a new or empty folder"
            raise OutputError(
                str(self.path),
                got=f"files, but no {RECIPE}",
                expected=wanted,
                hint="Nothing was changed. Choose another --out.",
            )
        if not (resume or overwrite):
            raise OutputError(
                str(self.path),
                got="a folder that is not empty",
                expected="a new or empty folder",
                hint="Go on with --resume, start again with --overwrite, or choose another --out.",
            )
        if resume:
            self._check_same(_read_saved(saved), recipe)

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


def _lock(log: IO[str], folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks; there nothing keeps runs apart.
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        raise OutputError(
            str(folder),
            got="a folder that another process is working in",
            expected="a folder for each run",
            hint="Wait for that run or stop it, or choose another --out.",
        ) from None


def _read_saved(path: Path) -> Recipe:
    try:
        return read_recipe(path)
    except RecipeError as error:
        hint = f"{error.hint} Mend what '{RECIPE}' has there, or start again with --overwrite.".lstrip()
        raise OutputError(error.where, got=error.got, expected=error.expected, hint=hint) from None


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
