"""Files that are never half-written: each is written beside its place and renamed into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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
        yield beside
        with beside.open("rb") as file:
            # Without this a crash of the machine may leave an empty file under the final name.
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(
            str(path),
            got=error.strerror or str(error),
            expected="a file that can be written",
            hint="Check the folder's rights and its free space.",
        ) from None
    finally:
        beside.unlink(missing_ok=True)
