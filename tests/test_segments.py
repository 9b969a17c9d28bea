"""Targets of a long text, learned on segments: what the mixers are shown, and where the teacher's heads look."""

from __future__ import annotations

import pytest
import torch
from tiny import CHEAP, byte_tokenizer, pico_model, token_blocks

import dtr
from dtr.distillation.loop import is_short_step
from dtr.distillation.students import Students, cut_in_segments, squared_sums
from dtr.distillation.targets import capture_targets
from dtr.errors import DtrError
from dtr.evaluation.attention_reach import attention_reach
from dtr.mixers import mixer_from_teacher
from dtr.tasks.base import Item, LikelihoodRequest


@pytest.fixture(scope="module")
def teacher():
    return dtr.as_teacher(pico_model(), byte_tokenizer())


def test_a_segment_learns_the_output_of_the_whole_text(teacher) -> None:
    """The gradient of a segmented step is that of each segment alone with its part of the whole text's target."""
    ids = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    layer = teacher.model.model.layers[1]

    def fresh():
        torch.manual_seed(0)
        return mixer_from_teacher("gated_deltanet", teacher.geometry, 1, layer.self_attn, {})

    trained, alone = fresh(), fresh()
    students = Students(
        teacher, {1: trained}, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, fast=False, segment_tokens=8
    )
    sums = students.accumulate(ids)
    seen = []
    with torch.no_grad(), capture_targets(teacher.model, {1: alone}, lambda *args: seen.append(args[1:])):
        teacher.model.model(input_ids=ids, use_cache=False)
    [(hidden, (cos, sin), target)] = seen
    want = torch.zeros(2)
    for first in range(0, 24, 8):
        part = slice(first, first + 8)
        pair = squared_sums(alone, hidden[:, part], (cos[:, part], sin[:, part]), target[:, part])
        pair[0].backward()
        want += torch.stack(pair).detach()
    torch.testing.assert_close(sums[0], want, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(trained.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_segments_have_one_shape_for_long_and_short_texts() -> None:
    hidden, angles = torch.arange(48.0).view(2, 12, 2), torch.arange(12.0).view(1, 12, 1)
    long = cut_in_segments(4, hidden, (angles, angles), hidden)
    short = cut_in_segments(4, hidden.view(6, 4, 2), (angles[:, :4], angles[:, :4]), hidden.view(6, 4, 2))
    assert long[0].tolist() == hidden.view(6, 4, 2).tolist()
    assert long[1][0][:, 0, 0].tolist() == [0, 4, 8, 0, 4, 8]
    assert [x.shape for x in (long[0], *long[1], long[2])] == [x.shape for x in (short[0], *short[1], short[2])]


@pytest.mark.parametrize(("share", "want"), [(0.0, 0), (0.5, 5), (1.0, 10), (0.3, 3)])
def test_short_steps_lie_evenly(share: float, want: int) -> None:
    settings = {"segment_tokens": 4, "short_fraction": share}
    assert sum(is_short_step(step, settings) for step in range(10)) == want
    assert not is_short_step(0, {})


def test_what_is_trained_on_segments_says_so_and_goes_on_to_the_same_bits(teacher, tmp_path) -> None:
    settings = {"num_tokens": 512, "batch_size": 1, "segment_tokens": 16, "learning_rate": 1e-3, "options": CHEAP}
    bank = dtr.distill(teacher, token_blocks(), **settings)
    assert bank.identity["segment_tokens"] == 16
    plain = dtr.distill(teacher, token_blocks(), num_tokens=512, batch_size=1, learning_rate=1e-3, options=CHEAP)
    assert "segment_tokens" not in plain.identity
    again = dtr.distill(teacher, token_blocks(), **settings, checkpoint=tmp_path / "c.safetensors")
    ours, theirs = (next(iter(one.mixers.values())).state_dict() for one in (bank, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = next(iter(plain.mixers.values())).state_dict()
    assert not all(torch.equal(ours[name], other[name]) for name in ours)
    with pytest.raises(DtrError, match="segment_tokens: got 5 for sequences"):
        dtr.distill(teacher, token_blocks(), num_tokens=512, segment_tokens=5)


def test_where_heads_look_is_their_own_softmax() -> None:
    """Against the weights that eager attention returns, grouped keys and norms on queries included."""
    model = pico_model("qwen3")
    model.set_attn_implementation("eager")
    teacher = dtr.as_teacher(model, byte_tokenizer())
    text = "filler " * 90 + "the word is lamp and " + "filler " * 20 + "the word is"
    item = Item(id="0", requests=(LikelihoodRequest(context=text, target=" lamp"),), row={})
    absent = Item(id="1", requests=(LikelihoodRequest(context="nothing", target=" lamp"),), row={})
    reach = attention_reach(teacher, [item, absent])
    ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
    weights = model(ids, output_attentions=True).attentions
    start = text.index("lamp") + ids.shape[1] - len(text)
    want = torch.stack([layer[0, :, -1, start : start + 4].sum(-1) for layer in weights])
    assert reach.num_items == 1
    torch.testing.assert_close(reach.to_answer.float(), want, rtol=1e-4, atol=1e-6)
    far = torch.stack([layer[0, :, -1, 4 : ids.shape[1] - 512].sum(-1) for layer in weights])
    torch.testing.assert_close(reach.beyond[512].float(), far, rtol=1e-4, atol=1e-6)
    assert not reach.beyond[8192].any()
    assert sorted(reach.layers()) == list(range(model.config.num_hidden_layers))
    with pytest.raises(DtrError, match="none with its answer"):
        attention_reach(teacher, [absent])


def test_models_that_are_known_by_a_probe_alone_are_refused_in_one_line() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=128)).eval()
    teacher = dtr.as_teacher(model, byte_tokenizer())
    with pytest.raises(DtrError, match="segment_tokens: got 8 for model type 'gpt2'; expected one of llama"):
        dtr.distill(teacher, token_blocks(), num_tokens=64, segment_tokens=8)
    with pytest.raises(DtrError, match="attention_reach: got model type 'gpt2'"):
        attention_reach(teacher, [])
