"""What would fail after distillation is told before it: tokenizers, templates, items and sizes that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import byte_tokenizer, pico_teacher, token_blocks

import dtr
from dtr.corpus import TokenBlocks
from dtr.errors import DataError, DeviceError, RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.mixers import MIXERS, check_mixer, options_of
from dtr.pipeline.costs import memory_advice
from dtr.pipeline.preparation import check_training
from dtr.pipeline.tryout import try_task, try_text
from dtr.recipe import read_recipe
from dtr.selection.settings import SearchSettings


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher()


@pytest.fixture
def writing(tmp_path):
    """A task that is asked by generation, with prompts of several lengths."""
    for split in ("validation", "test"):
        rows = [{"prompt": f"{split} {n} " + "river " * n, "answer": "river"} for n in range(1, 4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **settings: dtr.load_task(str(tmp_path), options={"max_new_tokens": 3}, **settings)


def with_tokenizer(teacher, **changes):
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return replace(teacher, tokenizer=tokenizer)


def test_padding_needs_no_token_of_its_own(teacher, writing):
    task, expected = writing(), None
    for changes in ({}, {"pad_token": "<pad>"}, {"pad_token": None}, {"pad_token": None, "eos_token": None}):
        other = with_tokenizer(teacher)
        if changes.get("pad_token"):
            other.tokenizer.add_special_tokens(changes)
            assert other.tokenizer.pad_token_id >= teacher.model.config.vocab_size
        else:
            other = with_tokenizer(teacher, **changes)
        try_task(other, task, batch_tokens=4096)
        score = evaluate(other, task, split="validation")
        expected = expected or score
        assert score == expected


def refused(teacher, task, error=DataError):
    with pytest.raises(error) as caught:
        try_task(teacher, task, batch_tokens=4096)
    return str(caught.value)


def test_chat_templates_that_are_none(teacher, writing):
    task = writing(chat_template=True)
    assert "task.chat_template: got true, but this tokenizer has no chat template" in refused(teacher, task)
    broken = with_tokenizer(teacher, chat_template="{{ raise_exception('no user turns') }}")
    assert "no user turns" in refused(broken, task)
    assert "TemplateSyntaxError" in refused(with_tokenizer(teacher, chat_template="{% if %}"), task)


def test_items_that_no_model_of_this_size_can_take(teacher, writing):
    short = pico_teacher(max_position_embeddings=16)
    assert "at most the model's 16 positions" in refused(short, writing())
    small = pico_teacher(vocab_size=40)
    assert "expected tokens below 40, the size of the model's vocabulary" in refused(small, writing())
    blocks = token_blocks()
    try_text(blocks, teacher)
    for train, held_out in ((blocks.train + 200, blocks.held_out), (blocks.train, blocks.held_out + 200)):
        text = TokenBlocks.from_tensors(train, held_out, source="a.txt")
        with pytest.raises(DataError, match=r"text a\.txt: got token \d+ of the tokenizer; expected tokens below 257"):
            try_text(text, teacher)


def test_text_without_anything_between_its_documents(teacher):
    with pytest.warns(UserWarning, match="neither an end nor a start token"):
        try_text(token_blocks(), with_tokenizer(teacher, eos_token=None, pad_token=None))


def test_a_metric_that_fails_is_told_with_its_error(teacher, writing, monkeypatch):
    task = writing()
    monkeypatch.setattr(type(task), "grade", lambda *_: {}["reference"])
    assert "validation: got KeyError: 'reference'; expected items that can be asked and graded" in refused(
        teacher, task
    )


SIZES = {
    "distill.batch_size": ["distill.batch_size=65536", "distill.seq_len_tokens=1048576"],
    "mixer.options": ["mixer.options.head_copies=100000000"],
    "distill.layers": ["distill.layers=[4]"],
}


@pytest.mark.filterwarnings("ignore:distill.seq_len_tokens")
@pytest.mark.parametrize("field", SIZES)
def test_sizes_beyond_the_machine(field, teacher):
    recipe = read_recipe(None, SIZES[field], {"teacher": {"source": "x"}})
    with pytest.raises(RecipeError, match=rf"^{field}: got .*expected"):
        check_training(recipe, teacher)


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_options_of_mixers_are_of_the_type_that_is_named(kind, teacher):
    for name in options_of(MIXERS[kind]):
        is_flag = name in ("exact_first", "quadratic")
        for value in (1 if is_flag else True, -1, 10**12, float("nan"), float("inf"), "x", None, [1]):
            with pytest.raises(RecipeError, match=rf"mixer\.options\.{name}: got "):
                check_mixer(kind, teacher.geometry, {name: value})


def test_a_cache_that_no_hybrid_fits_into(teacher):
    recipe = read_recipe(None, [], {"teacher": {"source": "x"}})
    with pytest.raises(RecipeError, match=r"search\.max_cache_bytes: got 10 bytes at 2,048 tokens; expected at least"):
        check_training(recipe, teacher, SearchSettings(max_cache_bytes=10))
    with pytest.warns(UserWarning, match="the teacher was made for 512 positions"):
        check_training(read_recipe(None, ["distill.seq_len_tokens=1024"], {"teacher": {"source": "x"}}), teacher)


def test_a_processor_without_the_memory_is_told_like_a_gpu():
    with pytest.raises(DeviceError, match=r"Lower distill\.batch_size"), memory_advice("distill.batch_size"):
        torch.empty(10**15)
    with pytest.raises(RuntimeError, match="shape"), memory_advice("distill.batch_size"):
        torch.ones(2).view(3)
