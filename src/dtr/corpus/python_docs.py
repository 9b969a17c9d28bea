"""English text that comes with every Python: what the standard library says about itself. No code is run.

The documents are the docstrings and comments of each source file, headed by the names they belong to, the language
reference behind `help()`, and the text files next to them. Installed packages are left out, and so are the tests, which
many systems do not install. Python 3.11 gives about 4 million characters, a million SmolLM2 tokens; what exactly is
there depends on the version, and the fingerprint of the tokens tells.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS = 20
"""Shorter docstrings, comments and documents are left out."""
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_TOPICS = ("pydoc_data", "topics.py")
_COMMENT = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
_COMMENT_SIGN = re.compile(r"^[ \t]*#+[ \t]?", re.MULTILINE)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_documents() -> Iterator[str]:
    """Documents in a fixed order; no docstring, comment or document comes twice."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen_notes: set[str] = set()
    seen_documents: set[str] = set()
    files = [file for file in root.rglob("*") if file.suffix in (".py", ".txt")]
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        if _LEFT_OUT & set(parts):
            continue
        text = _read(file)
        if text is None:
            continue
        if file.suffix == ".txt":
            documents = [] if "Grammar" in file.name else [text.strip()]
        elif parts == _TOPICS:
            documents = _topics(text)
        else:
            documents = [_document(".".join(parts).removesuffix(".py").removesuffix(".__init__"), text, seen_notes)]
        yield from (document for document in documents if _is_new(document, seen_documents))


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        # One file less is no reason to stop; the fingerprint tells.
        return None


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _topics(source: str) -> list[str]:
    """The values of the one dictionary in pydoc's topics, as literals."""
    tree = _parse(source)
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)] if tree else []
    texts = [ast.literal_eval(value) for table in tables if isinstance(table, ast.Dict) for value in table.values]
    return [textwrap.dedent(text).strip() for text in texts if isinstance(text, str)]


def _document(module: str, source: str, seen: set[str]) -> str:
    """Docstrings and comments of one file, in the order of its lines."""
    tree = _parse(source)
    if tree is None:
        return ""
    notes = [
        (line, f"{heading}\n{docstring}")
        for line, heading, docstring in _docstrings(tree, module)
        if _is_new(docstring, seen)
    ]
    for match in _COMMENT.finditer(source):
        comment = textwrap.dedent(_COMMENT_SIGN.sub("", match[0])).strip()
        if _is_new(comment, seen):
            notes.append((source.count("\n", 0, match.start()), comment))
    return "\n\n".join(text for _, text in sorted(notes))


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[int, str, str]]:
    """(line, heading, docstring) of a node and of the classes and functions in it."""
    if isinstance(node, ast.Module | ast.ClassDef | _Function):
        docstring = (ast.get_docstring(node) or "").strip()
        if docstring:
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, _Function) else ""
            yield node.body[0].lineno, name + arguments, docstring
    # Statements alone: walking through every expression would take most of the time.
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            inner = f"{name}.{child.name}" if isinstance(child, ast.ClassDef | _Function) else name
            yield from _docstrings(child, inner)


def _is_new(text: str, seen: set[str]) -> bool:
    if len(text) < MIN_CHARS or text in seen:
        return False
    seen.add(text)
    return True
