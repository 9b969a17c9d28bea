"""Choices that share their question's prompt: the scores of a plain forward pass, for fewer tokens."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny import pico_model, pico_teacher

from dtr.arch import LayerRunner, decoder_layers, read_geometry, with_mixer
from dtr.evaluation import batches
from dtr.evaluation.batches import TokenPair
from dtr.evaluation.branching import Branches
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.likelihood import LikelihoodScorer
from dtr.mixers import MIXERS, mixer_from_teacher
from dtr.tasks import load_task

OPTIONS = {
    "gated_deltanet": {"conv_tokens": 4, "head_copies": 2},
    "gated_linear_attention": {"window": 3, "sinks": 2},
    "sliding_window": {"window": 5, "sinks": 2},
}


def draw(rng, low, high):
    return tuple(rng.randrange(1, 257) for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="module")
def questions():
    """Prompts of many lengths with several answers each, and the odd ones among them."""
    rng = random.Random(4)
    pairs, members = [], []

    def add(*choices):
        members.append(list(range(len(pairs), len(pairs) + len(choices))))
        pairs.extend(TokenPair(context=context, target=target) for context, target in choices)

    for num_choices in (4, 3, 4, 2, 5):
        context = draw(rng, 20, 60)
        add(*((context, draw(rng, 1, 9)) for _ in range(num_choices)))
    context = draw(rng, 30, 30)
    # Answers of one token read nothing of their own; one answer begins like another; one question is asked twice.
    add((context, (5,)), (context, (6,)), (context, (5, 7, 8)), (context, (5, 7, 9)), (context, (5, 7, 9)))
    # Nothing in common; contexts that differ before a common target; a single choice.
    add(((3, 4), (9, 9)), ((8, 4), (9, 8)))
    add(((*context[:12], 1), (2, 3)), ((*context[:12], 4, 5), (2, 3)))
    add((draw(rng, 25, 25), (1, 2, 3)))
    return pairs, members


def scorer(model, mixers, asked, **options):
    layers = list(decoder_layers(model))
    return LikelihoodScorer(
        LayerRunner(model),
        {i: with_mixer(layers[i], mixer) for i, mixer in mixers.items()},
        asked[0],
        pad_token_id=0,
        device=torch.device("cpu"),
        **options,
    )


def mixers_of(model, kind):
    attention = [layer.self_attn for layer in decoder_layers(model)]
    found = {}
    for index, one in enumerate(attention):
        mixer = mixer_from_teacher(kind, read_geometry(model.config), index, one, OPTIONS.get(kind)).eval()
        # Away from the start, where convolutions and gates do nothing.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(index)
            for weight in mixer.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        found[index] = mixer
    return found


def close(ours, theirs):
    assert [r.log_prob for r in ours] == pytest.approx([r.log_prob for r in theirs], rel=1e-4, abs=2e-4)
    assert [(r.is_greedy, r.num_tokens) for r in ours] == [(r.is_greedy, r.num_tokens) for r in theirs]


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_shared_prompts_change_no_score(kind, questions):
    model = pico_model()
    mixers = mixers_of(model, kind)
    plain = scorer(model, mixers, questions)
    for batch_tokens in (10**6, 90):
        shared = scorer(model, mixers, questions, questions=questions[1], batch_tokens=batch_tokens)
        assert all(isinstance(batch.prepared, Branches) for batch in shared._batches)
        for base in (frozenset(), frozenset({2})):
            for linear in (base, base | {0}, base | {1, 3}):
                close(shared(linear, base=base), plain(linear, base=base))
        assert shared.pass_equivalents < 0.5 * plain.pass_equivalents
        assert shared.divergence(frozenset({1})) == pytest.approx(plain.divergence(frozenset({1})), rel=1e-3)
        torch.testing.assert_close(
            shared.features(2, is_linear=True), plain.features(2, is_linear=True), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_shared_prompts_in_every_family(family, implementation, questions):
    # Some windows end inside the prompt, and some inside an answer.
    changes = {"sliding_window": 7} if family == "mistral" else {}
    model = pico_model(family, **changes)
    model.set_attn_implementation(implementation)
    mixers = mixers_of(model, "gated_deltanet")
    shared, plain = (scorer(model, mixers, questions, questions=which) for which in (questions[1], None))
    assert isinstance(shared._batches[0].prepared, Branches)
    close(shared(frozenset({1}), base=frozenset()), plain(frozenset({1}), base=frozenset()))


def test_groups_of_questions_can_be_asked_for_alone(questions):
    model = pico_model()
    mixers = mixers_of(model, "gated_deltanet")
    members = questions[1]
    groups = [[i for question in members[part] for i in question] for part in (slice(0, 4), slice(4, None))]
    parts = scorer(model, mixers, questions, questions=members, groups=groups, cache_bytes=0)
    whole = scorer(model, mixers, questions)(frozenset({1}), base=frozenset())
    for group in groups:
        close(parts(frozenset({1}), base=frozenset(), only=group), [whole[i] for i in group])


def test_short_prompts_stay_in_padded_rows(monkeypatch):
    rng = random.Random(2)
    model = pico_model()
    for length, is_shared in ((3, False), (40, True)):
        contexts = [draw(rng, length, length) for _ in range(10)]
        pairs = [TokenPair(context=context, target=draw(rng, 2, 6)) for context in contexts for _ in range(3)]
        members = [[3 * at, 3 * at + 1, 3 * at + 2] for at in range(10)]
        found = scorer(model, {}, (pairs, members), questions=members)._batches
        assert isinstance(found[0].prepared, Branches) == is_shared
    # Where starting kernels is all that counts, there is no further part.
    options = {"pad_token_id": 0, "device": torch.device("cpu"), "batch_tokens": 10**6}
    monkeypatch.setitem(batches.BATCH_OVERHEAD_TOKENS, "cpu", 10**6)
    (batch,) = batches.make_batches(LayerRunner(model), pairs, members, **options)
    assert not isinstance(batch.prepared, Branches)


def test_a_task_of_choices_shares_its_prompts(tmp_path):
    rng = random.Random(3)
    rows = [
        {"question": "".join(rng.choices("abcdefg ", k=rng.randint(30, 60))), "choices": ["no", "yes!", "maybe"]}
        for _ in range(12)
    ]
    for split, part in (("validation", rows[:8]), ("test", rows[8:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({**row, "answer": 1}) for row in part))
    teacher, task = pico_teacher(), load_task(str(tmp_path), metric="acc_norm")
    evaluator = Evaluator(teacher.model, teacher.tokenizer, task, "validation")
    found = evaluator()
    assert evaluator.pass_equivalents < 0.5
    assert found.num_items == 8
