"""The search journal: every score ever computed, one JSON line each, so that an interrupted search repeats no work.

The first line says what the scores belong to; each further line is one hybrid, `{"linear": [1, 4], "score": {...}}`,
with `items` where only some of the items were scored and `task` where a guard task was. Every line ends with the CRC-32
of what stands before, so that a damaged one is told and never believed. The file is only ever appended to, except that
an unfinished last line is cut off when it is opened again, and that one of format 1, without checksums, is given them.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dtr.errors import OutputError
from dtr.evaluation.score import Score
from dtr.files import replacing

FORMAT = 2
WITHOUT_CHECKSUMS = 1
_CRC = ',"crc32":"'
_CRC_CHARS = len(_CRC) + 8 + len('"}')
ScoreKey = tuple[frozenset[int], tuple[int, ...] | None, str]
"""Linear layers, the items that were scored (None for all of them), and the guard task ("" for the task itself)."""
_MAX_DIFFERENCES_SHOWN = 8
_MAX_VALUE_CHARS = 100


class ScoreBook:
    """Scores by set of linear layers, kept in memory."""

    def __init__(self, scores: Mapping[ScoreKey, Score] | None = None) -> None:
        self._scores: dict[ScoreKey, Score] = dict(scores or {})

    def __len__(self) -> int:
        """Number of scores held."""
        return len(self._scores)

    @property
    def scores(self) -> dict[ScoreKey, Score]:
        """A copy of all that is held."""
        return dict(self._scores)

    def find(self, linear: frozenset[int], *, items: tuple[int, ...] | None = None, task: str = "") -> Score | None:
        """The score of a hybrid over these items, or None if it is not there; other items are another score."""
        return self._scores.get((linear, items, task))

    def record(
        self, linear: frozenset[int], score: Score, *, items: tuple[int, ...] | None = None, task: str = ""
    ) -> None:
        """Keep one score that is not there yet."""
        key = (linear, items, task)
        assert key not in self._scores, f"{sorted(linear)} is in the journal already"
        self._scores[key] = score


class Journal(ScoreBook):
    """Scores by set of linear layers, kept in a file. Use as a context manager, or call `close`.

    Args:
        path: the file; its folder exists.
        identity: what the scores depend on (teacher, bank and task fingerprints, seed, ...), JSON types only. A
            journal with another identity is refused.
        resume: go on with an existing file; without it, an existing file is refused.

    Raises:
        OutputError: the file exists without `resume`, has another identity, is damaged, or cannot be written.
    """

    def __init__(self, path: str | Path, *, identity: Mapping[str, Any], resume: bool = False) -> None:
        super().__init__()
        self.path = Path(path)
        header = _to_line({"journal": "search", "format": FORMAT, "identity": identity})
        try:
            existing = self.path.read_bytes() if self.path.exists() else b""
            if existing and not resume:
                raise OutputError(
                    str(self.path),
                    got="a journal that exists already",
                    expected="a new file",
                    hint="Resume that search, or choose another run folder.",
                )
            # An interrupted first write leaves a beginning of this very header, and nothing that could be lost.
            is_new = header.startswith(existing)
            num_good_bytes = 0 if is_new else self._replay(existing, json.loads(header)["identity"])
            if not is_new and not existing.startswith(header):
                existing = self._with_checksums(header)
                num_good_bytes = len(existing)
            # Unbuffered: when a write returns, the line is with the operating system, and Ctrl-C cannot lose it.
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(num_good_bytes)
        except OSError as error:
            raise self._unwritable(error) from None
        if is_new:
            self._append(header)
        elif existing[num_good_bytes - 1 : num_good_bytes] != b"\n":
            self._append(b"\n")

    def record(
        self, linear: frozenset[int], score: Score, *, items: tuple[int, ...] | None = None, task: str = ""
    ) -> None:
        """Write one score; on return it survives the end of this process."""
        key = (linear, items, task)
        assert key not in self._scores, f"{sorted(linear)} is in the journal already"
        self._append(_to_line(_entry(key, score)))
        self._scores[key] = score

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        try:
            # A raw write may be short, for instance on a disk that is nearly full.
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            raise self._unwritable(error) from None

    def _replay(self, data: bytes, identity: dict[str, Any]) -> int:
        """Check the header, read the scores, and say how many bytes to keep (all but an unfinished last line)."""
        lines = data.removesuffix(b"\n").split(b"\n")
        has_checksums = self._check_header(lines[0], identity)
        num_good_bytes = len(lines[0]) + 1
        for number, line in enumerate(lines[1:], start=2):
            try:
                key, score = _decode(line, has_checksums)
            except (ValueError, TypeError, KeyError, AttributeError):
                if number == len(lines):
                    warnings.warn(f"{self.path}:{number} is not whole; its score is worked out again", stacklevel=2)
                    return num_good_bytes
                raise self._damaged(number, "a line that is no score, or not the one that was written") from None
            if self._scores.setdefault(key, score) != score:
                raise self._damaged(number, f"a second, different score of layers {sorted(key[0])}")
            num_good_bytes += len(line) + 1
        return min(num_good_bytes, len(data))

    def _with_checksums(self, header: bytes) -> bytes:
        """Replace a file of format 1 by one of the present format with the same scores; returns what it holds."""
        data = header + b"".join(_to_line(_entry(key, score)) for key, score in self._scores.items())
        with replacing(self.path) as beside:
            beside.write_bytes(data)
        return data

    def _check_header(self, line: bytes, identity: dict[str, Any]) -> bool:
        """Refuse another search's journal; returns whether its lines have checksums."""
        try:
            header = json.loads(line.decode("utf-8"))
            recorded = dict(header["identity"])
            is_known = header["journal"] == "search" and header["format"] in (WITHOUT_CHECKSUMS, FORMAT)
            has_checksums = header["format"] == FORMAT
            _from_line(line, has_checksums)
        except (ValueError, TypeError, KeyError):
            is_known = False
        if not is_known:
            raise self._damaged(1, f"something other than the header of a search journal of format {FORMAT}")
        theirs, ours = _flatten(recorded), _flatten(identity)
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing == ["search"]:
            raise OutputError(
                str(self.path),
                got="the journal of an older version's search, which scored and chose in another way",
                expected="a journal of this version",
                hint="Delete that file to search anew; the bank stays as it is.",
            )
        if differing:
            raise OutputError(
                str(self.path),
                got=f"the journal of another search, with {_list_entries(theirs, differing)}",
                expected=_list_entries(ours, differing),
                hint="Go back to those settings, or search in another run folder.",
            )
        return has_checksums

    def _damaged(self, line_number: int, got: str) -> OutputError:
        return OutputError(
            f"{self.path}:{line_number}",
            got=got,
            expected="an undamaged journal",
            hint="Delete the file to search anew, or cut it before this line to keep what is above it.",
        )

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            str(self.path),
            got=error.strerror or str(error),
            expected="a journal file that can be read and written",
            hint="Check the run folder, its permissions and the space left; the scores in the file stay valid.",
        )


