"""Text of any size: read, shuffled, tokenized and packed piece by piece while training goes on.

The `datasets` library does the reading and remembers where in the source it is. Text is shuffled in pools: a pool of
documents is read, put into an order that the seed decides, tokenized and cut into blocks, whose order is shuffled
again. A pool is the unit of resuming: its place in the source is saved, it is read again, and the blocks that have been
trained on are passed over, so a resumed run goes on at the exact sample. The next pool is made ready in a thread
meanwhile.

Every rank reads the same stream, tokenizes its share of each pool and trains on its own share of each batch, so the
number of ranks changes nothing.

Shapes: `N` blocks, `B` batch, `T` tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dtr.corpus.cutting import cut_text
from dtr.corpus.faults import Faults
from dtr.corpus.packing import POOL_CHARS, encode, held_out_first, seeded_order, start_with_documents
from dtr.corpus.sources import open_documents
from dtr.distributed import World
from dtr.errors import DataError


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a pool starts."""

    epoch: int = 0
    pool: int = 0
    first_block: int = 0
    dataset: dict[str, Any] | None = None
    """State of the dataset before the pool's first document; None at the start of an epoch."""


@dataclass(frozen=True, kw_only=True)
class _Pool:
    place: _Place
    blocks: torch.Tensor
    """(N, T) int32."""
    following: _Place


@dataclass(kw_only=True, eq=False)
class StreamedBlocks:
    """The interface of `TokenBlocks` over text that is never held as a whole. Made by `stream_text`."""

    source: str
    seq_len_tokens: int
    fingerprint: str
    held_out: torch.Tensor
    """(N, T) int32: blocks of documents that are never trained on."""
    _dataset: Any
    _tokenizer: Any
    _seed: int
    _pool_chars: int
    _whole_starts: bool
    _held_out_documents: frozenset[bytes]
    _start: dict[str, Any]
    _world: World
    _pool: _Pool | None = None
    _ahead: tuple[_Place, Future] | None = None
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    _num_blocks_read: int = 0

    @property
    def num_tokens(self) -> int:
        """Training tokens read so far, those of every epoch counted."""
        return self._num_blocks_read * self.seq_len_tokens

    def batch(self, step: int, *, batch_size: int, seed: int) -> torch.Tensor:
        """The batch of one optimizer step, (B, T) int64; cheap where steps follow each other."""
        return self.take(step * batch_size, batch_size, seed=seed)

    def take(self, first: int, num_blocks: int, *, seed: int) -> torch.Tensor:
        """`num_blocks` blocks from number `first` of the stream on, (num_blocks, T) int64."""
        assert seed == self._seed, "the seed is part of the stream"
        rows: list[torch.Tensor] = []
        while len(rows) < num_blocks:
            number = first + len(rows)
            pool = self._pool_with(number)
            start = number - pool.place.first_block
            rows += list(pool.blocks[start : start + num_blocks - len(rows)])
        self._num_blocks_read = max(self._num_blocks_read, first + num_blocks)
        return torch.stack(rows).long()

    def first(self, num_blocks: int) -> torch.Tensor:
        """The first blocks (num_blocks, T) of the stream."""
        return self.batch(0, batch_size=num_blocks, seed=self._seed)

    def position(self) -> dict[str, Any] | None:
        """What `seek` needs to find the next batch again without reading all that came before; plain types."""
        return None if self._pool is None else asdict(self._pool.place)

    def seek(self, position: dict[str, Any] | None) -> None:
        """Go to a place that `position` gave; from the start where it is None."""
        self._pool = self._read(_Place(**position)) if position else None

    def finish(self) -> None:
        """Wait for what several ranks are making ready together, before they part."""
        if self._ahead is not None and self._world.size > 1:
            self._ahead[1].result()

    def _pool_with(self, number: int) -> _Pool:
        """The pool that holds the block of that number."""
        if self._pool is None or number < self._pool.place.first_block:
            self._pool = self._read(_Place())
        while number >= self._pool.following.first_block:
            self._pool = self._read(self._pool.following)
        if self._ahead is None or self._ahead[0] != self._pool.following:
            self._ahead = self._pool.following, self._threads.submit(self._make, self._pool.following)
        return self._pool

    def _read(self, place: _Place) -> _Pool:
        # One thread at a time reads the dataset: what is being made ready is waited for, even where it is not wanted.
        ahead, self._ahead = self._ahead, None
        made = None if ahead is None else ahead[1].result()
        return made if ahead is not None and made is not None and ahead[0] == place else self._make(place)

    def _make(self, place: _Place) -> _Pool:
        documents, after = _next_documents(self._dataset, place.dataset or self._start, self._pool_chars)
        key = f"{self._seed}/{place.epoch}/{place.pool}"
        kept = [text for text in _cut_if_alone(documents, place) if _digest(text) not in self._held_out_documents]
        encoded: Iterable[array] = encode(self._tokenizer, _in_order(kept, key), self._world)
        if self._whole_starts:
            encoded = start_with_documents(encoded, self.seq_len_tokens)
        ids = [i for document in encoded for i in document]
        blocks = _blocks(ids, self.seq_len_tokens)
        blocks = blocks[seeded_order(len(blocks), f"{key}/blocks")]
        if not len(blocks) and place.pool == 0 and after is None:
            raise _too_little(self.source, self.seq_len_tokens)
        first = place.first_block + len(blocks)
        if after is None:
            following = _Place(epoch=place.epoch + 1, first_block=first)
        else:
            following = _Place(epoch=place.epoch, pool=place.pool + 1, first_block=first, dataset=after)
        return _Pool(place=place, blocks=blocks, following=following)


