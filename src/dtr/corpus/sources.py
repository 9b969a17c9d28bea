"""Text sources as streams of the `datasets` library, which remember where they are. No torch in here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dtr.corpus.faults import Faults
from dtr.corpus.packing import seeded_order
from dtr.corpus.reading import find_files, read_documents
from dtr.errors import DataError

HUB = "hf:"
WHOLE_BYTES = 64_000_000
"""Of a file that is hashed whole."""
NUM_PIECES, PIECE_BYTES = 1024, 16_384
"""Of a larger one evenly spread pieces are, so that a terabyte costs no more."""


def open_documents(source: str | Sequence[str], *, seed: int, faults: Faults | None) -> tuple[Any, Any]:
    """An iterable dataset with the column `text`, and facts that tell this source from others.

    Files are taken in an order that the seed decides; a hub dataset in its own.

    Raises:
        DataError: no such file or dataset.
    """
    from datasets import IterableDataset

    if isinstance(source, str) and source.startswith(HUB):
        return _open_hub(source, faults), [source]
    files = find_files(source)
    files = [str(files[i]) for i in seeded_order(len(files), f"{seed}/files")]
    facts = [_fingerprint(Path(file)) for file in files]
    note = None if faults is None else faults.add
    # A list among the arguments is what the library takes for shards: it remembers the file and the place in it.
    return IterableDataset.from_generator(_rows_of_files, gen_kwargs={"files": files, "note": note}), [files, facts]


def _fingerprint(file: Path) -> list[Any]:
    """Size and hash of a file, or of pieces of it; one that was changed but kept its size is another text."""
    if not file.is_file():
        return [0, ""]
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=12)
    with file.open("rb") as content:
        if size <= WHOLE_BYTES:
            digest.update(content.read())
        else:
            for number in range(NUM_PIECES):
                content.seek(number * max(0, size - PIECE_BYTES) // (NUM_PIECES - 1))
                digest.update(content.read(PIECE_BYTES))
    return [size, digest.hexdigest()]


def check_sources(sources: Sequence[str | Sequence[str]], *, known: Sequence[str]) -> None:
    """Refuse what is not there, and sources that share a file: it would stand in trained and in held-out blocks.

    Args:
        sources: of one mix.
        known: names that are no files.

    Raises:
        DataError: names the source or file.
    """
    seen: dict[Path | str, str | Sequence[str]] = {}
    for source in sources:
        is_file = not isinstance(source, str) or (source not in known and not source.startswith(HUB))
        files = find_files(source) if is_file else [str(source)]
        for file in files:
            if file in seen:
                got = f"{file} in '{source}' and in '{seen[file]}'"
                raise DataError("text.mix", got=got, expected="sources without a common file")
        seen |= dict.fromkeys(files, source)


def _rows_of_files(files: list[str], note: Callable[[DataError], None] | None) -> Iterator[dict[str, str]]:
    for file in files:
        for document in read_documents(file, on_fault=note):
            yield {"text": document}


def _open_hub(source: str, faults: Faults | None) -> Any:
    from datasets import load_dataset

    name, config, split, *rest = [*source.removeprefix(HUB).split(":"), "", ""]
    if not name or any(rest):
        raise DataError("text.source", got=f"'{source}'", expected="hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        dataset = load_dataset(name, config or None, split=split or "train", streaming=True)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise DataError(
            "text.source",
            got=f"{source}, which cannot be opened ({type(error).__name__}: {first})",
            expected="a dataset of the Hugging Face hub, or a local folder of one",
            hint="Check name, configuration and network.",
        ) from None
    if "text" not in columns:
        raise DataError(source, got=f"the columns {', '.join(columns)}", expected="a column 'text'")
    return _WithText(dataset.select_columns(["text"]), source, faults)


class _WithText:
    """A hub dataset without rows that hold no text, which ends where it cannot be read any further."""

    def __init__(self, dataset: Any, source: str, faults: Faults | None) -> None:
        self._dataset, self._source, self._faults = dataset, source, faults
        self._num_rows = 0

    def state_dict(self) -> dict[str, Any]:
        return {"num_rows": self._num_rows, "dataset": self._dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_rows = state["num_rows"]
        self._dataset.load_state_dict(state["dataset"])

    def __iter__(self) -> Iterator[dict[str, str]]:
        try:
            for row in self._dataset:
                self._num_rows += 1
                if isinstance(row["text"], str) and row["text"].strip():
                    yield {"text": row["text"].strip()}
                elif not isinstance(row["text"], str):
                    self._note(DataError(f"{self._source} row {self._num_rows}", got="no text", expected="text"))
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            # What the library raises on damaged files and lost connections.
            got = f"an early end ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
            self._note(DataError(f"{self._source} after row {self._num_rows}", got=got, expected="a whole source"))

    def _note(self, error: DataError) -> None:
        if self._faults is None:
            raise error
        self._faults.add(error)
