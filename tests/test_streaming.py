"""Text that is streamed: the same blocks whenever it is resumed, each document once an epoch, faults counted."""

from __future__ import annotations

import json
import lzma
from collections import Counter

import pytest
import torch
from tiny import CHEAP, byte_tokenizer, pico_teacher

from dtr.corpus import sources, stream_text
from dtr.corpus.faults import Faults
from dtr.distillation.trainer import distill
from dtr.errors import DataError

OPTIONS = {"seq_len_tokens": 16, "num_held_out_tokens": 64, "seed": 3, "pool_chars": 1500}


def documents(first: int, num: int) -> list[str]:
    """Texts that share no word."""
    return [" ".join(f"{n:03d}x{i:02d}" for i in range(20)) for n in range(first, first + num)]


@pytest.fixture
def folder(tmp_path):
    """Four files of three kinds with 48 documents, about five pools."""
    import pyarrow
    import pyarrow.parquet

    place = tmp_path / "text"
    place.mkdir()
    (place / "a.txt").write_text("\n<|doc|>\n".join(documents(0, 12)))
    (place / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(12, 12)))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents(24, 12)}), place / "c.parquet")
    with lzma.open(place / "d.jsonl.xz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in documents(36, 12)))
    return place


def open_text(folder, **changes):
    return stream_text(str(folder), tokenizer=byte_tokenizer(), **OPTIONS | changes)


def batches(text, steps, seed=3):
    return [text.batch(step, batch_size=5, seed=seed) for step in steps]


def words(blocks: torch.Tensor) -> list[str]:
    found = byte_tokenizer().decode(blocks.flatten().tolist()).replace("<eos>", " ").split()
    return [word for word in found if len(word) == 6]


def test_an_epoch_holds_every_document_once_but_those_held_out(folder):
    text = open_text(folder)
    held_out = {word[:3] for word in words(text.held_out)}
    assert text.held_out.shape == (4, 16)
    # 48 documents of 139 tokens with their end, less about four held out: 380 blocks, less what fills none.
    train = Counter(word for block in batches(text, range(70)) for row in block for word in words(row))
    assert not held_out & {word[:3] for word in train}
    assert max(train.values()) == 1
    assert len({word[:3] for word in train}) >= 40
    assert text.num_tokens == 70 * 5 * 16


@pytest.mark.parametrize("whole_bytes", [64_000_000, 64])
def test_a_file_that_was_changed_but_kept_its_size_is_another_text(folder, monkeypatch, whole_bytes):
    """A resumed run would go on with other text; large files are known by pieces of them."""
    monkeypatch.setattr(sources, "WHOLE_BYTES", whole_bytes)
    before, file = open_text(folder).fingerprint, folder / "b.jsonl"
    assert before == open_text(folder).fingerprint
    text = file.read_text()
    file.write_text(text[:-9] + ("a" if text[-9] != "a" else "b") + text[-8:])
    assert len(file.read_text()) == len(text)
    assert open_text(folder).fingerprint != before


def test_the_seed_decides_everything(folder):
    one, same, other = (torch.stack(batches(open_text(folder, seed=seed), range(9), seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert open_text(folder).fingerprint == open_text(folder).fingerprint != open_text(folder, seed=4).fingerprint


@pytest.mark.parametrize("stop_at", [1, 20, 77, 90])
def test_it_goes_on_at_the_exact_sample(folder, stop_at):
    """Through pools, and through the end of the epoch at about 76 steps."""
    whole = batches(open_text(folder), range(100))
    before = open_text(folder)
    batches(before, range(stop_at))
    position = json.loads(json.dumps(before.position()))
    after = open_text(folder)
    after.seek(position)
    rest = batches(after, range(stop_at, 100))
    assert all(torch.equal(a, b) for a, b in zip(whole[stop_at:], rest))
    # Going back is slower and gives the same.
    assert torch.equal(after.first(5), whole[0])


def test_a_stream_of_blocks_that_start_with_documents(folder):
    text = open_text(folder, whole_starts=True)
    starts = [words(row)[0] for block in batches(text, range(6)) for row in block]
    assert {start[3:] for start in starts} == {"x00"}


def test_faults_are_named_counted_and_passed_over(folder):
    (folder / "b.jsonl").write_text((folder / "b.jsonl").read_text() + '{"id": 7}\n{"text": "and on we go"}\n')
    packed = folder / "d.jsonl.xz"
    packed.write_bytes(packed.read_bytes()[:-40])
    (folder / "c.parquet").write_bytes(b"PAR1 and nothing more")
    events: list[dict] = []
    faults = Faults(events.append)
    text = open_text(folder, faults=faults)
    batches(text, range(100))
    assert faults.count == 3 == len(events)
    named = "\n".join(faults.named)
    assert "b.jsonl:13: a row with the fields id" in named
    assert "c.parquet" in named
    assert "d.jsonl.xz" in named
    assert [event["count"] for event in events] == [1, 2, 3]
    with pytest.raises(DataError):
        batches(open_text(folder), range(100))


def test_a_text_of_which_nothing_is_left_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"1 passed over, the first .*a\.jsonl:1"):
        open_text(tmp_path, faults=Faults())


def test_a_dataset_of_the_library(tmp_path):
    rows = [{"text": text, "id": n} for n, text in enumerate(documents(0, 30))]
    rows[17]["text"] = None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = Faults()
    text = open_text(f"hf:{tmp_path}", faults=faults)
    whole = batches(text, range(60))
    assert faults.count == 1
    assert "row 18" in faults.named[0]
    before = open_text(f"hf:{tmp_path}", faults=Faults())
    batches(before, range(30))
    after = open_text(f"hf:{tmp_path}", faults=Faults())
    after.seek(json.loads(json.dumps(before.position())))
    assert all(torch.equal(a, b) for a, b in zip(whole[30:], batches(after, range(30, 60))))
    with pytest.raises(DataError, match="no-such-folder"):
        open_text(f"hf:{tmp_path}/no-such-folder")


def test_distillation_on_a_stream_resumes_to_the_same_bits(folder, tmp_path):
    settings = {"num_tokens": 16 * 4 * 20, "batch_size": 4, "options": CHEAP, "seed": 3, "checkpoint_every_steps": 7}
    whole = distill(pico_teacher(), open_text(folder), **settings)

    def stop(event):
        if event["event"] == "distill" and event["step"] == 10:
            raise KeyError("stopped")

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(KeyError, match="stopped"):
        distill(pico_teacher(), open_text(folder), checkpoint=checkpoint, on_event=stop, **settings)
    resumed = distill(pico_teacher(), open_text(folder), checkpoint=checkpoint, **settings)
    assert resumed.fingerprint == whole.fingerprint
