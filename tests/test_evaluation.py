"""Scores are what a plain forward pass gives, however much of the work is reused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random

import pytest
import torch
from tiny import CHEAP, pico_teacher

from dtr.arch import LayerRunner, decoder_layers, with_mixer
from dtr.errors import DataError, ModelError
from dtr.evaluation.batches import TokenPair, group_by_length
from dtr.evaluation.evaluator import Evaluator, evaluate
from dtr.evaluation.generation import cut, generate_texts
from dtr.evaluation.likelihood import LikelihoodScorer
from dtr.hybrid.modeling import make_hybrid
from dtr.inference.generate import fast_generate
from dtr.mixers import mixer_from_teacher
from dtr.selection.criteria import at_least
from dtr.tasks import load_task
from dtr.tasks.base import GenerationRequest

SPEC = {"kind": "gated_deltanet", **CHEAP}


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher()


@pytest.fixture(scope="module")
def mixers(teacher):
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    return {
        i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, a, CHEAP).eval() for i, a in enumerate(attention)
    }


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(1)
    draw = lambda low, high: tuple(rng.randrange(1, 257) for _ in range(rng.randint(low, high)))  # noqa: E731
    return [TokenPair(context=draw(1, 30), target=draw(1, 5)) for _ in range(17)]


def hybrid(teacher, mixers, layers):
    return make_hybrid(teacher.model, {i: mixers[i] for i in layers}, dict.fromkeys(layers, SPEC))


def scorer(teacher, mixers, pairs, **options):
    layers = list(decoder_layers(teacher.model))
    return LikelihoodScorer(
        LayerRunner(teacher.model),
        {i: with_mixer(layers[i], mixer) for i, mixer in mixers.items()},
        pairs,
        pad_token_id=0,
        device=torch.device("cpu"),
        **options,
    )


@torch.no_grad()
def plain(model, pair):
    """Log-probability and greedy match by one unpadded forward pass."""
    tokens = pair.context + pair.target
    logits = model(torch.tensor([tokens])).logits[0, len(pair.context) - 1 : -1].float()
    target = torch.tensor(pair.target)
    log_probs = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return log_probs, bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("layers", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_likelihoods_equal_a_plain_forward_pass(teacher, mixers, pairs, layers):
    responses = scorer(teacher, mixers, pairs, batch_tokens=100)(frozenset(layers), base=frozenset())
    model = hybrid(teacher, mixers, layers)
    for pair, response in zip(pairs, responses):
        log_prob, is_greedy = plain(model, pair)
        assert response.log_prob == pytest.approx(log_prob, rel=1e-4, abs=1e-4)
        assert (response.is_greedy, response.num_tokens) == (is_greedy, len(pair.target))


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 10**9])
@pytest.mark.parametrize("batch_tokens", [1, 64, 10**6])
def test_reuse_changes_nothing(teacher, mixers, pairs, cache_bytes, batch_tokens):
    reused = scorer(teacher, mixers, pairs, cache_bytes=cache_bytes, batch_tokens=batch_tokens)
    # As a search asks: rounds of candidates on a base that grows, then jumps back.
    for base in (frozenset(), frozenset({2}), frozenset({2, 0}), frozenset({1})):
        for layer in set(range(4)) - base:
            linear = base | {layer}
            fresh = scorer(teacher, mixers, pairs, cache_bytes=0, batch_tokens=batch_tokens)
            expected = [r.log_prob for r in fresh(linear, base=frozenset())]
            assert [r.log_prob for r in reused(linear, base=base)] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_pass_equivalents_count_the_layers_that_ran(teacher, mixers, pairs):
    reused = scorer(teacher, mixers, pairs)
    reused(frozenset(), base=frozenset())
    assert reused.pass_equivalents == pytest.approx(1.0)
    # The first pass has left every boundary of the base: a candidate at layer l runs 4 - l layers.
    for layer in range(4):
        before = reused.pass_equivalents
        reused(frozenset({layer}), base=frozenset())
        assert reused.pass_equivalents - before == pytest.approx((4 - layer) / 4)


def test_a_whole_exact_search_costs_about_half(teacher, mixers, pairs):
    reused = scorer(teacher, mixers, pairs)
    reused(frozenset(), base=frozenset())
    base, num_candidates = frozenset(), 0
    for chosen in (1, 3, 0, 2):
        for layer in sorted(set(range(4)) - base):
            reused(base | {layer}, base=base)
            num_candidates += 1
        base |= {chosen}
    assert num_candidates == 10
    assert reused.pass_equivalents < 0.85 * num_candidates


def write_rows(folder, rows):
    for split, chosen in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in chosen))


@pytest.fixture
def multiple_choice(tmp_path):
    rng = random.Random(3)
    words = ["stone", "river", "tree", "cloud"]
    rows = [
        {"context": "", "question": f"What is {i}?", "choices": rng.sample(words, 3), "answer": i % 3}
        for i in range(20)
    ]
    write_rows(tmp_path, {"validation": rows[:12], "test": rows[12:]})
    return load_task(str(tmp_path), metric="acc_norm")


def test_teacher_and_hybrid_take_one_path(teacher, mixers, multiple_choice):
    evaluator = Evaluator(
        teacher.model,
        teacher.tokenizer,
        multiple_choice,
        "validation",
        mixers=mixers,
        specs=dict.fromkeys(mixers, SPEC),
    )
    for layers in ((), (0,), (1, 2)):
        model = hybrid(teacher, mixers, layers)
        alone = evaluate(model, multiple_choice, split="validation", tokenizer=teacher.tokenizer)
        swapped = evaluator(frozenset(layers))
        assert alone.per_item == swapped.per_item
        assert alone.log_likelihood == pytest.approx(swapped.log_likelihood, rel=1e-5)
    assert evaluate(teacher, multiple_choice).num_items == 8


def test_multiple_choice_by_hand(teacher, multiple_choice):
    hits = []
    for item in multiple_choice.splits["test"]:
        scores = []
        for request in item.requests:
            ids = lambda text: tuple(teacher.tokenizer(text)["input_ids"])  # noqa: E731
            log_prob, _ = plain(teacher.model, TokenPair(context=ids(request.context), target=ids(request.target)))
            scores.append(log_prob / len(request.target.strip()))
        hits.append(float(max(range(3), key=scores.__getitem__) == item.row["answer"]))
    score = evaluate(teacher, multiple_choice)
    assert list(score.per_item) == hits
    assert score.value == pytest.approx(sum(hits) / len(hits))


def test_perplexity_by_hand(teacher, tmp_path):
    texts = ["the river is long and wide", "a stone lies in the green tree", "cloud"]
    write_rows(tmp_path, {"validation": [{"text": "some other text here"}], "test": [{"text": t} for t in texts]})
    score = evaluate(teacher, load_task("perplexity", path=str(tmp_path)))
    total, count = 0.0, 0
    for text in texts:
        ids = tuple(teacher.tokenizer(text)["input_ids"])
        log_prob, _ = plain(teacher.model, TokenPair(context=(0,), target=ids))
        total, count = total + log_prob, count + len(ids)
    assert score.value == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert not score.higher_is_better


def test_generation_by_hand(teacher, mixers, tmp_path):
    """Right answers are taken from the hybrid's own greedy text, so it must score 1 and the teacher less."""
    model = hybrid(teacher, mixers, (0, 2))
    prompts = [f"word {i} and" for i in range(9)]
    requests = [GenerationRequest(context=p, max_new_tokens=4) for p in prompts]
    options = {"chat_template": False, "batch_tokens": 40}
    texts = generate_texts(model, teacher.tokenizer, requests, **options)
    assert generate_texts(model, teacher.tokenizer, requests, **options, fast=True) == texts
    for prompt, text in zip(prompts, texts):
        ids = torch.tensor([teacher.tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert teacher.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text
    rows = [{"prompt": p, "answer": t.strip() or "?"} for p, t in zip(prompts, texts)]
    write_rows(tmp_path, {"validation": rows[:4], "test": rows[4:]})
    options = {"max_new_tokens": 4, "stop": []}
    task = load_task(str(tmp_path), kind="generation", prompt="{prompt}", options=options)
    ours = evaluate(model, task, tokenizer=teacher.tokenizer)
    evaluator = Evaluator(
        teacher.model, teacher.tokenizer, task, "test", mixers=mixers, specs=dict.fromkeys(mixers, SPEC)
    )
    assert evaluator(frozenset({0, 2})).per_item == ours.per_item
    assert evaluator(frozenset()).value < ours.value
    assert evaluator.pass_equivalents > 2


def test_stop_strings_cut_the_text():
    assert cut("one\ntwo. three", ["\n", "."]) == "one"
    assert cut("one", ["\n"]) == "one"


def test_stop_strings_end_a_text_on_the_fast_path_too(teacher, monkeypatch):
    requests = [GenerationRequest(context=f"word {i} and", max_new_tokens=8) for i in range(6)]
    options = {"chat_template": False, "batch_tokens": 400}
    free = generate_texts(teacher.model, teacher.tokenizer, requests, **options)
    # A letter before the end of one of them; most of what these weights write is bytes that make no letter.
    index, stop = next((i, letter) for i, text in enumerate(free) for letter in text[:-1] if letter.isascii())
    requests = [dataclasses.replace(request, stop=(stop,)) for request in requests]
    lengths = []

    def decoded(*given, **kwargs):
        ids = fast_generate(*given, **kwargs)
        lengths.append(ids.shape[1] - kwargs["input_ids"].shape[1])
        return ids

    monkeypatch.setattr("dtr.evaluation.generation.fast_generate", decoded)
    texts = generate_texts(teacher.model, teacher.tokenizer, requests, **options, fast=True)
    assert texts == [cut(text, [stop]) for text in free]
    assert generate_texts(teacher.model, teacher.tokenizer, requests, **options, fast=False) == texts
    generate_texts(teacher.model, teacher.tokenizer, [requests[index]], **options, fast=True)
    # All six go on until the last has ended; alone, it is not written further than to its stop string.
    assert len(lengths) == 2
    assert lengths[1] < 8


def test_recall_is_greedy_decoding(teacher):
    task = load_task("recall", num_validation=3, num_test=6)
    score = evaluate(teacher, task)
    for item, value in zip(task.splits["test"], score.per_item):
        request = item.requests[0]
        ids = torch.tensor([teacher.tokenizer(request.context)["input_ids"]])
        wanted = teacher.tokenizer(request.target)["input_ids"]
        out = teacher.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(wanted), do_sample=False, eos_token_id=None
        )
        assert value == float(out[0, ids.shape[1] :].tolist() == wanted)


def test_items_that_do_not_fit_are_told(teacher, tmp_path):
    rows = [
        {"context": "", "question": "x" * 600, "choices": ["a", "b"], "answer": 0},
        {"context": "", "question": "y", "choices": ["a", "b"], "answer": 0},
    ]
    write_rows(tmp_path, {"validation": rows[1:], "test": rows[:1]})
    with pytest.raises(DataError, match="512 positions"):
        evaluate(teacher, load_task(str(tmp_path)))


def test_batches_by_length_waste_less_and_lose_nothing():
    lengths = [*range(5, 45), *[120] * 3, *[12] * 200]
    members = range(2, len(lengths))
    batches = group_by_length(lengths, members, 2000, overhead_tokens=100)
    assert sorted(index for batch in batches for index in batch) == list(members)
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(padded) <= 2000
    real = sum(lengths[index] for index in members)
    assert sum(padded) + 100 * len(batches) < 1.5 * real + 500
    # Where starting a batch costs more than any padding, there are as few as fit.
    assert len(group_by_length(lengths, members, 10**6, overhead_tokens=10**6)) == 1
    assert group_by_length([300], [0], 200) == [[0]]
    assert group_by_length([], [], 200) == []


@pytest.mark.parametrize("kind", ["multiple_choice", "classification", "perplexity", "generation", "recall"])
def test_a_mixer_that_gives_no_numbers_loses_and_a_teacher_is_refused(teacher, mixers, kind, tmp_path):
    """All right answers stand where an argmax of NaN would look for them, and reports can hold the score."""
    rows = {
        "multiple_choice": {"question": "x", "choices": ["river", "stone"], "answer": 0},
        "classification": {"text": "x", "label": 0, "label_text": "river"},
        "perplexity": {"text": "the river is long"},
        "generation": {"prompt": "x", "answer": "river"},
    }
    if kind == "recall":
        task = load_task("recall", num_validation=2, num_test=2)
    else:
        row = rows[kind]
        first = next(iter(row))
        more = [{**row, "label": 1, "label_text": "stone"}] if kind == "classification" else []
        validation = [{**row, first: f"{row[first]} {n}"} for n in range(2)]
        write_rows(tmp_path, {"validation": [*validation, *more], "test": [{**row, first: "y"}]})
        task = load_task(str(tmp_path), kind=kind, options={"max_new_tokens": 1} if kind == "generation" else None)
    broken = {0: copy.deepcopy(mixers[0])}
    with torch.no_grad():
        next(broken[0].parameters()).fill_(math.nan)
    given = (teacher.model, teacher.tokenizer, task, "validation")
    evaluator = Evaluator(*given, mixers=broken, specs={0: SPEC})
    whole = evaluator()
    with pytest.warns(
        UserWarning, match=r"mixers in layers 0 are no finite numbers on \d of \d items, which count as lost"
    ):
        score = evaluator(frozenset({0}))
    assert score.goodness < 1e-200 or score.value == 0
    assert at_least(whole.goodness, score.goodness)
    json.dumps(score.to_dict(with_items=True), allow_nan=False)
    assert math.isfinite(score.signal)
    assert score.signal < whole.signal
    assert math.isfinite(evaluator.divergence(0))
    with pytest.raises(ModelError, match="no finite numbers on"):
        evaluate(hybrid(teacher, broken, (0,)), task, tokenizer=teacher.tokenizer)
