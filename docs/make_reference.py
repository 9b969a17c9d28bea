"""Write docs/reference.md from the source: verbs, recipe fields, options of tasks and mixers, public functions.

    python docs/make_reference.py

Reads the source as text, so that neither torch nor transformers is imported. `tests/test_docs.py` compares the file.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import dtr
from dtr.cli import app

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "dtr"
TARGET = ROOT / "docs" / "reference.md"
HEAD = """# Reference

Made from the source by `docs/make_reference.py`; `make docs` writes it again.

- [Commands](#commands)
- [Recipe](#recipe)
- [Options of the task kinds](#options-of-the-task-kinds)
- [Options of the mixers](#options-of-the-mixers)
- [Python](#python)
"""
SECTION = re.compile(r"(Args|Returns|Raises):$")


def reference() -> str:
    """The whole page."""
    parts = [HEAD, *commands(), *recipe(), *task_options(), *mixer_options(), *python()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def commands() -> Iterator[str]:
    yield "## Commands"
    yield (
        "Errors that a user can mend are one line on stderr and exit code 2; Ctrl-C saves the state and exits with "
        "130. Results go to stdout, progress to stderr."
    )
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        usage = " ".join(_argument(p) for p in command.params if p.param_type_name == "argument")
        yield f"### dtr {name}"
        yield f"{command.help}\n\n`dtr {name} {usage}`".replace(" `\n", "`").rstrip(" `") + "`"
        rows = [
            (f"`{', '.join(p.opts)}`", _default(p), p.help or "")
            for p in command.params
            if p.param_type_name == "option" and p.name != "help"
        ]
        yield table(("option", "default", "meaning"), rows)


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).strip("[]").upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


def recipe() -> Iterator[str]:
    classes = {node.name: node for node in _parse("recipe/sections.py").body if isinstance(node, ast.ClassDef)}
    yield "## Recipe"
    yield (
        "A YAML file with these sections; `--set section.key=value` changes one setting, the value read as YAML. "
        "`teacher.source` is the only one without a default. `seed` stands beside the sections."
    )
    for field, kind, _, _ in _fields(classes["Recipe"]):
        if kind in classes:
            yield f"### {field}"
            doc = ast.get_docstring(classes[kind])
            yield from [doc] if doc else []
            yield field_table(classes[kind])
            yield from _entries(classes[kind], classes)
    yield "### seed"
    yield next(f"Default `{default}`. {doc}" for name, _, default, doc in _fields(classes["Recipe"]) if name == "seed")


def _entries(section: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Tables of the sections that stand in lists of this one."""
    for field, kind, _, _ in _fields(section):
        for name in re.findall(r"\blist\[(\w+)\]", kind):
            if name in classes:
                yield f"Each entry of `{field}`: {ast.get_docstring(classes[name])}"
                yield field_table(classes[name])


def task_options() -> Iterator[str]:
    yield "## Options of the task kinds"
    yield "What `task.options` may hold, by `task.kind`."
    for path in sorted((SOURCE / "tasks").glob("*.py")):
        for node in _parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options") and any(_fields(node)):
                yield f"### {path.stem}"
                yield field_table(node)


def mixer_options() -> Iterator[str]:
    yield "## Options of the mixers"
    yield "What `mixer.options` may hold, by `mixer.kind`."
    kinds = re.findall(r'MIXERS\.register\("(\w+)"\)\((\w+)\)', (SOURCE / "mixers" / "__init__.py").read_text("utf-8"))
    for kind, class_name in kinds:
        _, node = find_definition(class_name, "dtr.mixers")
        rows = _option_rows(node)
        yield f"### {kind}"
        yield (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
        yield table(("option", "type", "default", "meaning"), rows) if rows else "No options."


def _option_rows(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """Options of a mixer, then those that it hands on to the mixer it is made from."""
    bases = [
        find_definition(ast.unparse(base), "dtr.mixers")[1] for base in node.bases if "nn." not in ast.unparse(base)
    ]
    inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    rows: list[tuple[str, str, str, str]] = []
    set_here: set[str] = set()
    for init in inits:
        meanings = dict(_named_entries(ast.get_docstring(node) or "", "Args"))
        for arg, value in zip(init.args.kwonlyargs, init.args.kw_defaults):
            kind = f"`{ast.unparse(arg.annotation)}`" if arg.annotation else ""
            rows.append((f"`{arg.arg}`", kind, _code(value), meanings.get(arg.arg, "")))
        calls = (n for n in ast.walk(init) if isinstance(n, ast.Call))
        set_here = {f"`{keyword.arg}`" for call in calls for keyword in call.keywords}
    if not inits or inits[0].args.kwarg:
        rows += [row for base in bases for row in _option_rows(base) if row[0] not in set_here]
    return rows


def python() -> Iterator[str]:
    yield "## Python"
    yield "All of these are attributes of `dtr`; importing the package itself imports nothing heavy."
    for name in sorted(dtr.__all__, key=lambda name: (name[0].isupper(), name)):
        path, node = find_definition(name, dtr._HOMES[name])
        yield f"### {name}"
        yield f"```py\n{signature(node)}\n```"
        yield markdown(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef):
            members = list(_members(node))
            yield from ["\n".join(members)] if members else []
        yield f"Source: `{path.relative_to(ROOT)}`"


def find_definition(name: str, home: str) -> tuple[Path, Any]:
    """The file and syntax node of a top-level function or class, searched in a module or package and below."""
    base = SOURCE.joinpath(*home.split(".")[1:])
    paths = [base.with_suffix(".py")] if base.with_suffix(".py").exists() else sorted(base.rglob("*.py"))
    found = [
        (path, node)
        for path in paths
        for node in _parse(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    ]
    assert len(found) == 1, f"{name} is defined {len(found)} times in {home}"
    return found[0]


def signature(node: Any) -> str:
    """Source of a signature; one parameter a line where it is long."""
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return f"class {node.name}{bases}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = ast.unparse(node.args)
    if len(arguments) < 70:
        return f"def {node.name}({arguments}){returns}"
    cut = ast.parse(f"def f({arguments}): ...").body[0].args  # type: ignore[attr-defined]
    lines = [f"    {part}," for part in _split_arguments(cut)]
    return "\n".join([f"def {node.name}(", *lines, f"){returns}"])


def _split_arguments(arguments: ast.arguments) -> Iterator[str]:
    plain = arguments.args
    defaults: list[Any] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    keyword = list(zip(arguments.kwonlyargs, arguments.kw_defaults))
    for arg, default in [*zip(plain, defaults), *([(None, None)] if keyword else []), *keyword]:
        if arg is None:
            yield "*"
        else:
            yield ast.unparse(arg) + (f" = {_digits(ast.unparse(default))}" if default is not None else "")


def _members(node: ast.ClassDef) -> Iterator[str]:
    """A bullet for each documented field and each public method or property of a class."""
    for name, kind, _, doc in _fields(node):
        yield f"- `{name}: {kind}`" + (f": {doc}" if doc else "")
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
            doc = (ast.get_docstring(member) or "").split("\n\n")[0].replace("\n", " ")
            call = member.name if _is_property(member) else f"{member.name}({_without_self(member)})"
            yield f"- `{call}`" + (f": {doc}" if doc else "")


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)


def _without_self(node: ast.FunctionDef) -> str:
    return re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and the string below each annotated field of a class."""
    for field, after in zip(node.body, [*node.body[1:], None]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            doc = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
            kind = ast.unparse(_Plain().visit(field.annotation))
            yield field.target.id, kind, _field_default(field.value), doc


class _Plain(ast.NodeTransformer):
    """Types without the notes that `Annotated` adds."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        return node.slice.elts[0] if ast.unparse(node.value) == "Annotated" else node  # type: ignore[attr-defined]


def _field_default(value: ast.expr | None) -> str:
    """Source of a default; empty for a required field."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            factory = given["default_factory"]
            return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else f"{ast.unparse(factory)}()"
        return ast.unparse(given["default"]) if "default" in given else ""
    return "" if value is None else ast.unparse(value)


def field_table(node: ast.ClassDef) -> str:
    plain = {"dict()": "{}", "list()": "[]"}
    rows = [
        (f"`{name}`", _kind(kind), f"`{_digits(plain.get(default, default))}`" if default else "required", doc)
        for name, kind, default, doc in _fields(node)
    ]
    return table(("field", "type", "default", "meaning"), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(doc: str) -> str:
    """A docstring with its Args, Returns and Raises as lists."""
    out, inside = [], False
    for line in doc.splitlines():
        if match := SECTION.match(line):
            out += [f"**{match[1]}**", ""]
            inside = True
        elif inside and re.match(r" {4}\S", line):
            out.append(f"- {_bold_name(line.strip())}")
        elif inside and line.startswith(" " * 8):
            out.append("  " + line.strip())
        else:
            inside = inside and not line.strip()
            out.append(line)
    return "\n".join(out)


def _bold_name(entry: str) -> str:
    name, colon, rest = entry.partition(": ")
    return f"`{name}`: {rest}" if colon and re.fullmatch(r"[\w, ]+", name) else entry


def _named_entries(doc: str, section: str) -> Iterator[tuple[str, str]]:
    """Name and meaning of each entry of one section of a docstring."""
    _, _, body = doc.partition(f"{section}:\n")
    body = re.split(r"\n(?=\S)", body)[0]
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(body)):
        name, _, meaning = entry.partition(":")
        yield name.strip(), " ".join(meaning.split())


def _kind(annotation: str) -> str:
    """A type as people write it: the values themselves for a choice of texts."""
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    return f"`{choices[1]}`" if choices else f"`{annotation}`"


def _digits(code: str) -> str:
    """Long whole numbers in groups of three, as in the source."""
    return re.sub(r"(?<![\w.])\d{5,}(?![\w.])", lambda match: f"{int(match[0]):_}", code)


def _parse(path: str | Path) -> ast.Module:
    return ast.parse(SOURCE.joinpath(path).read_text(encoding="utf-8"))


def _code(value: ast.expr | None) -> str:
    return f"`{ast.unparse(value)}`" if value is not None else "required"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(TARGET)
