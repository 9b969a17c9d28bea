"""Fingerprints: what decides a result counts, all of it, and nothing else does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import byte_tokenizer, pico_model, pico_teacher, token_blocks

import dtr
from dtr.distillation.bank import check_same_teacher
from dtr.errors import BankError
from dtr.identity import earlier_fingerprint, is_same_model, model_fingerprint, tokenizer_fingerprint


def touch(name, place):
    def change(model):
        weight = dict(model.named_parameters())[name]
        with torch.no_grad():
            weight[place] += 1e-6

    return change


def set_field(name, value):
    return lambda model: setattr(model.config, name, value)


def set_rope(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 12345.0}


COUNTS = {
    "the last weight of an embedding": touch("model.embed_tokens.weight", (256, 31)),
    "a norm": touch("model.layers.2.input_layernorm.weight", (17,)),
    "a projection": touch("model.layers.3.self_attn.o_proj.weight", (30, 63)),
    "rotary positions": set_rope,
    "the activation": set_field("hidden_act", "gelu"),
    "the epsilon of norms": set_field("rms_norm_eps", 1e-3),
}
COUNTS_NOT = {
    "a new field": set_field("a_default_of_a_newer_release", None),
    "the cache": set_field("use_cache", False),
    "where it lies": set_field("_name_or_path", "elsewhere"),
    "a start value of training": set_field("initializer_range", 0.5),
    "a token's number": set_field("bos_token_id", 3),
}


@pytest.mark.parametrize("case", [*COUNTS, *COUNTS_NOT])
def test_what_counts(case):
    model = pico_model()
    before = model_fingerprint(model)
    (COUNTS | COUNTS_NOT)[case](model)
    assert is_same_model(before, model_fingerprint(model)) == (case in COUNTS_NOT)


def test_the_precision_of_loading_does_not_count():
    model = pico_model()
    fine, coarse = model_fingerprint(model), model_fingerprint(model.bfloat16())
    assert fine != coarse
    assert is_same_model(fine, coarse)
    # From a checkpoint in bfloat16 nothing is finer.
    assert model_fingerprint(model.float()) == coarse
    touch("model.norm.weight", (3,))(other := pico_model())
    assert is_same_model(coarse, model_fingerprint(other))
    assert not is_same_model(fine, model_fingerprint(other))


def test_banks_of_earlier_releases_are_known_or_told():
    teacher = pico_teacher()
    earlier = earlier_fingerprint(teacher.model)
    assert len(earlier) == 16
    check_same_teacher(earlier, teacher, where="bank")
    teacher.model.config.use_cache = False
    with pytest.raises(BankError, match=r"as earlier releases put it.*distil again.*upgrade of transformers"):
        check_same_teacher(earlier, teacher, where="bank")
    with pytest.raises(BankError, match="Give the teacher that the bank was made from"):
        check_same_teacher("w2-0123456789abcdef", teacher, where="bank")


def test_large_weights_are_hashed_in_blocks(monkeypatch):
    model = pico_model()
    monkeypatch.setattr("dtr.identity.BLOCK_BYTES", 1 << 10)
    blocks = model_fingerprint(model)
    assert blocks == model_fingerprint(model)
    touch("model.embed_tokens.weight", (256, 31))(model)
    assert blocks != model_fingerprint(model)


def test_a_tokenizer_is_known_by_what_it_does():
    first, same, other = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    same(["a", "bcd"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(same)
    other.add_tokens(["<more>"])
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(other)
    same.chat_template = "{{ messages[0].content }}"
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(same)


def test_copies_for_evaluation_are_made_once():
    bank = dtr.distill(pico_teacher(num_layers=1), token_blocks(), num_tokens=64, batch_size=1)
    first = bank.in_dtype(torch.float32)
    assert all(bank.in_dtype(torch.float32)[i] is mixer for i, mixer in first.items())
    assert first[0] is not bank.mixers[0]
    with torch.no_grad():
        next(bank.mixers[0].parameters()).add_(1.0)
    now = bank.in_dtype(torch.float32)[0]
    assert now is not first[0]
    assert torch.equal(next(now.parameters()), next(bank.mixers[0].parameters()))
    assert dataclasses.replace(bank).in_dtype(torch.float32)[0] is not bank.mixers[0]
