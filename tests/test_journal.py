"""The search journal: interrupted searches repeat no work, and damaged or foreign files are told apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from score_tables import acc, random_table, search, table

from dtr.errors import OutputError
from dtr.selection.journal import Journal

IDENTITY = {"teacher": "abc", "task": {"name": "recall", "fingerprint": "def"}, "seed": 0, "p_min": 0.5}


def test_interrupted_anywhere_and_resumed_is_as_if_never_interrupted(tmp_path: Path):
    whole = random_table(7, 4)
    expected = search(whole, layers=range(4), p_min=0.1, run_to_end=True)
    num_scores = len(whole.calls)
    assert num_scores == 1 + 10
    for k in range(num_scores + 1):
        path = tmp_path / f"{k}.jsonl"
        first, second = random_table(7, 4), random_table(7, 4)
        first.interrupt_at = k
        with Journal(path, identity=IDENTITY) as journal:
            if k < num_scores:
                with pytest.raises(KeyboardInterrupt):
                    search(first, layers=range(4), p_min=0.1, run_to_end=True, journal=journal)
        with Journal(path, identity=IDENTITY, resume=True) as journal:
            assert len(journal) == len(first.calls)
            events: list[dict[str, Any]] = []
            found = search(second, layers=range(4), p_min=0.1, run_to_end=True, journal=journal, on_event=events.append)
        assert found == expected
        assert found.to_dict(with_items=True) == expected.to_dict(with_items=True)
        assert set(Counter(linear for linear, _ in first.calls + second.calls).values()) == {1}
        assert sum(not e.get("replayed", True) for e in events) == len(second.calls)
        assert len(path.read_text().splitlines()) == 1 + num_scores


def test_interrupt_in_the_listener_finds_the_line_written(tmp_path: Path):
    path = tmp_path / "journal.jsonl"

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "candidate":
            raise KeyboardInterrupt

    journal = Journal(path, identity=IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        search(table(full=0.6, l0=0.5), journal=journal, on_event=interrupt)
    # Before close(), as if the process had been killed here.
    assert [json.loads(line).get("linear") for line in path.read_text().splitlines()] == [None, [], [0]]
    journal.close()


def written_journal(path: Path) -> list[bytes]:
    with Journal(path, identity=IDENTITY) as journal:
        search(random_table(7, 3), p_min=0.1, journal=journal)
        assert path.read_bytes().endswith(b"\n")
    return path.read_bytes().splitlines(keepends=True)


def test_unfinished_last_line_is_dropped_at_any_cut(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    original, start = b"".join(lines), len(b"".join(lines[:-1]))
    expected = search(random_table(7, 3), p_min=0.1)
    for cut in range(start, len(original) + 1):
        path.write_bytes(original[:cut])
        score = random_table(7, 3)
        with Journal(path, identity=IDENTITY, resume=True) as journal:
            assert search(score, p_min=0.1, journal=journal) == expected
        # Only the newline missing: nothing is lost.
        assert len(score.calls) == (cut < len(original) - 1)
        assert path.read_bytes() == original


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"{}\n", b"5\n", b"\xff\xfe\n", b'{"linear":[0],"score":{}}\n', b"\n"])
def test_garbage_last_line_is_dropped_and_elsewhere_refused(tmp_path: Path, garbage: bytes):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    path.write_bytes(b"".join(lines) + garbage)
    Journal(path, identity=IDENTITY, resume=True).close()
    assert path.read_bytes() == b"".join(lines)
    path.write_bytes(b"".join([*lines[:2], garbage.rstrip(b"\n") + b"\n", *lines[2:]]))
    with pytest.raises(OutputError, match=r"journal\.jsonl:3: got a line that is no score"):
        Journal(path, identity=IDENTITY, resume=True)


def test_unfinished_header_starts_anew_but_other_files_are_left_alone(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    header = written_journal(path)[0]
    for cut in range(len(header) + 1):
        path.write_bytes(header[:cut])
        Journal(path, identity=IDENTITY, resume=True).close()
        assert path.read_bytes() == header
    for other in (b"my notes", b"[1]\n", b'{"journal":"search","format":99,"identity":{}}\n'):
        path.write_bytes(other)
        with pytest.raises(OutputError, match=r"journal\.jsonl:1: got something other than the header"):
            Journal(path, identity=IDENTITY, resume=True)
        assert path.read_bytes() == other


def test_another_identity_is_refused_naming_what_differs(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    other = {**IDENTITY, "task": {"name": "recall", "fingerprint": "xyz"}, "seed": 1, "bank": "b"}
    with pytest.raises(OutputError) as caught:
        Journal(path, identity=other, resume=True)
    assert caught.value.got.endswith('with bank = nothing, seed = 0, task.fingerprint = "def"')
    assert caught.value.expected == 'bank = "b", seed = 1, task.fingerprint = "xyz"'
    assert path.read_bytes() == b"".join(lines)


def test_existing_file_without_resume_and_contradicting_lines_are_refused(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    with pytest.raises(OutputError, match="exists already"):
        Journal(path, identity=IDENTITY)
    assert path.read_bytes() == b"".join(lines)
    twin = json.loads(lines[1])
    twin["score"]["value"] += 0.25
    path.write_bytes(b"".join(lines) + json.dumps(twin).encode() + b"\n")
    with pytest.raises(OutputError, match=rf"journal\.jsonl:{len(lines) + 1}: got a second, different score"):
        Journal(path, identity=IDENTITY, resume=True)


def test_unwritable_places_are_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing" / "journal.jsonl"):
        with pytest.raises(OutputError, match="can be read and written"):
            Journal(path, identity=IDENTITY, resume=True)


@given(
    value=st.floats(allow_nan=False), likelihood=st.floats(allow_nan=False),
    items=st.lists(st.sampled_from((0.0, 1.0))) | st.lists(st.floats(allow_nan=False)),
)  # fmt: skip
@example(value=-0.0, likelihood=0.0, items=[-0.0, 1.0])
@settings(max_examples=100, deadline=None)
def test_scores_come_back_bit_for_bit(tmp_path_factory, value: float, likelihood: float, items: list[float]):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    score = acc(value, likelihood, tuple(items))
    with Journal(path, identity=IDENTITY) as journal:
        journal.record(frozenset({3, 1}), score)
    with Journal(path, identity=IDENTITY, resume=True) as journal:
        assert repr(journal.find(frozenset({1, 3}))) == repr(score)
