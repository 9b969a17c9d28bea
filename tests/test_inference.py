"""The fast path says what the library's own generation says: every family, mixer and layout, padded and sampled."""

from __future__ import annotations

import pytest
import torch
from test_hybrid import hybrid_of
from tiny import pico_model, pico_teacher

from dtr.arch import FAMILIES
from dtr.errors import ModelError
from dtr.inference.decoder import Decoder
from dtr.inference.generate import fast_generate
from dtr.mixers import MIXERS

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def padded():
    """Three prompts of 9, 4 and 7 tokens, padded on the left."""
    ids, mask = torch.randint(1, 257, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    for row, num_padding in ((1, 5), (2, 2)):
        ids[row, :num_padding], mask[row, :num_padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("layers", [(), (0, 2), (0, 1, 2, 3)], ids=["teacher", "mixed", "all"])
def test_decoder_gives_the_tokens_of_generate(family, layers, padded):
    model = hybrid_of(pico_teacher(family), layers)
    decoder = Decoder(model, batch_size=3, capacity_tokens=16)
    decoder.prefill(padded["input_ids"], padded["attention_mask"])
    want = model.generate(**padded, **GREEDY, max_new_tokens=8)[:, 9:]
    assert torch.equal(decoder.greedy(8), want)
    # Another prompt in the same decoder begins afresh.
    ids = torch.randint(1, 257, (3, 5))
    decoder.prefill(ids)
    assert torch.equal(decoder.greedy(6), model.generate(ids, **GREEDY, max_new_tokens=6)[:, 5:])


@pytest.mark.parametrize("kind", sorted(MIXERS))
@torch.no_grad()
def test_every_mixer_keeps_its_logits(kind, padded):
    model = hybrid_of(pico_teacher(), (0, 2), kind)
    decoder = Decoder(model, batch_size=3, capacity_tokens=12)
    logits = [decoder.prefill(padded["input_ids"], padded["attention_mask"])]
    more = torch.randint(1, 257, (3, 3))
    logits += [decoder.decode(token).clone() for token in more.unbind(1)]
    mask = torch.cat([padded["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.cat([padded["input_ids"], more], dim=1)
    full = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(torch.stack(logits, dim=1), full[:, 8:], rtol=1e-4, atol=1e-4)


def test_a_prompt_in_parts_is_the_prompt_whole(monkeypatch, padded):
    model = hybrid_of(pico_teacher(), (0, 2))
    want = Decoder(model, batch_size=3, capacity_tokens=16).prefill(**rename(padded))
    monkeypatch.setattr("dtr.inference.decoder.PREFILL_TOKENS", 18)
    decoder = Decoder(model, batch_size=3, capacity_tokens=16)
    torch.testing.assert_close(decoder.prefill(**rename(padded)), want, rtol=1e-5, atol=1e-5)


def rename(padded):
    return {"ids_BT": padded["input_ids"], "attention_mask": padded["attention_mask"]}


def test_fast_generate_is_generate(padded):
    model = hybrid_of(pico_teacher(), (0, 2))
    # A token that greedy decoding soon meets ends one text before the others.
    eos = int(model.generate(**padded, **GREEDY, max_new_tokens=4)[1, -1])
    for options in (
        {**GREEDY, "max_new_tokens": 8},
        {"do_sample": False, "eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": 20},
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "eos_token_id": eos, "pad_token_id": 0,
         "max_new_tokens": 8},
        {**GREEDY, "max_new_tokens": 8, "repetition_penalty": 1.7},
    ):  # fmt: skip
        torch.manual_seed(3)
        want = model.generate(**padded, **options)
        torch.manual_seed(3)
        assert torch.equal(fast_generate(model, **padded, **options), want), options


def test_cache_bytes_agree_with_the_plain_cache(padded):
    model = hybrid_of(pico_teacher(), (0, 2))
    decoder = Decoder(model, batch_size=3, capacity_tokens=16)
    decoder.prefill(padded["input_ids"])
    plain = model(padded["input_ids"], use_cache=True).past_key_values
    assert decoder.cache_bytes() == plain.num_bytes()


def test_misuse_is_told(padded):
    model = hybrid_of(pico_teacher(), (0, 2))
    decoder = Decoder(model, batch_size=3, capacity_tokens=10)
    with pytest.raises(ModelError, match="2 sequences of 9 tokens"):
        decoder.prefill(padded["input_ids"][:2])
    with pytest.raises(ModelError, match="padding on the left"):
        decoder.prefill(padded["input_ids"], padded["attention_mask"].flip(1))
    decoder.prefill(**rename(padded))
    decoder.decode()
    with pytest.raises(ModelError, match="10 that fit"):
        decoder.decode()
    with pytest.raises(ModelError, match="window of 8"):
        Decoder(pico_model("mistral", sliding_window=8), batch_size=1, capacity_tokens=16)
    with pytest.raises(ModelError, match="num_beams"):
        fast_generate(model, **padded, num_beams=2, max_new_tokens=2)
