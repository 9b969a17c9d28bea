"""Imports go one way, and light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "dtr"
ROOMS = (
    ["errors", "registry"],
    ["allocation", "distributed", "files", "interrupt", "json_lines", "pretrained", "recipe"],
    ["ops"],
    ["arch", "backbone"],
    ["anatomy", "mixers"],
    ["hybrid"],
    ["self_check", "backbone_checks", "identity", "devices"],
    ["checkpoint"],
    ["teacher"],
    ["corpus"],
    ["distillation", "export", "inference", "serving"],
    ["evaluation.score", "evaluation.paired"],
    ["tasks"],
    ["evaluation"],
    ["selection"],
    ["reporting"],
    ["environment"],
    ["pipeline"],
    ["bench"],
    ["cli"],
    ["__main__"],
)
"""From the bottom up; a module imports from its own level or from below."""


def level_of(module: str) -> int:
    names = [(len(name), level) for level, room in enumerate(ROOMS) for name in room if _inside(module, name)]
    assert names, f"{module} is in no room: add it to ROOMS and to docs/architecture.md"
    return max(names)[1]


def _inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dtr."):
            yield node.module.removeprefix("dtr."), node.lineno


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return
    for imported, line in imports_of(path):
        assert level_of(imported) <= level_of(module), f"{path}:{line} imports dtr.{imported} from above"


@pytest.mark.parametrize(
    "statement",
    [
        "import dtr",
        "import dtr.cli",
        "import dtr.recipe",
        "import dtr.tasks",
        "import dtr.selection.strategies",
        "import dtr.reporting",
    ],
)
def test_light_parts_import_neither_torch_nor_transformers(statement):
    code = f"import sys; {statement}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_too_long():
    long = {str(p): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
