"""Token blocks: packing, the split by documents, the order of training, and what `load_text` refuses."""

from __future__ import annotations

import logging
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dtr.corpus import TokenBlocks, load_text
from dtr.corpus.cutting import cut_text
from dtr.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, an end-of-text token, and a context that every document here exceeds."""
    made = byte_tokenizer()
    made.model_max_length = 64
    return made


def documents(num: int, length: int = 30) -> list[str]:
    """Texts that share no word."""
    return [" ".join(f"{n:03d}x{i:02d}" for i in range(length)) for n in range(num)]


def write(path: Path, docs: list[str]) -> str:
    path.write_text("\n<|doc|>\n".join(docs) + "\n", encoding="utf-8")
    return str(path)


def words(blocks: torch.Tensor, tokenizer) -> list[str]:
    """Whole words in the stream of blocks."""
    text = tokenizer.decode(blocks.flatten().tolist()).replace("<eos>", " ")
    return [word for word in text.split() if len(word) == 6]


def test_documents_are_joined_with_an_end_token_and_cut_into_blocks(tmp_path, tokenizer):
    docs = documents(20)
    source = write(tmp_path / "a.txt", docs)
    blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=64)
    assert blocks.train.dtype == blocks.held_out.dtype == torch.int32
    assert blocks.held_out.shape == (4, 16)
    assert blocks.train.shape[1] == blocks.seq_len_tokens == 16
    assert blocks.num_tokens == blocks.train.numel()
    assert blocks.source == source
    text = tokenizer.decode(blocks.train.flatten().tolist())
    first = text.split("<eos>")[0]
    assert first in docs
    # Every document but the held-out ones, to less than a block.
    whole = [part for part in text.split("<eos>") if part in docs]
    assert len(whole) == len(set(whole)) >= 15
    assert (blocks.train == tokenizer.eos_token_id).sum() >= 15


def test_blocks_that_start_with_documents(tmp_path, tokenizer):
    docs = [*documents(20, length=5), *documents(40, length=30)[20:]]
    options = {"tokenizer": tokenizer, "seq_len_tokens": 64, "num_held_out_tokens": 64}
    blocks = load_text(write(tmp_path / "a.txt", docs), **options, whole_starts=True)
    parts = [tokenizer.decode(row.tolist()).split("<eos>") for row in blocks.train]
    assert all(row[0] in docs or any(doc.startswith(row[0]) for doc in docs) for row in parts)
    # Short documents follow each other within a block, each whole but the last.
    assert all(part in docs for row in parts for part in row[:-1])
    assert max(len(row) for row in parts) >= 2
    packed = load_text(write(tmp_path / "a.txt", docs), **options)
    assert torch.equal(packed.held_out, blocks.held_out)
    assert len(blocks.train) < len(packed.train)


def test_no_held_out_document_is_in_train(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", documents(40))
    blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=256)
    train = {word[:3] for word in words(blocks.train, tokenizer)}
    held_out = {word[:3] for word in words(blocks.held_out, tokenizer)}
    assert not train & held_out
    # At most an eighth of the held-out tokens from one document.
    assert len(held_out) >= 8
    assert max(Counter(word[:3] for word in words(blocks.held_out, tokenizer)).values()) <= 32 / 6


def test_the_seed_decides_the_order_and_the_split(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", documents(40))
    one, two, other = (
        load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=64, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.train, two.train)
    assert one.fingerprint == two.fingerprint
    assert len(one.fingerprint) == 16
    assert one.fingerprint != other.fingerprint
    assert not torch.equal(one.held_out, other.held_out)


def test_the_fingerprint_is_that_of_the_tokens():
    train, held_out = torch.arange(32, dtype=torch.int32).view(4, 8), torch.zeros(1, 8, dtype=torch.int32)
    base = TokenBlocks.from_tensors(train, held_out, source="a").fingerprint
    assert TokenBlocks.from_tensors(train.clone(), held_out, source="b").fingerprint == base
    changed = train.clone()
    changed[3, 7] += 1
    others = {
        TokenBlocks.from_tensors(changed, held_out, source="a").fingerprint,
        TokenBlocks.from_tensors(train, held_out + 1, source="a").fingerprint,
        TokenBlocks.from_tensors(train.view(2, 16), held_out.repeat(1, 2), source="a").fingerprint,
    }
    assert base not in others
    assert len(others) == 3


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 25])
def test_batches_go_through_all_blocks_in_a_new_order_each_epoch(batch_size):
    train = torch.arange(10, dtype=torch.int32).view(10, 1).repeat(1, 4)
    blocks = TokenBlocks.from_tensors(train, train[:1], source="x")
    batches = list(islice(blocks.batches(batch_size, seed=3), 30))
    assert all(batch.shape == (batch_size, 4) and batch.dtype == torch.int64 for batch in batches)
    stream = torch.cat(batches)[:, 0].tolist()
    epochs = [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_nothing_but_step_size_and_seed():
    train = torch.arange(50, dtype=torch.int32).view(50, 1)
    blocks = TokenBlocks.from_tensors(train, train[:1], source="x")
    whole = list(islice(blocks.batches(8, seed=1), 20))
    rest = list(islice(blocks.batches(8, seed=1, start_step=13), 7))
    assert all(torch.equal(a, b) for a, b in zip(whole[13:], rest))
    assert torch.equal(whole[19], blocks.batch(19, batch_size=8, seed=1))
    assert not torch.equal(whole[0], blocks.batch(0, batch_size=8, seed=2))


def test_max_tokens_gives_a_beginning_of_the_whole_and_tokenizes_no_more(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dtr.corpus.packing.BATCH_CHARS", 500)
    source = write(tmp_path / "a.txt", documents(100))
    seen = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **settings):
            seen.extend(texts)
            return tokenizer(texts, **settings)

    settings = {"seq_len_tokens": 16, "num_held_out_tokens": 64}
    some = load_text(source, tokenizer=Counting(), max_tokens=1000, **settings)
    assert some.train.shape == (62, 16)
    assert sum(map(len, seen)) < 3000
    whole = load_text(source, tokenizer=tokenizer, **settings)
    assert torch.equal(whole.train[:62], some.train)
    assert torch.equal(whole.held_out, some.held_out)
    assert load_text(source, tokenizer=tokenizer, max_tokens=1, **settings).train.shape == (1, 16)


def test_text_beyond_one_pool_is_shuffled_in_pools_and_kept_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dtr.corpus.packing.POOL_CHARS", 2000)
    source = write(tmp_path / "a.txt", documents(60))
    blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=8, num_held_out_tokens=8)
    order = list(dict.fromkeys(word[:3] for word in words(blocks.train, tokenizer)))
    assert len(order) >= 58
    assert order != sorted(order)
    assert max(map(int, order[:8])) < 12


def test_one_giant_document_is_not_spent_on_the_held_out_tokens(tmp_path, tokenizer):
    docs = [*documents(30), " ".join(["giant"] * 5000)]
    source = write(tmp_path / "a.txt", docs)
    for seed in range(20):
        blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=256, seed=seed)
        assert "giant" not in tokenizer.decode(blocks.held_out.flatten().tolist())
        assert blocks.num_tokens > 30_000


def test_a_single_document_is_divided(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [])
    text = " ".join(f"{n:06d}" for n in range(500))
    Path(source).write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
    blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=64)
    assert blocks.num_tokens > 2500
    assert not set(words(blocks.train, tokenizer)) & set(words(blocks.held_out, tokenizer))


def test_long_documents_neither_warn_nor_lose_text(tmp_path, caplog):
    # A tokenizer warns but once, so this one is new.
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 64
    text = " ".join(random.Random(0).choice(["one", "two\n", "three\n\n"]) for _ in range(20_000))
    source = write(tmp_path / "a.txt", [text, "short one here"])
    # That logger does not pass its records on.
    logging.getLogger("transformers").addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=8, num_held_out_tokens=8)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
    decoded = tokenizer.decode(blocks.train.flatten().tolist())
    assert text.strip().startswith(decoded.split("<eos>")[0][:-1])
    assert len(decoded) > len(text) - 16


def test_tokenizers_without_an_end_token(tmp_path):
    vocab = {"[UNK]": 0, **{f"{n:03d}x00": n + 1 for n in range(40)}}
    core = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    source = write(tmp_path / "a.txt", documents(40, length=1))
    settings = {"seq_len_tokens": 1, "num_held_out_tokens": 4}
    bare = load_text(source, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core), **settings)
    assert sorted([*bare.train.flatten().tolist(), *bare.held_out.flatten().tolist()]) == list(range(1, 41))
    begin = load_text(source, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"), **settings)
    assert (begin.train == 41).sum() == begin.train.shape[0] / 2


@pytest.mark.parametrize("max_chars", [1, 7, 50, 10_000])
def test_cut_text_joins_again(max_chars):
    rng = random.Random(0)
    text = "".join(rng.choice(["word", "long" * 9, " ", "\n", "\n\n", "  "]) for _ in range(500))
    pieces = list(cut_text(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


def test_cut_text_cuts_before_white_space_and_prefers_paragraphs():
    assert list(cut_text("aaaa bbbb\n\ncc dd ee", 16)) == ["aaaa bbbb", "\n\ncc dd ee"]
    assert list(cut_text("aaaa bbbb cccc", 10)) == ["aaaa bbbb", " cccc"]
    assert list(cut_text("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(cut_text("", 3)) == []


def test_too_little_text_names_what_there_is(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", documents(3, length=2))
    with pytest.raises(
        DataError, match=r"a\.txt: got text of 42 tokens; expected 64 tokens to hold out and 16 or more"
    ):
        load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=64)
    with pytest.raises(DataError, match="text of 42 tokens; expected 40 tokens to hold out and 8"):
        load_text(source, tokenizer=tokenizer, seq_len_tokens=8, num_held_out_tokens=40)
    (tmp_path / "empty.txt").write_text(" \n<|doc|>\n \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.txt: got no text"):
        load_text(str(tmp_path / "empty.txt"), tokenizer=tokenizer, seq_len_tokens=8, num_held_out_tokens=8)


def test_few_documents_of_very_different_length_still_give_both_parts(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", ["x " * 600, "y " * 600, *"abcdefgh"])
    blocks = load_text(source, tokenizer=tokenizer, seq_len_tokens=16, num_held_out_tokens=1024)
    text = [tokenizer.decode(part.flatten().tolist()) for part in (blocks.train, blocks.held_out)]
    assert {letter for part in text for letter in part if letter in "xy"} == {"x", "y"}
    assert not any("x" in part and "y" in part for part in text)


def test_python_docs_are_a_source(tokenizer, monkeypatch):
    monkeypatch.setattr("dtr.corpus.python_docs.read_documents", lambda: iter(documents(20)))
    blocks = load_text("python-docs", tokenizer=tokenizer, seq_len_tokens=64, num_held_out_tokens=512, max_tokens=640)
    assert blocks.train.shape == (10, 64)
    assert blocks.source == "python-docs"
