"""The run folder: refused or reused with care, and everything in it that says how the run came about."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from dtr.errors import OutputError, RecipeError
from dtr.files import is_part_of, remove, write_text, writing
from dtr.pipeline.ownership import (
    COSTS,
    EVENTS,
    MARKER,
    NAMES,
    RECIPE,
    Marker,
    clear,
    inputs_inside,
    is_older_run,
    read_marker,
    sha256_of,
    strangers,
    unfinished,
)
from dtr.recipe import Recipe, read_recipe

try:
    import fcntl
except ImportError:
    # Not on Windows, where a second process is not noticed.
    fcntl = None  # type: ignore[assignment]

MAX_NAME_BYTES = 255
"""What file systems take."""
_TOLD_ANEW = ("time", "replayed", "pass_equivalents", "guard_pass_equivalents")
"""Fields in which an event that is told again, after a run was resumed, may differ from the first time."""


class RunFolder:
    """A folder with recipe.yaml, events.jsonl, bank/, journal.jsonl, search.json, hybrid/, hybrid-best/ and report.*

    A run that realigns leaves the bank realigned/ too, and hybrid-realigned/ if that is kept. dtr-run.json marks the
    folder as ours, and costs.json adds up what the run took over all its processes.

    Args:
        path: where it is or will be.
        bank: folder of a bank that is given to this run, which must not be deleted.
    """

    def __init__(self, path: str | Path, *, bank: str | Path | None = None) -> None:
        self.path = Path(path)
        self._given_bank = bank
        self.costs = self.path / COSTS
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
        self._waiting: list[dict[str, Any]] = []
        """Events from before the folder was opened."""
        self._told: set[str] = set()
        """Events that earlier processes of this run have logged."""

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
        with writing(self.path):
            if os.path.lexists(self.path) and not os.path.isdir(self.path):
                raise OutputError(str(self.path), got="a file", expected="a folder", hint="Choose another --out.")
            if any(len(part.encode(errors="surrogatepass")) > MAX_NAME_BYTES for part in self.path.parts):
                raise OSError(errno.ENAMETOOLONG, f"a name of more than {MAX_NAME_BYTES} bytes")
            there = next(place for place in (self.path, *self.path.absolute().parents) if os.path.exists(place))
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"a file, '{there}', in its path")
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no right to write in '{there}'")
            names = self._names()
            if EVENTS in names and self._log is None:
                with (self.path / EVENTS).open("a", encoding="utf-8") as file:
                    _lock(file, self.path)
            if names:
                self._check_reuse(names, recipe, resume=resume, overwrite=overwrite)

    def open(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        overwrite: bool = False,
        read: Mapping[str, str] | None = None,
    ) -> None:
        """Make the folder ready, save the resolved recipe and what was logged so far; errors as `check`.

        Args:
            recipe: as it was resolved.
            resume: go on with the run that is there.
            overwrite: delete it first.
            read: fingerprints of what this run has read, by name; with `resume` they must be those of the run.
        """
        self.check(recipe, resume=resume, overwrite=overwrite)
        with writing(self.path):
            earlier = read_marker(self.path) if resume and os.path.isdir(self.path) else None
            if earlier is not None:
                self._check_read(earlier.read, read or {}, recipe)
            self.path.mkdir(parents=True, exist_ok=True)
            going_on = resume and self._names() > set()
            self._take()
            if going_on:
                self._go_on()
            else:
                clear(self.path)
                self._log.truncate(0)  # type: ignore[union-attr]
            self._write_recipe(recipe, earlier, {**(earlier.read if earlier else {}), **(read or {})})
        if going_on:
            self._append({"event": "resumed"})
        for event in self._waiting:
            self.log(event)
        self._waiting.clear()

    def _write_recipe(self, recipe: Recipe, earlier: Marker | None, read: dict[str, str]) -> None:
        """The marker, then the copy of the recipe, unless somebody has changed that copy and gave it to this run."""
        text, saved = recipe.to_yaml(), self.path / RECIPE
        is_theirs = earlier is not None and os.path.exists(saved) and sha256_of(saved) != earlier.recipe_sha256
        digest = earlier.recipe_sha256 if earlier and is_theirs else hashlib.sha256(text.encode("utf-8")).hexdigest()
        Marker(recipe=recipe.model_dump(mode="json"), recipe_sha256=digest, read=read).write(self.path)
        if not is_theirs:
            write_text(saved, text)

    def _go_on(self) -> None:
        """Drop what a killed process left half-written, and remember what is in the log."""
        for part in unfinished(self.path):
            remove(part)
        assert self._log is not None, "the folder is not open"
        self._log.seek(0)
        text = self._log.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._log.truncate(len(whole.encode("utf-8", "surrogateescape")))
        for line in whole.splitlines():
            try:
                self._told.add(_same_for_all(json.loads(line)))
            except (ValueError, AttributeError):
                # The log is for readers; nothing depends on a line of it.
                continue

    def _take(self) -> None:
        """Keep other processes out for as long as this one lives; the system ends that, however the process ends."""
        self._log = (self.path / EVENTS).open("a+", encoding="utf-8", errors="surrogateescape")
        _lock(self._log, self.path)

    def log(self, event: dict[str, Any]) -> None:
        """Append one event with its time to events.jsonl, once the folder is open; one that an earlier process of this
        run has told is not told again."""
        if self._log is None:
            self._waiting.append(event)
        elif _same_for_all(event) not in self._told:
            self._append(event)

    def _append(self, event: dict[str, Any]) -> None:
        assert self._log is not None, "the folder is not open"
        with writing(self.path):
            self._log.write(json.dumps({"time": round(time.time(), 3), **event}, default=str) + "\n")
            self._log.flush()

    def _names(self) -> set[str]:
        """What is there, but for what says nothing: unfinished files of ours, and a log in which nothing is."""
        names = set(os.listdir(self.path)) if os.path.isdir(self.path) else set()
        names = {name for name in names if not is_part_of(name, NAMES)}
        return set() if names == {EVENTS} and os.path.getsize(self.path / EVENTS) == 0 else names

    def _check_reuse(self, names: set[str], recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        marker = read_marker(self.path)
        if marker is None and not is_older_run(self.path):
            wanted = "the folder of an earlier run" if resume or overwrite else "a new or empty folder"
            raise OutputError(
                str(self.path),
                got=f"files, but no {MARKER}, which runs leave",
                expected=wanted,
                hint="Nothing was changed. Choose another --out.",
            )
        kept = self._must_stay(recipe)
        has_own_recipe = marker is not None and sha256_of(self.path / RECIPE) in (None, marker.recipe_sha256)
        if resume:
            if foreign := strangers(self.path):
                raise self._not_ours(foreign)
            if not has_own_recipe and marker is not None and not self._is_given(recipe):
                raise OutputError(
                    str(self.path / RECIPE),
                    got="a recipe that has changed since the run wrote it",
                    expected="the copy as it was",
                    hint=f"Undo the change to go on{self._or_overwrite(recipe)}.",
                )
            self._check_same(marker, recipe)
        elif overwrite or (names <= {MARKER, RECIPE, EVENTS, COSTS} and has_own_recipe):
            # Without --overwrite only a run that failed before it had done anything may be replaced.
            if kept:
                raise kept
        else:
            again = "" if kept else ", start again with --overwrite,"
            raise OutputError(
                str(self.path),
                got="a folder that is not empty",
                expected="a new or empty folder",
                hint=f"Go on with --resume{again} or choose another --out.",
            )

    def _must_stay(self, recipe: Recipe) -> OutputError | None:
        """Why the run that is there must not be deleted, if so."""
        if inside := inputs_inside(self.path, recipe, self._given_bank):
            return OutputError(
                str(self.path),
                got=f"'{inside[0]}', which this run reads, inside the folder to be cleared",
                expected="a folder that holds nothing this run needs",
                hint="Nothing was changed. Choose another --out, or keep a copy of it elsewhere and give that.",
            )
        foreign = strangers(self.path)
        return self._not_ours(foreign) if foreign else None

    def _not_ours(self, foreign: list[str]) -> OutputError:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        return OutputError(
            str(self.path),
            got=f"'{foreign[0]}'{more}, which no run has written, where this run would delete",
            expected="only what runs write there",
            hint="Nothing was changed. Move it away, or choose another --out.",
        )

    def _or_overwrite(self, recipe: Recipe) -> str:
        return "" if self._must_stay(recipe) else ", or start again with --overwrite"

    def _is_given(self, recipe: Recipe) -> bool:
        """Whether the recipe of this run was read from the copy in the folder."""
        return recipe.path is not None and os.path.realpath(recipe.path) == os.path.realpath(self.path / RECIPE)

    def _check_same(self, marker: Marker | None, recipe: Recipe) -> None:
        saved = self._read_older(recipe) if marker is None else _as_recipe(marker, self.path)
        old, new = _flatten(saved.identity()), _flatten(recipe.identity())
        changed = [key for key in new if new[key] != old.get(key)]
        if changed:
            raise OutputError(
                str(self.path / RECIPE),
                got="; ".join(f"{key}={old.get(key)}" for key in changed),
                expected="; ".join(f"{key}={new[key]}" for key in changed),
                hint=f"--resume goes on with the same recipe only. Give '{self.path / RECIPE}', which has all settings "
                f"of that run, choose another --out{self._or_overwrite(recipe)}.",
            )

    def _check_read(self, then: Mapping[str, str], now: Mapping[str, str], recipe: Recipe) -> None:
        """Refuse to mix results of other data with those that are there."""
        changed = [name for name in now if name in then and then[name] != now[name]]
        if changed:
            raise OutputError(
                str(self.path),
                got=f"a run that has read another {' and another '.join(changed)} than is there now",
                expected="what the run was started with",
                hint=f"Put it back, choose another --out{self._or_overwrite(recipe)}.",
            )

    def _read_older(self, recipe: Recipe) -> Recipe:
        """The recipe of a run without a marker."""
        try:
            return read_recipe(self.path / RECIPE)
        except RecipeError as error:
            hint = f"{error.hint} Mend what '{RECIPE}' has there{self._or_overwrite(recipe)}.".lstrip()
            raise OutputError(error.where, got=error.got, expected=error.expected, hint=hint) from None


def _as_recipe(marker: Marker, folder: Path) -> Recipe:
    try:
        return Recipe.model_validate(marker.recipe)
    except ValidationError as error:
        raise OutputError(
            str(folder / MARKER),
            got=f"a recipe of another version of dtr ({error.error_count()} settings do not fit)",
            expected="one that this version knows",
            hint="Go on with the version that wrote it, or choose another --out.",
        ) from None


def _same_for_all(event: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in event.items() if key not in _TOLD_ANEW}
    return json.dumps(plain, sort_keys=True, default=str)


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


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
