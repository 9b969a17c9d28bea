"""Reading text: every format, folders, the Python documentation, and files that are damaged."""

from __future__ import annotations

import ast
import gzip
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from dtr.corpus import python_docs
from dtr.corpus.reading import find_files, is_plain_text, read_documents
from dtr.errors import DataError

PLAIN = "first one\nwith two lines\n<|doc|>\n\n<|doc|>\nsecond\n"
ROWS = '{"text": "first"}\n\n{"text": " ", "id": 1}\n{"text": "second"}\n'


def test_reading_imports_no_torch():
    code = "import sys, dtr.corpus.reading; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.xz", "a.md.gz"])
def test_plain_text_is_divided_at_document_lines(tmp_path, name):
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(name).suffix, open)
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(PLAIN)
    assert list(read_documents(tmp_path / name)) == ["first one\nwith two lines", "second"]
    assert is_plain_text(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(name).suffix, open)
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(ROWS)
    assert list(read_documents(tmp_path / name)) == ["first", "second"]
    assert not is_plain_text(tmp_path / name)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["first", None, "second"], "id": [1, 2, 3]}), path)
    assert list(read_documents(path)) == ["first", "second"]
    parquet.write_table(pyarrow.table({"body": ["first"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: got the columns body, id; expected a column 'text'"):
        list(read_documents(path))
    parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: got a int in 'text'"):
        list(read_documents(path))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet: got a file that cannot be read"):
        list(read_documents(path))


def test_a_file_without_document_lines_is_cut_into_sections(tmp_path):
    paragraph = "A line of some words.\n" * 20
    (tmp_path / "book.txt").write_text("\n".join([paragraph] * 100), encoding="utf-8")
    sections = list(read_documents(tmp_path / "book.txt"))
    assert len(sections) > 5
    assert all(len(section) <= 8000 for section in sections)
    assert all(section.startswith("A line") and section.endswith("words.") for section in sections)
    assert sum(section.count("words.") for section in sections) == 2000


def test_folders_are_read_to_the_bottom_in_order(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/b/c.md", "a/notes.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = [Path(file).relative_to(tmp_path.resolve()).as_posix() for file in find_files(str(tmp_path))]
    assert found == ["a/b/c.md", "a/z.jsonl", "b.txt"]
    both = find_files([str(tmp_path / "b.txt"), "python-docs", str(tmp_path)])
    assert len(both) == 4
    assert both[1] == "python-docs"


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "prose.txt").write_text("x", encoding="utf-8")
    (tmp_path / "paper.pdf").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"text\.source: got '.*prosa\.txt'.*Did you mean '.*prose\.txt'"):
        find_files(str(tmp_path / "prosa.txt"))
    with pytest.raises(DataError, match=r"Did you mean 'python-docs'"):
        find_files("python-doc")
    with pytest.raises(DataError, match=r"paper\.pdf: got the suffix '\.pdf'; expected one of \.txt, .*\.parquet"):
        find_files(str(tmp_path / "paper.pdf"))
    with pytest.raises(DataError, match="a folder without text"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"text\.source: got an empty list"):
        find_files([])


def test_damaged_files_are_named(tmp_path):
    whole = lzma.compress(b"some text that is long enough " * 2000)
    (tmp_path / "a.txt.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt.xz").write_bytes(b"no xz at all")
    packed = gzip.compress(bytes(range(256)) * 50)
    (tmp_path / "c.txt.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "d.txt.gz").write_bytes(b"no gzip at all")
    (tmp_path / "e.txt").write_bytes(b"\xe9t\xe9")
    for name in ("a.txt.xz", "b.txt.xz", "d.txt.gz"):
        with pytest.raises(DataError, match=rf"{name}: got a file that cannot be read.*copied to the end"):
            list(read_documents(tmp_path / name))
    with pytest.raises(DataError, match=r"c\.txt\.gz: got"):
        list(read_documents(tmp_path / "c.txt.gz"))
    with pytest.raises(DataError, match=r"e\.txt: got text that is not UTF-8"):
        list(read_documents(tmp_path / "e.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', "a row with the fields body, id; expected an object with the field 'text'"),
        ('{"text": 7}', "a row with the fields text.*must hold text"),
        ('["x"]', "got a JSON list; expected one JSON object"),
        ('{"text": "x"', "broken JSON"),
        ("{}", "the fields none"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{message}"):
        list(read_documents(tmp_path / "a.jsonl"))


def test_python_docs_hold_what_the_modules_say(tmp_path, monkeypatch):
    files = {
        "mod.py": '"""Says what the module is for."""\n\nimport nothing_that_exists\n\n'
        "# A comment that goes\n# over two lines.\nx = 1  # not this one\n\n"
        "class Thing:\n    '''A thing to be documented.'''\n\n    def act(self, how='well', *args):\n"
        '        """\n        Act on it:\n\n            indented here\n        """\n'
        "if x:\n    def late():\n        'A function in an if statement.'\n",
        "copy.py": '"""Says what the module is for."""\n',
        "broken.py": "def (:\n",
        "bytes.py": b'"""\xff"""\n',
        "pkg/__init__.py": '"""The package as a whole speaks."""\n',
        "pydoc_data/topics.py": "topics = {'if': 'The if statement\\n    is for choices.', 'x': 'short'}\n",
        "LICENSE.txt": "A licence that may be read.\n",
        "test/test_mod.py": '"""Tests are left out of the text."""\n',
        "site-packages/other.py": '"""Installed packages are left out."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    licence, copy, mod, package, topic = python_docs.read_documents()
    assert licence == "A licence that may be read."
    # Seen first in copy.py, so not again in mod.py.
    assert copy == "copy\nSays what the module is for."
    assert mod.split("\n\n") == [
        "A comment that goes\nover two lines.",
        "mod.Thing\nA thing to be documented.",
        "mod.Thing.act(self, how='well', *args)\nAct on it:",
        "    indented here",
        "mod.late()\nA function in an if statement.",
    ]
    assert package == "pkg\nThe package as a whole speaks."
    assert topic == "The if statement\n    is for choices."


def test_python_docs_of_this_python():
    docs = list(python_docs.read_documents())
    assert sum(map(len, docs)) > 3_000_000
    assert len(set(docs)) == len(docs)
    assert any(doc.startswith("json\n") and "json.dumps(" in doc for doc in docs)
    # The module text is data alone: nothing of it was imported.
    assert "turtledemo" not in sys.modules
    assert ast is python_docs.ast
