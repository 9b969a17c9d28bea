"""The fast path says what the library's own generation says: every family, mixer and layout, padded and sampled."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from test_hybrid import hybrid_of
from tiny import pico_model, pico_teacher

from dtr.arch import FAMILIES, decoder_layers, read_geometry
from dtr.errors import ModelError
from dtr.hybrid.modeling import make_hybrid
from dtr.inference.blocks import AttentionBlock, DeltaBlock, MixerBlock
from dtr.inference.decoder import Decoder
from dtr.inference.generate import fast_generate
from dtr.inference.prompt_graphs import PromptGraphs, padded_length
from dtr.mixers import MIXERS, mixer_from_teacher
from dtr.mixers.base import set_backend
from dtr.ops.decoding import delta_tokens
from dtr.ops.projections import Norm

LINEAR = [kind for kind in sorted(MIXERS) if MIXERS[kind].is_pure_linear]
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


@pytest.mark.parametrize("kind", LINEAR)
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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layers", [(), (0, 2), (0, 1, 2, 3)], ids=["teacher", "mixed", "all"])
def test_prompts_padded_for_a_graph_keep_their_logits_and_tokens(family, layers):
    model = hybrid_of(pico_teacher(family), layers)
    plain, padding = (Decoder(model, batch_size=2, capacity_tokens=40) for _ in range(2))
    recorded = []

    def record(work):
        recorded.append(work)
        return work

    padding._prompts = PromptGraphs(batch_size=2, capacity_tokens=40, record=record)
    # The first is read as it is, and so is one that would not fit with its padding; one token has no successor.
    for num_tokens, num_recorded in ((9, 0), (13, 1), (1, 1), (16, 1), (17, 1), (30, 2), (34, 2)):
        ids = torch.randint(1, 257, (2, num_tokens))
        torch.testing.assert_close(padding.prefill(ids), plain.prefill(ids), rtol=1e-4, atol=1e-4)
        assert torch.equal(padding.greedy(6), plain.greedy(6)), num_tokens
        assert len(recorded) == num_recorded, num_tokens


def test_a_decoder_is_freed_at_once():
    """Its cache would otherwise stay on the GPU until Python looks for cycles."""
    decoder = Decoder(hybrid_of(pico_teacher(), (0, 2)), batch_size=2, capacity_tokens=40)
    decoder._prompts = PromptGraphs(batch_size=2, capacity_tokens=40, record=lambda work: work().clone)
    for _ in range(3):
        decoder.prefill(torch.randint(1, 257, (2, 9)))
    gone = weakref.ref(decoder)
    del decoder
    assert gone() is None


def test_padding_of_a_graph_is_at_most_an_eighth():
    lengths = [padded_length(n) for n in range(1, 9000)]
    assert all(n <= length <= max(1.125 * n, n + 15) for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) < 70


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", LINEAR)
@torch.no_grad()
def test_the_graph_on_the_gpu_keeps_tokens_and_logits(family, kind, padded):
    model = hybrid_of(pico_teacher(family), (0, 2), kind).cuda()
    padded = {key: value.cuda() for key, value in padded.items()}
    decoder = Decoder(model, batch_size=3, capacity_tokens=64)
    for _ in range(2):
        decoder.prefill(**rename(padded))
        assert torch.equal(decoder.greedy(40), model.generate(**padded, **GREEDY, max_new_tokens=40)[:, 9:])
    torch.manual_seed(3)
    want = model.generate(**padded, do_sample=True, max_new_tokens=8, pad_token_id=0)
    torch.manual_seed(3)
    assert torch.equal(fast_generate(model, **padded, do_sample=True, max_new_tokens=8, pad_token_id=0), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("layers", [(), (0, 2), (0, 1, 2, 3)], ids=["teacher", "mixed", "all"])
def test_recorded_prompts_on_the_gpu_keep_logits_and_tokens(layers):
    model = hybrid_of(pico_teacher(), layers).cuda()
    plain, recording = (Decoder(model, batch_size=2, capacity_tokens=1200, use_graph=use) for use in (False, True))
    for num_tokens in (9, 13, 1000, 11, 1001, 16, 990, 1):
        ids = torch.randint(1, 257, (2, num_tokens)).cuda()
        torch.testing.assert_close(recording.prefill(ids), plain.prefill(ids), rtol=1e-3, atol=1e-3)
        assert torch.equal(recording.greedy(20), plain.greedy(20)), num_tokens


def test_a_convolution_before_the_rule_keeps_its_tokens(padded):
    model = hybrid_with_options({"conv_tokens": 3, "head_copies": 2})
    decoder = Decoder(model, batch_size=3, capacity_tokens=20)
    decoder.prefill(**rename(padded))
    assert torch.equal(decoder.greedy(8), model.generate(**padded, **GREEDY, max_new_tokens=8)[:, 9:])


@pytest.mark.parametrize("more", [{}, {"exact_first": True}, {"quadratic": True}], ids=str)
def test_copies_of_heads_keep_their_tokens(padded, more):
    model = hybrid_with_options({"head_copies": 2, **more})
    decoder = Decoder(model, batch_size=3, capacity_tokens=20)
    want = model(**padded, use_cache=False).logits[:, -1]
    torch.testing.assert_close(decoder.prefill(**rename(padded)), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(decoder.greedy(8), model.generate(**padded, **GREEDY, max_new_tokens=8)[:, 9:])


@pytest.mark.parametrize("num_tokens", [1, 2, 6])
def test_a_text_of_one_token_ends_with_its_first(num_tokens):
    """The last layer makes only the last token's output, unless that is the first of some text."""
    model = hybrid_with_options({"exact_first": True}, layers=(0, 3))
    ids, mask = torch.randint(1, 257, (2, num_tokens)), torch.ones(2, num_tokens, dtype=torch.long)
    mask[0, :-1] = 0
    decoder = Decoder(model, batch_size=2, capacity_tokens=12)
    want = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    torch.testing.assert_close(decoder.prefill(ids, mask), want[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(
        decoder.greedy(4), model.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=4)[:, num_tokens:]
    )


def hybrid_with_options(options, layers=(0, 2)):
    teacher = pico_teacher()
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, attention[i], options) for i in layers}
    for mixer in mixers.values():
        for weight in mixer.requires_grad_(False).parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return make_hybrid(teacher.model, mixers, {i: {"kind": "gated_deltanet", **options} for i in mixers})


