"""From documents to one stream of tokens: shuffle, tokenize, separate, divide between training and measuring."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dtr.corpus.cutting import cut_text
from dtr.distributed import World

POOL_CHARS = 64_000_000
"""Text that is shuffled at a time; smaller text is shuffled as a whole."""
BATCH_CHARS = 2_000_000
"""Text given to the tokenizer at a time."""
PIECE_CHARS = 16_384
"""Longer documents are tokenized in pieces, so that the tokenizer can work on them in parallel."""


def shuffle_documents(documents: Iterable[str], seed: int) -> Iterator[list[str]]:
    """Documents in pools of about POOL_CHARS characters, each pool in an order that the seed decides.

    A text that is one single document is cut into about twenty, so that a part can be held out.
    """
    pool: list[str] = []
    num_chars = num_pools = 0
    for document in documents:
        pool.append(document)
        num_chars += len(document)
        if num_chars >= POOL_CHARS:
            yield _shuffled(pool, f"{seed}/{num_pools}")
            pool, num_chars, num_pools = [], 0, num_pools + 1
    if len(pool) == 1 and num_pools == 0:
        pool = list(cut_text(pool[0], len(pool[0]) // 20 + 1))
    if pool:
        yield _shuffled(pool, f"{seed}/{num_pools}")


def held_out_first(pool: list[str]) -> list[str]:
    """The pool with documents longer than a tenth of it at the end: holding one out would cost too much training."""
    limit_chars = sum(map(len, pool)) / 10
    return sorted(pool, key=lambda document: len(document) > limit_chars)


def encode(tokenizer: Any, documents: Iterable[str], world: World | None = None) -> Iterator[array]:
    """Token ids of each document, ended by the tokenizer's end-of-text token (or begin, if it has no end).

    With a `world` each process tokenizes its share and all get the whole; all must have the same documents and take as
    many of what this yields.
    """
    world = world or World()
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    for batch in _batches(documents):
        pieces = [(number, piece) for number, document in enumerate(batch) for piece in cut_text(document, PIECE_CHARS)]
        shares = world.collect(_encode_pieces(tokenizer, world.share([piece for _, piece in pieces])))
        ids = [array("i") for _ in batch]
        for place, (number, _) in enumerate(pieces):
            ids[number].extend(shares[world.owner(place)][place // world.size])
        for document_ids in ids:
            if separator is not None:
                document_ids.append(separator)
            yield document_ids


def _encode_pieces(tokenizer: Any, pieces: list[str]) -> list[array]:
    if not pieces:
        return []
    # verbose=False: a document longer than the model's context is no mistake here.
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [array("i", ids) for ids in encoded]


def take_held_out(stream: Iterator[array], num_tokens: int, max_document_tokens: int) -> array:
    """The first documents of the stream, up to `num_tokens`; what exceeds the limit of a document is used nowhere."""
    held_out = array("i")
    while len(held_out) < num_tokens and (ids := next(stream, None)) is not None:
        held_out.extend(ids[: min(max_document_tokens, num_tokens - len(held_out))])
    return held_out


def take_train(stream: Iterator[array], max_tokens: int | None) -> array:
    """The rest of the stream, or its first `max_tokens`; no more is tokenized than needed."""
    train = array("i")
    while (max_tokens is None or len(train) < max_tokens) and (ids := next(stream, None)) is not None:
        train.extend(ids)
    return train if max_tokens is None else train[:max_tokens]


def start_with_documents(stream: Iterable[array], num_tokens: int) -> Iterator[array]:
    """Blocks of `num_tokens`, each beginning with a document; what of its last document does not fit is dropped."""
    block = array("i")
    for ids in stream:
        block.extend(ids[: num_tokens - len(block)])
        if len(block) == num_tokens:
            yield block
            block = array("i")


def seeded_order(num_items: int, key: str) -> list[int]:
    """A permutation that only the key decides."""
    # Only random() is promised to give the same numbers on every Python version.
    rng = random.Random(f"text/{key}")
    keys = [rng.random() for _ in range(num_items)]
    return sorted(range(num_items), key=keys.__getitem__)


def _shuffled(documents: Sequence[str], key: str) -> list[str]:
    return [documents[i] for i in seeded_order(len(documents), key)]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
