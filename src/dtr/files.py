"""Files and folders that are never half-written: each is written beside its place and renamed into it."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtr.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        OutputError: the folder cannot be written; what was there before stays.
    """
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file in one step. Tensors may lie on any device."""
    from safetensors.torch import save_file

    with replacing(path) as beside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata=metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block ends well, and is removed when it does not."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path, expected="a file that can be written", hint="Check the folder's rights and its free space."):
            yield beside
            with beside.open("rb") as file:
                # Without this a crash of the machine may leave an empty file under the final name.
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for a whole folder: an empty one to fill, beside `path`."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            # A process that was killed may have left it; folders of models are too large to let them gather.
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            if path.exists():
                shutil.rmtree(path)
            os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def writing(
    place: Path,
    *,
    expected: str = "a folder that can be written",
    hint: str = "Choose another --out, or check its rights and free space.",
) -> Iterator[None]:
    """Word what the system says when `place` cannot be written as an error of ours."""
    try:
        yield
    except Exception as error:
        reason = _system_reason(error)
        if reason is None:
            raise
        raise OutputError(str(place), got=reason, expected=expected, hint=hint) from None


def user_path(name: str | Path) -> Path:
    """The path that a user wrote, with `~` expanded where there is such a home."""
    return Path(os.path.expanduser(name))


def require_file(path: Path) -> None:
    """Refuse what is no regular file: to read a pipe waits for ever, to read a device has no end.

    Raises:
        OSError: not there, a folder, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, f"a name that no file can have ({error})", str(path)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, device or socket instead of a file", str(path))


def suggest_path(name: str, known: Sequence[str] = ()) -> str:
    """A hint for a path that does not exist: the nearest of its neighbours and of the known names."""
    folder = user_path(name).parent
    try:
        neighbours = [str(Path(name).parent / path.name) for path in folder.iterdir()]
    except (OSError, ValueError):
        neighbours = []
    near = difflib.get_close_matches(name, [*known, *neighbours], n=1)
    return f"Did you mean '{near[0]}'?" if near else "Check the path."


def _system_reason(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers write in Rust, and what they raise is no OSError.
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))
    return found[1].strip() if found else None
