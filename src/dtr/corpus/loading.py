"""`load_text`: from text files to token blocks."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dtr.corpus.blocks import TokenBlocks
from dtr.corpus.faults import Faults
from dtr.corpus.packing import (
    encode,
    held_out_first,
    shuffle_documents,
    start_with_documents,
    take_held_out,
    take_train,
)
from dtr.corpus.reading import find_files, read_documents
from dtr.distributed import World
from dtr.errors import DataError


def load_text(
    source: str | Sequence[str],
    *,
    tokenizer: Any,
    seq_len_tokens: int,
    num_held_out_tokens: int,
    max_tokens: int | None = None,
    whole_starts: bool = False,
    seed: int = 0,
    faults: Faults | None = None,
    world: World | None = None,
) -> TokenBlocks:
    """Read text, tokenize it and pack it into blocks.

    Documents are shuffled (as a whole up to 64 million characters, beyond that in pools of that length), ended by the
    tokenizer's end-of-text token, joined and cut into blocks. Held-out blocks come from documents that are in no
    training block. What does not fill a block is dropped.

    Args:
        source: files (.txt, .md, .jsonl, .xz and .gz of these, .parquet), folders, or `python-docs`. The rows of
            .jsonl and .parquet have their text in `text`; a line with only `<|doc|>` ends a document of plain text.
        tokenizer: a Hugging Face tokenizer; a fast one works on all cores.
        seq_len_tokens: length of a block.
        num_held_out_tokens: tokens to hold out, rounded down to whole blocks, at least one; 0 holds nothing out.
        max_tokens: stop after that many training tokens (whole blocks, at least one); all when left out.
        whole_starts: begin every training block with a document and drop what of its last one does not fit.
        seed: decides the order of the documents and which are held out.
        faults: takes note of what cannot be read, which is passed over; without it the first such thing is an error.
        world: processes that share out the tokenizing and all end with the whole; all must call this alike.

    Raises:
        DataError: missing files, too little text, or without `faults` an unreadable or malformed file.
    """
    files = find_files(source)
    note = None if faults is None else faults.add
    return _pack(
        lambda: (document for file in files for document in read_documents(file, on_fault=note)),
        source if isinstance(source, str) else ", ".join(source),
        tokenizer=tokenizer,
        seq_len_tokens=seq_len_tokens,
        num_held_out_tokens=num_held_out_tokens,
        max_tokens=max_tokens,
        whole_starts=whole_starts,
        seed=seed,
        faults=faults,
        world=world,
    )


def pack_documents(documents: Sequence[str], source: str, **options: Any) -> TokenBlocks:
    """`load_text` over documents that are there already; `source` names them, `options` are those of `load_text`.

    Raises:
        DataError: too little text.
    """
    return _pack(lambda: documents, source, **options)


def _pack(
    read: Callable[[], Iterable[str]],
    source: str,
    *,
    tokenizer: Any,
    seq_len_tokens: int,
    num_held_out_tokens: int,
    max_tokens: int | None = None,
    whole_starts: bool = False,
    seed: int = 0,
    faults: Faults | None = None,
    world: World | None = None,
) -> TokenBlocks:
    """As `load_text`; `read` may be called more than once."""
    assert seq_len_tokens >= 1, "blocks hold at least one token"
    num_held_out = max(num_held_out_tokens // seq_len_tokens, 1) * seq_len_tokens if num_held_out_tokens else 0
    if max_tokens is not None:
        max_tokens = max(max_tokens // seq_len_tokens, 1) * seq_len_tokens
    # At least eight documents are to be held out; where there are too few, one alone may be.
    for max_document_tokens in (max(num_held_out // 8, seq_len_tokens), num_held_out):
        stream = encode(tokenizer, _ordered(read, source, seed, faults), world)
        held_out = take_held_out(stream, num_held_out, max_document_tokens)
        blocks = start_with_documents(stream, seq_len_tokens) if whole_starts else stream
        train = take_train(blocks, max_tokens)
        if len(held_out) == num_held_out and len(train) >= seq_len_tokens:
            packed = [_block(ids, seq_len_tokens) for ids in (train, held_out)]
            return TokenBlocks.from_tensors(*packed, source=source)
    raise DataError(
        source,
        got=f"text of {sum(map(len, encode(tokenizer, _ordered(read, source, seed, faults))))} tokens",
        expected=f"{num_held_out} tokens to hold out and {seq_len_tokens} or more of other documents to train on",
        hint="Add text, or lower text.num_held_out_tokens or distill.seq_len_tokens.",
    )


def _ordered(read: Callable[[], Iterable[str]], name: str, seed: int, faults: Faults | None) -> Iterator[str]:
    """All documents, those that may be held out first."""
    pools = shuffle_documents(read(), seed)
    first = next(pools, None)
    if first is None:
        got = "no text" if faults is None or not faults.count else f"nothing that can be read ({faults.summary()})"
        raise DataError(name, got=got, expected="text", hint="The files are there but hold nothing to read.")
    yield from held_out_first(first)
    for pool in pools:
        yield from pool


def _block(ids: array, seq_len_tokens: int) -> torch.Tensor:
    """(N, T) int32."""
    num_blocks = len(ids) // seq_len_tokens
    if not num_blocks:
        return torch.empty(0, seq_len_tokens, dtype=torch.int32)
    tokens = torch.frombuffer(ids, dtype=torch.int32, count=num_blocks * seq_len_tokens)
    # A copy, as the array would otherwise stay locked behind the tensor.
    return tokens.clone().view(num_blocks, seq_len_tokens)
