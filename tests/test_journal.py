"""The search journal: interrupted searches repeat no work, and damaged or foreign files are told apart."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import nullcontext
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


def told_of_damage(is_damaged: bool = True):
    told = "is not whole; its score is worked out again"
    return pytest.warns(UserWarning, match=told) if is_damaged else nullcontext()


def test_unfinished_last_line_is_dropped_at_any_cut(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    original, start = b"".join(lines), len(b"".join(lines[:-1]))
    expected = search(random_table(7, 3), p_min=0.1)
    for cut in range(start, len(original) + 1):
        path.write_bytes(original[:cut])
        score = random_table(7, 3)
        with told_of_damage(cut not in (start, len(original) - 1, len(original))):
            journal = Journal(path, identity=IDENTITY, resume=True)
        with journal:
            assert search(score, p_min=0.1, journal=journal) == expected
        # Only the newline missing: nothing is lost.
        assert len(score.calls) == (cut < len(original) - 1)
        assert path.read_bytes() == original


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"{}\n", b"5\n", b"\xff\xfe\n", b'{"linear":[0],"score":{}}\n', b"\n"])
def test_garbage_last_line_is_dropped_and_elsewhere_refused(tmp_path: Path, garbage: bytes):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    path.write_bytes(b"".join(lines) + garbage)
    with told_of_damage():
        Journal(path, identity=IDENTITY, resume=True).close()
    assert path.read_bytes() == b"".join(lines)
    path.write_bytes(b"".join([*lines[:2], garbage.rstrip(b"\n") + b"\n", *lines[2:]]))
    with pytest.raises(OutputError, match=r"journal\.jsonl:3: got a line that is no score"):
        Journal(path, identity=IDENTITY, resume=True)


def test_any_flipped_bit_is_told_and_never_believed(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    original = b"".join(written_journal(path))
    last = original[:-1].rindex(b"\n")
    for at in random.Random(0).sample(range(8 * len(original)), 100):
        damaged = bytearray(original)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        if at // 8 < last:
            with pytest.raises(OutputError, match=r"journal\.jsonl:\d+: got .* expected an undamaged journal"):
                Journal(path, identity=IDENTITY, resume=True)
            assert path.read_bytes() == damaged
        else:
            with told_of_damage():
                Journal(path, identity=IDENTITY, resume=True).close()
            # The newline before the last line belongs to the one above it.
            assert original.startswith(path.read_bytes())


def test_a_journal_of_the_format_without_checksums_goes_on(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    lines = written_journal(path)
    plain = [{key: value for key, value in json.loads(line).items() if key != "crc32"} for line in lines]
    plain[0]["format"] = 1
    path.write_text("".join(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n" for entry in plain[:-1]))
    score = random_table(7, 3)
    with Journal(path, identity=IDENTITY, resume=True) as journal:
        assert search(score, p_min=0.1, journal=journal) == search(random_table(7, 3), p_min=0.1)
    assert len(score.calls) == 1
    assert path.read_bytes() == b"".join(lines)


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
    with Journal(tmp_path / "other.jsonl", identity=IDENTITY) as other:
        other.record(frozenset(), acc(0.123))
    path.write_bytes(b"".join(lines) + (tmp_path / "other.jsonl").read_bytes().splitlines(keepends=True)[1])
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
