"""What in a run folder is ours: a marker that each run folder carries, and the names that a run gives.

Only such names are ever deleted, only where the marker is, and never while an input of the run at hand lies inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtr.environment import own_version
from dtr.errors import OutputError
from dtr.files import is_part_of, read_json, remove, write_json
from dtr.recipe import Recipe

MARKER, RECIPE, EVENTS, COSTS = "dtr-run.json", "recipe.yaml", "events.jsonl", "costs.json"
FORMAT = 1
_PART = re.compile(r"\.(.+?)\.\d+\.part")
_BANK = r"bank\.json|mixers\.safetensors"
_MODEL = (
    r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|dtr_\w+\.py|README\.md|dtr-checksums\.json|"
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|.*\.tiktoken|"
    r"chat_template.*|additional_chat_templates|__pycache__"
)
FILES = (
    MARKER,
    RECIPE,
    EVENTS,
    COSTS,
    "distill.safetensors",
    "realign.safetensors",
    "journal.jsonl",
    "search.json",
    "report.json",
    "report.html",
)
FOLDERS = {
    "bank": _BANK,
    "realigned": _BANK,
    "hybrid": _MODEL,
    "hybrid-best": _MODEL,
    "hybrid-realigned": _MODEL,
    "tensorboard": r"events\.out\.tfevents\..*",
}
"""Folders of a run, each with what the names of its own files look like."""
NAMES = (*FILES, *FOLDERS)


@dataclass(frozen=True, kw_only=True)
class Marker:
    """dtr-run.json: says that a folder is a run of ours, of which recipe, and what the run has read."""

    recipe: dict[str, Any]
    """As the run resolved it; recipe.yaml is a copy for readers, and never believed."""
    recipe_sha256: str
    """Of recipe.yaml as it was written."""
    read: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what the run has read: teacher, tokenizer, text, task, guards, a bank that was given."""

    def write(self, folder: Path) -> None:
        facts = {"what": "a run folder of dtr", "format": FORMAT, "dtr_version": own_version(), **vars(self)}
        write_json(folder / MARKER, facts, sealed=True)


def read_marker(folder: Path) -> Marker | None:
    """The marker of a run folder; None where there is none.

    A run of an earlier version has none: it is known by its log, and its marker is made up from its recipe.

    Raises:
        OutputError: it is there and damaged.
    """
    path = folder / MARKER
    if os.path.isfile(path):
        try:
            facts = read_json(path)
            return Marker(recipe=facts["recipe"], recipe_sha256=facts["recipe_sha256"], read=facts["read"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                str(path),
                got=f"{type(error).__name__}: {error}",
                expected="the marker that a run left",
                hint="Choose another --out; if the run is to be started again, delete this folder yourself.",
            ) from None
    return None


def is_older_run(folder: Path) -> bool:
    """Whether a folder without a marker is a run of a version that left none: its log begins as ours do."""
    try:
        with (folder / EVENTS).open(encoding="utf-8") as log:
            first = json.loads(log.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"time", "event"} <= set(first) and os.path.isfile(folder / RECIPE)


def sha256_of(path: Path) -> str | None:
    """Hex digest of a file; None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def unfinished(folder: Path) -> list[Path]:
    """Part files and folders of our names that a killed process has left, in our own folders too."""
    found = [folder / name for name in os.listdir(folder) if is_part_of(name, NAMES)]
    for place, _ in _own_folders(folder):
        found += [place / name for name in os.listdir(place) if _PART.fullmatch(name)]
    return sorted(found)


def strangers(folder: Path) -> list[str]:
    """What has one of our names and is something else, and names inside the run's own folders that are not ours."""
    found = [name for name in NAMES if (folder / name).exists() and (folder / name).is_dir() != (name in FOLDERS)]
    for place, pattern in _own_folders(folder):
        found += [
            f"{place.name}/{name}" for name in sorted(os.listdir(place)) if not re.fullmatch(pattern, _whole(name))
        ]
    return found


def _own_folders(folder: Path) -> Iterator[tuple[Path, str]]:
    for name, pattern in FOLDERS.items():
        if (place := folder / name).is_dir() and not place.is_symlink():
            yield place, pattern


def _whole(name: str) -> str:
    """The name that a part file is for, or the name itself."""
    return part[1] if (part := _PART.fullmatch(name)) else name


def clear(folder: Path) -> None:
    """Delete what a run has left, but for its marker and its log, which is held open: a kill leaves a run folder."""
    for part in unfinished(folder):
        remove(part)
    # What says that something is finished goes first.
    remove(folder / "report.json")
    for place, _ in _own_folders(folder):
        remove(place / "bank.json")
    for name in NAMES:
        if name not in (MARKER, EVENTS):
            remove(folder / name)


def inputs_inside(folder: Path, recipe: Recipe, bank: str | Path | None) -> list[str]:
    """What this run reads and lies inside the folder, links followed, as the recipe names it."""
    inside = folder.resolve()
    found = ((name, Path(os.path.realpath(name))) for name in _inputs(recipe, bank))
    return [name for name, real in found if real == inside or inside in real.parents]


def _inputs(recipe: Recipe, bank: str | Path | None) -> Iterator[str]:
    sources = [recipe.text.source] if isinstance(recipe.text.source, str) else list(recipe.text.source)
    names = [recipe.path, bank, recipe.teacher.source, *sources, *recipe.text.mix]
    for task in (recipe.task, *(guard.task for guard in recipe.search.guards)):
        names += [task.source, task.path, *_module_files(task.metric)]
    for name in names:
        path = os.path.expanduser(str(name)) if name else ""
        if path and os.path.exists(path):
            yield path


def _module_files(metric: str) -> list[str]:
    """Where the function of a metric `module:function` may lie; nothing is imported."""
    if ":" not in metric:
        return []
    module = metric.partition(":")[0].replace(".", "/")
    return [os.path.join(place, module + end) for place in (os.getcwd(), *sys.path) for end in (".py", "/__init__.py")]
