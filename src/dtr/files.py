"""Files and folders that are never half-written: each is written beside its place and renamed into it."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dtr.errors import OutputError

CHECKSUMS = "dtr-checksums.json"
"""Beside the weights of a saved hybrid: what each file holds."""
_SEAL = re.compile(r',\n "crc32": "([0-9a-f]{8})"\n\}\n')


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        OutputError: the folder cannot be written; what was there before stays.
    """
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, sealed: bool = False) -> None:
    """Replace a JSON file in one step.

    Args:
        path: the file.
        data: plain types; what is no plain type is written as text, and so are NaN and infinities, which JSON has not:
            `float` reads their names.
        sealed: end a dict with a checksum of its text, for `read_json` to compare.
    """
    # Said twice, so that no single damage can make a sealed file look like one that never was.
    text = json.dumps(
        _named_infinities({"sealed": True, **data} if sealed else data),
        indent=1,
        ensure_ascii=False,
        default=str,
        allow_nan=False,
    )
    write_text(path, (_seal(text) if sealed else text) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` has written; a file without a seal, as earlier versions wrote them, is read as it is.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or a sealed file that has changed.
    """
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    if not isinstance(data, dict) or not {"sealed", "crc32"} & set(data):
        return data
    found = _SEAL.search(text, max(0, len(text) - 32))
    if found is None or found.end() != len(text) or _seal(text[: found.start()] + "\n}") + "\n" != text:
        raise ValueError("its text does not match the checksum at its end")
    return {key: value for key, value in data.items() if key not in ("sealed", "crc32")}


def _named_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named_infinities(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _seal(text: str) -> str:
    body = text.removesuffix("\n}")
    return f'{body},\n "crc32": "{zlib.crc32(body.encode("utf-8")):08x}"\n}}'


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file in one step. Tensors may lie on any device."""
    from safetensors.torch import save_file

    with replacing(path) as beside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata=metadata)


def write_checksums(folder: Path) -> None:
    """Say in a file of a model's folder what each of its other files holds, but for the page that people edit."""
    names = sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.name not in (CHECKSUMS, "README.md")
    )
    write_json(folder / CHECKSUMS, {"sha256": {name: sha256_of(folder / name) for name in names}}, sealed=True)


def changed_since_written(folder: Path) -> str:
    """The first file of a model's folder that is not what `write_checksums` saw, with what is wrong; "" if none."""
    if not os.path.isfile(folder / CHECKSUMS):
        return ""
    try:
        known = read_json(folder / CHECKSUMS)["sha256"]
        for name, digest in known.items():
            if sha256_of(folder / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS}, {error}"
    return ""


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block ends well, and is removed when it does not."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path, expected="a file that can be written", hint="Check the folder's rights and its free space."):
            beside.touch()
            # Some writers make files that only their owner can read; ours follow the umask.
            mode = beside.stat().st_mode & 0o777
            yield beside
            beside.chmod(mode)
            with beside.open("rb") as file:
                # Without this a crash of the machine may leave an empty file under the final name.
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        # On a disk that can only be read, even a file that is not there cannot be removed.
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for a whole folder: an empty one to fill, beside `path`."""
    beside = path.with_name(f".{path.name}.dtr-part")
    try:
        with writing(path):
            # A process that was killed may have left it; folders of models are too large to let them gather.
            remove(beside)
            beside.mkdir(parents=True)
            probe = beside / ".mode"
            probe.touch()
            mode = probe.stat().st_mode & 0o777
            probe.unlink()
            yield beside
            for file in beside.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(mode)
            remove(path)
            os.replace(beside, path)
    finally:
        with suppress(OSError):
            remove(beside)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; of a link only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def is_part_of(name: str, known: Sequence[str]) -> bool:
    """Whether a name is that of an unfinished file or folder beside one of the known names."""
    found = re.fullmatch(r"\.(.+?)(?:\.\d+)?\.(?:dtr-)?part", name)
    return found is not None and found[1] in known


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