def stream_text(
    source: str | Sequence[str],
    *,
    tokenizer: Any,
    seq_len_tokens: int,
    num_held_out_tokens: int,
    whole_starts: bool = False,
    seed: int = 0,
    faults: Faults | None = None,
    world: World | None = None,
    pool_chars: int = POOL_CHARS,
) -> StreamedBlocks:
    """Open text for streaming and set aside what is measured on.

    Args:
        source: what `load_text` takes, or `hf:NAME`, `hf:NAME:CONFIG`, `hf:NAME:CONFIG:SPLIT` for a dataset of the
            Hugging Face hub (or a local folder of one) with a column `text`.
        tokenizer: a Hugging Face tokenizer.
        seq_len_tokens: length of a block.
        num_held_out_tokens: tokens to hold out from the first pool, in whole blocks, at least one.
        whole_starts: begin every training block with a document and drop what of its last one does not fit.
        seed: decides the order of files, documents and blocks, and which documents are held out.
        faults: takes note of what cannot be read; without it the first such thing is an error.
        world: processes that share out the tokenizing, over a connection that nothing else uses (`side_world`): pools
            are made ready in a thread. All must ask for the same batches.
        pool_chars: characters of text that are shuffled, and held in memory, at a time.

    Raises:
        DataError: nothing to read, or too little.
    """
    dataset, facts = open_documents(source, seed=seed, faults=faults)
    name = source if isinstance(source, str) else ", ".join(source)
    start = copy.deepcopy(dataset.state_dict())
    documents, _ = _next_documents(dataset, start, pool_chars)
    documents = _in_order(_cut_if_alone(documents, _Place()), f"{seed}/held out")
    num_wanted = max(num_held_out_tokens // seq_len_tokens, 1) * seq_len_tokens
    held_out: list[int] = []
    digests: set[bytes] = set()
    for document in held_out_first(documents):
        if len(held_out) >= num_wanted or len(digests) >= len(documents) - 1:
            break
        ids = next(encode(tokenizer, [document]))
        # At least eight documents where there are as many, so that one alone does not decide.
        held_out += list(ids[: max(num_wanted // 8, seq_len_tokens)])[: num_wanted - len(held_out)]
        digests.add(_digest(document))
    if len(held_out) < seq_len_tokens:
        raise _too_little(name, seq_len_tokens, faults)
    blocks = _blocks(held_out, seq_len_tokens)
    digest = hashlib.sha256(
        json.dumps([facts, seed, seq_len_tokens, pool_chars, whole_starts], sort_keys=True).encode()
    )
    digest.update(blocks.numpy().astype("<i4").tobytes())
    return StreamedBlocks(
        source=name,
        seq_len_tokens=seq_len_tokens,
        fingerprint=digest.hexdigest()[:16],
        held_out=blocks,
        _dataset=dataset,
        _tokenizer=tokenizer,
        _seed=seed,
        _pool_chars=pool_chars,
        _whole_starts=whole_starts,
        _held_out_documents=frozenset(digests),
        _start=start,
        _world=world or World(),
    )


def _next_documents(dataset: Any, state: dict[str, Any], num_chars: int) -> tuple[list[str], dict[str, Any] | None]:
    """Documents from `state` on, up to about `num_chars`, and the state after them; None at the end of the source."""
    dataset.load_state_dict(copy.deepcopy(state))
    documents: list[str] = []
    held = 0
    for row in dataset:
        documents.append(row["text"])
        held += len(row["text"])
        if held >= num_chars:
            return documents, copy.deepcopy(dataset.state_dict())
    return documents, None


def _cut_if_alone(documents: list[str], place: _Place) -> list[str]:
    """A source that is one single document is cut into about twenty, so that a part can be held out."""
    if len(documents) == 1 and place.pool == 0:
        return list(cut_text(documents[0], len(documents[0]) // 20 + 1))
    return documents


def _in_order(documents: list[str], key: str) -> list[str]:
    return [documents[i] for i in seeded_order(len(documents), key)]


def _blocks(ids: list[int], seq_len_tokens: int) -> torch.Tensor:
    num_blocks = len(ids) // seq_len_tokens
    return torch.tensor(ids[: num_blocks * seq_len_tokens], dtype=torch.int32).view(num_blocks, seq_len_tokens)


def _digest(document: str) -> bytes:
    return hashlib.blake2b(document.encode(), digest_size=12).digest()


def _too_little(name: str, seq_len_tokens: int, faults: Faults | None = None) -> DataError:
    return DataError(
        name,
        got="too little text" + (f" ({faults.summary()})" if faults is not None and faults.count else ""),
        expected=f"{seq_len_tokens} tokens or more to hold out and as many of other documents to train on",
        hint="Add text, or lower distill.seq_len_tokens.",
    )