def test_adapters_are_refused(padded):
    peft = pytest.importorskip("peft")
    model = hybrid_of(pico_teacher(), (0, 2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        Decoder(adapted.base_model.model, batch_size=1, capacity_tokens=8)


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
    with pytest.raises(ModelError, match="over a window"):
        Decoder(pico_model("mistral", sliding_window=8), batch_size=1, capacity_tokens=16)
    with pytest.raises(ModelError, match="over a window"):
        Decoder(hybrid_with_options({"window": 8}), batch_size=1, capacity_tokens=16)
    with pytest.raises(ModelError, match="num_beams"):
        fast_generate(model, **padded, num_beams=2, max_new_tokens=2)


@torch.no_grad()
def test_mixes_of_projected_heads_are_those_of_joined_rows():
    model = pico_model()
    attention = model.model.layers[1].self_attn
    mixer = mixer_from_teacher("gated_deltanet", read_geometry(model.config), 1, attention, {"quadratic": True}).eval()
    for features in (mixer.q_quadratic, mixer.k_quadratic):
        torch.nn.init.normal_(features.weight, std=0.1)
    projection = DeltaBlock(mixer, Norm(weight=torch.ones(32), eps=1e-5), batch=1).projection
    assert projection.mixes is not None
    hidden, angles = torch.randn(2, 9, 32), model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    found, joined = (
        delta_tokens(hidden, one, *angles) for one in (projection, dataclasses.replace(projection, mixes=None))
    )
    for name in ("q_BTHK", "k_BTHK", "v_BTHK", "gate_BTC"):
        torch.testing.assert_close(getattr(found, name), getattr(joined, name), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_mixer_that_is_held_to_a_backend_generates_by_it():
    hybrid = hybrid_of(pico_teacher(), (0, 2)).to("cuda")
    set_backend([hybrid.model.layers[0].self_attn], "torch")
    blocks = [type(block) for block in Decoder(hybrid, batch_size=1, capacity_tokens=16)._blocks]
    assert blocks == [MixerBlock, AttentionBlock, DeltaBlock, AttentionBlock]
