"""The documentation's pages, taken apart for the tests that hold them true."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), ROOT / "src/dtr/demo.yaml"])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    """Contents of a page's fenced blocks of one language."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, name, text in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks as argument lists."""
    lines = [line for block in fences(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def load_script(path: Path) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that they are defined in.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def write_rows(folder: Path, *, num_rows: int = 12, **row) -> None:
    """A task folder whose rows differ by their number, written for {} in any text."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        rows = [
            {
                key: value.replace("{}", f"{split} {n}") if isinstance(value, str) else value
                for key, value in row.items()
            }
            for n in range(num_rows)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
