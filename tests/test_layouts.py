"""Scores do not depend on how items are batched: logits in float32, near-ties decided alike, one layout per task."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny import CHEAP, pico_model, pico_teacher
from torch import nn
from torch.nn import functional as F

from dtr.arch import LayerRunner, decoder_layers
from dtr.distillation.bank import MixerBank
from dtr.evaluation.evaluator import Evaluator
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher
from dtr.ops.float32_linear import BLOCK_ROWS, linear_in_float32
from dtr.selection.binding import find_layers
from dtr.selection.settings import SearchSettings
from dtr.tasks import load_task
from dtr.teacher import as_teacher

SPEC = {"kind": "gated_deltanet", **CHEAP}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def mixers_of(teacher):
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    return {
        i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, a, CHEAP).eval() for i, a in enumerate(attention)
    }


def write_task(folder, rows):
    for split, chosen in {"validation": rows, "test": [row | {"question": "other"} for row in rows[:2]]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    return load_task(str(folder), metric="acc")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_into_float32(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 64, generator=generator).to(dtype)
    weight = (3 * torch.randn(2 * BLOCK_ROWS + 5, 64, generator=generator)).to(dtype)
    bias = torch.randn(len(weight), generator=generator).to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision
    ours = linear_in_float32(*(t.to(device) for t in (x, weight, bias))).cpu()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert ours.dtype == torch.float32
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (ours - exact).abs().max() < 1e-4
    # What is rounded to half precision is a hundred times as far off.
    assert (F.linear(x, weight, bias) - exact).abs().max() > 1e-2


def test_wider_types_stay_as_they_are():
    for dtype in (torch.float32, torch.float64):
        x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
        assert torch.equal(linear_in_float32(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_logits_of_a_position_are_those_of_any_batch(device):
    model = pico_model(vocab_size=5000, tie_word_embeddings=False).to(device, torch.bfloat16)
    nn.init.normal_(model.lm_head.weight, std=3.0)
    runner, hidden = LayerRunner(model), torch.randn(300, 32, device=device, dtype=torch.bfloat16)
    whole = runner.logits(hidden)
    assert whole.dtype == torch.float32
    order = torch.randperm(300, device=device)
    for rows in ([7], [7, 299], range(64), order.tolist()):
        assert (runner.logits(hidden[list(rows)]) - whole[list(rows)]).abs().max() < 1e-4
    exact = model.model.norm(hidden).double() @ model.lm_head.weight.double().t()
    assert (whole - exact).abs().max() < 1e-4


@torch.no_grad()
def near_ties(model, tokenizer, hybrids, folder, num_items):
    """A task of two answers whose logits differ by less than bfloat16 can tell; the right one is the likelier in truth.

    The rows of the head for A and B are the same but for one weight, by the least step that bfloat16 has: B is likelier
    where that component of the hidden state is positive.
    """
    head = model.lm_head.weight
    first, second = (tokenizer.encode(letter)[0] for letter in "AB")
    head.mul_(20)
    head[second] = head[first]
    head[first, 5] = 3.0
    head[second, 5] = torch.nextafter(head[first, 5], head.new_tensor(9.0))
    rng, rows = random.Random(1), []
    while len(rows) < num_items:
        question = "".join(rng.choices("abcdefgh", k=rng.randrange(3, 60)))
        ids = torch.tensor([tokenizer.encode(f"Question: {question}\nAnswer: ")], device=model.device)
        decisive = [hybrid.model(ids, use_cache=False).last_hidden_state[0, -1, 5].item() for hybrid in hybrids]
        # The hidden states themselves move with the batch, by about a hundredth.
        if min(map(abs, decisive)) > 0.2 and len({x > 0 for x in decisive}) == 1:
            rows.append({"question": question, "choices": ["A", "B"], "answer": int(decisive[0] > 0)})
    assert {row["answer"] for row in rows} == {0, 1}
    return write_task(folder, rows)


@pytest.mark.parametrize("device", DEVICES)
def test_near_ties_are_decided_alike_in_every_layout(device, tmp_path):
    teacher = as_teacher(
        pico_model(tie_word_embeddings=False).to(device, torch.bfloat16), pico_teacher().tokenizer, source="pico"
    )
    mixers = {i: mixer.to(device, torch.bfloat16) for i, mixer in mixers_of(teacher).items()}
    hybrid = make_hybrid(teacher.model, {1: mixers[1]}, {1: SPEC})
    task = near_ties(teacher.model, teacher.tokenizer, [teacher.model, hybrid], tmp_path, 40)
    layouts = [
        {"batch_tokens": 1},
        {"batch_tokens": 100},
        {"batch_tokens": 10**6},
        {"blocks": [range(30, 40), range(7), range(7, 30)]},
    ]
    for layout in layouts:
        score = Evaluator(
            teacher.model,
            teacher.tokenizer,
            task,
            "validation",
            mixers=mixers,
            specs=dict.fromkeys(mixers, SPEC),
            **layout,
        )
        for linear in (frozenset(), frozenset({1})):
            assert score(linear).per_item == (1.0,) * 40, layout


@pytest.mark.parametrize("device", DEVICES)
def test_every_strategy_measures_against_the_same_teacher(device, tmp_path):
    rng = random.Random(3)
    letters = "abcdefghij"
    rows = [
        {"question": "".join(rng.choices(letters, k=rng.randrange(2, 30))), "choices": ["aa", "bb"], "answer": n % 2}
        for n in range(140)
    ]
    task = write_task(tmp_path, rows)
    model = pico_model(num_layers=9).to(device, torch.bfloat16)
    teacher = as_teacher(model, pico_teacher().tokenizer, source="pico")
    mixers = mixers_of(teacher)
    bank = MixerBank(
        specs=[SPEC],
        mixers=mixers,
        num_model_layers=9,
        teacher_fingerprint=teacher.fingerprint,
        geometry=teacher.geometry,
        nmse_after=dict.fromkeys(mixers, 0.5),
    )
    settings = {
        name: SearchSettings(strategy=name, p_min=0.5, p_min_confidence=None, max_linear_layers=1)
        for name in ("exact", "auto", "uniform")
    }
    found = {name: find_layers(teacher, bank, task, one).trace for name, one in settings.items()}
    # The likelihoods, too, which say more than 140 answers do.
    assert found["exact"].teacher == found["auto"].teacher == found["uniform"].teacher
    # A hybrid that two strategies have scored has one score.
    common = found["exact"].steps[0].candidates
    assert common[found["uniform"].m_opt.layers[0]] == found["uniform"].m_opt.score