def _to_line(entry: Mapping[str, Any]) -> bytes:
    return _sealed(json.dumps(entry, sort_keys=True, separators=(",", ":"))).encode("utf-8") + b"\n"


def _sealed(text: str) -> str:
    """A JSON object's text with its checksum as the last entry."""
    return f'{text[:-1]}{_CRC}{zlib.crc32(text.encode("utf-8")):08x}"}}'


def _from_line(line: bytes, has_checksum: bool) -> dict[str, Any]:
    """The entry of a line; raises ValueError where it is not the one that was written."""
    # Decoded here because json.loads guesses other encodings for bytes, such as UTF-16 for a run of zeros.
    text = line.decode("utf-8")
    if has_checksum and text != _sealed(text[:-_CRC_CHARS] + "}"):
        raise ValueError("another checksum")
    return json.loads(text)


def _entry(key: ScoreKey, score: Score) -> dict[str, Any]:
    linear, items, task = key
    entry: dict[str, Any] = {"linear": sorted(linear), "score": _encode(score)}
    entry |= {"items": list(items)} if items is not None else {}
    return entry | ({"task": task} if task else {})


def _encode(score: Score) -> dict[str, Any]:
    """As `Score.to_dict`, with 0/1 items as a string of digits: a quarter of the bytes of a list of floats."""
    items = score.per_item
    # By their text, as -0.0 equals 0.0.
    is_binary = all(repr(value) in ("0.0", "1.0") for value in items)
    entry = {**score.to_dict(), "per_item": "".join(f"{value:.0f}" for value in items) if is_binary else list(items)}
    extras = {"signals": score.signals, "weights": score.weights, "groups": score.groups}
    return entry | {name: list(values) for name, values in extras.items() if values}


def _decode(line: bytes, has_checksum: bool) -> tuple[ScoreKey, Score]:
    entry = _from_line(line, has_checksum)
    values = entry["score"].pop("per_item")
    items = tuple(int(item) for item in entry["items"]) if "items" in entry else None
    key = (frozenset(entry["linear"]), items, str(entry.get("task", "")))
    extras: dict[str, Any] = {name: tuple(entry["score"].pop(name, ())) for name in ("signals", "weights", "groups")}
    return key, Score(**entry["score"], per_item=tuple(float(value) for value in values), **extras)


def _flatten(identity: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` to JSON text."""
    flat: dict[str, str] = {}
    for key, value in identity.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = json.dumps(value, sort_keys=True)
    return flat


def _list_entries(flat: Mapping[str, str], keys: list[str]) -> str:
    texts = [f"{key} = {_shorten(flat.get(key, 'nothing'))}" for key in keys[:_MAX_DIFFERENCES_SHOWN]]
    num_left = len(keys) - len(texts)
    return ", ".join(texts) + (f" and {num_left} more" if num_left else "")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "..."
