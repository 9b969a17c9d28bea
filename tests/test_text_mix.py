"""Several texts as one, the task's own training prompts, and text that the teacher writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, pico_teacher, token_blocks

from dtr.corpus import TokenBlocks, stream_text
from dtr.corpus.mixing import MixedBlocks, Part
from dtr.corpus.writing import draw, write_documents
from dtr.distillation.trainer import distill
from dtr.errors import DataError, RecipeError
from dtr.pipeline import distill_only
from dtr.pipeline.preparation import check_text, prepare_text
from dtr.recipe import read_recipe
from dtr.tasks import load_task
from dtr.tasks.training import training_prompts


def blocks(value: int, num: int, length: int = 8) -> TokenBlocks:
    """Blocks whose first token says which text they are of, and the second which block."""
    ids = torch.full((num, length), value, dtype=torch.int32)
    ids[:, 1] = torch.arange(num)
    return TokenBlocks.from_tensors(ids, ids[:1], source=str(value))


def mixed(*sizes: tuple[float, int]) -> MixedBlocks:
    return MixedBlocks(
        parts=[Part(name=str(n), share=share, text=blocks(n, num)) for n, (share, num) in enumerate(sizes)]
    )


def test_every_batch_is_close_to_the_shares_and_no_block_is_skipped():
    text = mixed((0.5, 300), (0.3, 7), (0.2, 40))
    taken = torch.cat([text.batch(step, batch_size=10, seed=1) for step in range(60)])
    counts = torch.stack([torch.bincount(batch[:, 0], minlength=3) for batch in taken.split(10)])
    assert (counts.sum(0) - torch.tensor([300, 180, 120])).abs().max() <= 2
    assert (counts - torch.tensor([5, 3, 2])).abs().max() <= 1
    # An epoch of each text holds each of its blocks once, whatever the batches.
    for value, size in ((0, 300), (1, 7), (2, 40)):
        numbers = taken[taken[:, 0] == value][:, 1].tolist()
        for epoch in range(len(numbers) // size):
            assert sorted(numbers[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert value == 0 or numbers[:size] != numbers[size : 2 * size]


def test_a_batch_of_a_mix_depends_on_its_step_alone():
    first, second = mixed((0.6, 30), (0.4, 5)), mixed((0.6, 30), (0.4, 5))
    assert torch.equal(
        torch.cat([first.batch(s, batch_size=3, seed=0) for s in range(8)]),
        torch.cat([second.batch(s, batch_size=6, seed=0) for s in range(4)]),
    )
    assert torch.equal(first.batch(7, batch_size=3, seed=0), second.batch(7, batch_size=3, seed=0))
    assert first.fingerprint == second.fingerprint != mixed((0.5, 30), (0.5, 5)).fingerprint
    assert torch.equal(first.held_out, blocks(0, 1).held_out)


def test_a_distillation_on_a_mix_resumes_to_the_same_bits(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "ab":
        words = [f"{name}{n:02d} " * 30 for n in range(20)]
        (tmp_path / "text" / f"{name}.txt").write_text("\n<|doc|>\n".join(words))

    def text() -> MixedBlocks:
        options = {"tokenizer": byte_tokenizer(), "seq_len_tokens": 32, "num_held_out_tokens": 64, "seed": 2}
        streamed = stream_text(str(tmp_path / "text"), **options, pool_chars=800)
        return MixedBlocks(
            parts=[Part(name="a", share=0.5, text=streamed), Part(name="b", share=0.5, text=token_blocks())]
        )

    settings = {"num_tokens": 12 * 4 * 32, "batch_size": 4, "learning_rate": 5e-3, "seed": 2, "layers": [1]}
    whole = distill(pico_teacher(), text(), **settings)

    def stop(event):
        if event["event"] == "distill" and event["step"] >= 8:
            raise KeyboardInterrupt

    state = {"checkpoint": tmp_path / "state.safetensors", "checkpoint_every_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        distill(pico_teacher(), text(), **settings, **state, on_event=stop)
    assert distill(pico_teacher(), text(), **settings, **state).fingerprint == whole.fingerprint


@pytest.fixture
def task(tmp_path):
    """Rows of three splits; one training row is a copy of a test row."""

    def row(n: int) -> dict:
        return {"question": f"what is number {n}", "choices": [f"one {n}", f"two {n}", f"three {n}"], "answer": n % 3}

    folder = tmp_path / "task"
    folder.mkdir()
    for split, numbers in (("train", [*range(40), 100]), ("validation", range(50, 60)), ("test", range(95, 105))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in numbers))
    return folder


def test_training_prompts_are_as_the_task_shows_them_and_never_of_test(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_task(str(task))
        prompts = training_prompts(str(task), seen=[loaded])
    assert len(prompts) == 40
    assert prompts[4].context + prompts[4].target == "Question: what is number 4\nAnswer: two 4"
    held_back = {item.requests[item.row["answer"]] for split in loaded.splits.values() for item in split}
    assert not held_back & set(prompts)
    # Validation cut from the train split stays out too.
    settings = {"validation": "train[0:15]", "test": "test"}
    rest = training_prompts(str(task), seen=[load_task(str(task), **settings)], **settings)
    assert rest == prompts[15:]


@pytest.mark.parametrize(
    ("kind", "row", "text"),
    [
        ("generation", {"prompt": "2 + 2 =", "answer": "4"}, "2 + 2 = 4"),
        ("classification", {"text": "fine", "label": 0, "label_text": "good"}, "fine\nCategory: good"),
        ("perplexity", {"text": "some words"}, "some words"),
    ],
)
def test_training_prompts_of_other_kinds(kind, row, text, tmp_path):
    other = {"label": 1, "label_text": "bad"} if kind == "classification" else {}
    for split in ("train", "validation", "test"):
        rows = [row | {key: f"{split} {n} {row[key]}" for key in ("prompt", "text") if key in row} for n in range(3)]
        rows[1] |= other
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in [*rows, row][: 3 + (split == "train")])
        )
    prompts = training_prompts(str(tmp_path), kind=kind, seen=[load_task(str(tmp_path), kind=kind)])
    assert prompts[-1].context + prompts[-1].target == text


def test_built_in_tasks_make_training_items_of_their_own():
    prompts = training_prompts("recall", seen=[load_task("recall", seed=4)], seed=4)
    assert len(prompts) == 1024
    assert all(prompt.target for prompt in prompts)


def test_a_task_without_training_rows_is_refused(task):
    (task / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"text.mix: got 'task', but .* has no rows to train on .* a split 'train'"):
        training_prompts(str(task), seen=[load_task(str(task))])


def recipe_of(tmp_path, task, **text):
    (tmp_path / "text.txt").write_text("\n<|doc|>\n".join(f"word{n} " * 40 for n in range(30)))
    base = {
        "teacher": {"source": "pico"},
        "text": {"source": str(tmp_path / "text.txt"), "num_held_out_tokens": 512, **text},
        "distill": {"num_tokens": 4096, "seq_len_tokens": 64, "batch_size": 4},
        "task": {"source": str(task)},
    }
    return read_recipe(None, base=base)


def test_a_recipe_mixes_text_files_and_the_task(tmp_path, task):
    extra = tmp_path / "extra.jsonl"
    extra.write_text("".join(json.dumps({"text": f"extra{n} " * 30} if n else {"txt": ""}) + "\n" for n in range(20)))
    recipe = recipe_of(tmp_path, task, mix={"task": 0.25, str(extra): 0.25})
    text, faults = prepare_text(recipe, pico_teacher(), lambda event: None)
    assert [round(part.share, 6) for part in text.parts] == [0.5, 0.25, 0.25]
    assert {name: fault.count for name, fault in faults.items()} == {recipe.text.source: 0, "task": 0, str(extra): 1}
    rows = ["".join(byte_tokenizer().decode(row.tolist())) for row in text.batch(0, batch_size=16, seed=0)]
    kinds = [next(kind for kind in ("extra", "number", "word") if kind in row) for row in rows]
    assert [kinds.count(kind) for kind in ("word", "number", "extra")] == [9, 4, 3]
    # The same error is measured with and without the mix.
    alone, _ = prepare_text(recipe_of(tmp_path, task), pico_teacher(), lambda event: None)
    assert torch.equal(alone.held_out, text.held_out)


def test_mixes_that_cannot_be_meant_are_refused(tmp_path, task):
    with pytest.raises(RecipeError, match=r"text.mix: got .* less than 1 together"):
        recipe_of(tmp_path, task, mix={"task": 0.6, "python-docs": 0.5})
    with pytest.raises(RecipeError, match=r"text.mix.task"):
        recipe_of(tmp_path, task, mix={"task": 0})
    recipe = recipe_of(tmp_path, task, mix={str(tmp_path / "text.txt"): 0.5})
    with pytest.raises(DataError, match="without a common file"):
        check_text(recipe)


def test_the_teacher_writes_text_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DTR_CACHE", str(tmp_path))
    events = []
    options = {"num_tokens": 400, "seq_len_tokens": 20, "batch_size": 8, "seed": 3, "on_event": events.append}
    files = [Path(file) for file in write_documents(pico_teacher(), **options)]
    assert len(files) == 3
    assert events[-1] == {"event": "written", "num_tokens": 480, "total_tokens": 480}
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    assert len(set(texts)) == 24
    assert all(text.startswith("<eos>") for text in texts)
    before = [file.read_bytes() for file in files]
    # One lost batch is written again to the same bytes, the others are left as they are.
    files[1].unlink()
    assert write_documents(pico_teacher(), **options) == list(map(str, files))
    assert [file.read_bytes() for file in files] == before
    assert write_documents(pico_teacher(), **options | {"num_tokens": 100}) == [str(files[0])]
    assert write_documents(pico_teacher(), **options | {"num_tokens": 1, "seed": 4}) != [str(files[0])]


def test_draws_follow_the_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(logits, 0.7, generator).flatten(), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)
    counts = torch.bincount(draw(logits, 1.0, generator).flatten(), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    assert draw(logits[:1], 0.01, generator).item() == 0


def test_a_run_without_any_text(place, tmp_path, monkeypatch):
    monkeypatch.setenv("DTR_CACHE", str(tmp_path / "cache"))
    settings = ["text.source=teacher", "text.mix.recall=0.2"]
    with pytest.raises(DataError, match="recall"):
        distill_only(read_recipe(place / "recipe.yaml", settings), tmp_path / "refused")
    writing = ["text.writing.num_tokens=3000", "text.writing.batch_size=8", "distill.num_tokens=2048"]
    events = []
    bank = distill_only(
        read_recipe(place / "recipe.yaml", [settings[0], *writing]), tmp_path / "run", on_event=events.append
    )
    assert bank.mean_nmse < sum(bank.nmse_before.values()) / len(bank.nmse_before)
    assert any(event["event"] == "written" for event in events)
