"""Search on a pico model: portions of items, the account of the work, divergences, guards, budgets and certificates."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny import CHEAP, pico_teacher

from dtr.arch import decoder_layers
from dtr.bench import strategies
from dtr.bench.strategies import compare_strategies
from dtr.distillation.bank import MixerBank
from dtr.errors import OutputError, RecipeError
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.generation import generate_texts
from dtr.evaluation.probe import impact
from dtr.hybrid.cache import decode_cache_bytes
from dtr.mixers import mixer_from_teacher
from dtr.pipeline.preparation import search_settings, what_was_read
from dtr.recipe.sections import Recipe
from dtr.selection import binding
from dtr.selection.items import split_items
from dtr.selection.meter import PassMeter
from dtr.selection.search import search
from dtr.selection.settings import GuardFloor, SearchSettings
from dtr.tasks import load_task
from dtr.tasks.base import GenerationRequest, fingerprint

NUM_LAYERS = 9
NUM_ITEMS = 125
PLAIN = {"p_min_confidence": None}
"""The limit compared on all items, without a certificate."""


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher(num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def bank(teacher):
    return untrained_bank(teacher)


def untrained_bank(teacher):
    """Mixers at their start values: a hybrid as bad as any."""
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {
        i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, a, CHEAP).eval() for i, a in enumerate(attention)
    }
    return MixerBank(
        specs=[{"kind": "gated_deltanet", **CHEAP}],
        mixers=mixers,
        num_model_layers=teacher.num_layers,
        teacher_fingerprint=teacher.fingerprint,
        geometry=teacher.geometry,
        nmse_after={i: 1.0 / (i + 1) for i in mixers},
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    rng = random.Random(3)
    # Equal lengths, so that items and tokens are the same account.
    rows = [
        {"question": f"{index:03d}?", "choices": ["aa", "bb"], "answer": rng.randrange(2)}
        for index in range(NUM_ITEMS + 40)
    ]
    for split, chosen in {"validation": rows[:NUM_ITEMS], "test": rows[NUM_ITEMS:]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    return load_task(str(folder), metric="acc")


def evaluator(teacher, bank, task, **options):
    specs = {number: bank.spec(number) for number in bank.mixers}
    mixers = bank.in_dtype(teacher.dtype)
    return Evaluator(teacher.model, teacher.tokenizer, task, "validation", mixers=mixers, specs=specs, **options)


def test_portions_are_parts_of_the_whole(teacher, bank, task):
    split = split_items(NUM_ITEMS, confirmation_share=0.2)
    whole, parts = evaluator(teacher, bank, task), evaluator(teacher, bank, task, blocks=split.groups)
    linear, base = frozenset({1, 4, 7}), frozenset({4, 7})
    expected = whole(linear).per_item
    for items in (split.blocks[0], split.selection, split.confirmation):
        assert parts(linear, base=base, items=items).per_item == tuple(expected[index] for index in items)
    with pytest.raises(AssertionError, match="whole groups"):
        parts(frozenset({2}), items=split.selection[:3])


def test_the_account_of_the_work_is_the_meters(teacher, bank, task):
    split = split_items(NUM_ITEMS)
    scorer = evaluator(teacher, bank, task, blocks=split.groups)
    meter = PassMeter(num_layers=NUM_LAYERS, num_items=NUM_ITEMS)
    # The meter knows nothing of prompts that choices share; here they save the same of every item.
    whole = evaluator(teacher, bank, task)
    whole()
    rng = random.Random(1)
    base: frozenset[int] = frozenset()
    for _ in range(12):
        layer = rng.choice(sorted(set(range(NUM_LAYERS)) - base))
        for blocks in ((0,), (0, 1, 2), (0, 1, 2, 3))[: rng.randint(1, 3)]:
            items = sorted(item for block in blocks for item in split.blocks[block])
            scorer(base | {layer}, base=base, items=items)
            meter.add(base | {layer}, base=base, items=items)
            assert scorer.pass_equivalents == pytest.approx(meter.passes * whole.pass_equivalents)
        base = base | {layer} if rng.random() < 0.3 and len(base) < 6 else base


def test_divergence_is_zero_for_the_teacher_and_as_computed_for_a_hybrid(teacher, bank, task):
    scorer = evaluator(teacher, bank, task)
    assert scorer._likelihoods.divergence(frozenset()) == 0
    model = search(teacher, bank, task, strategy="uniform", **PLAIN, p_min=0.01, max_linear_layers=1).m_opt
    assert model.config.mixers[0]
    total, count = 0.0, 0
    for item in task.splits["validation"][:NUM_ITEMS]:
        for request in item.requests:
            ids = teacher.tokenizer(request.context)["input_ids"]
            tokens = torch.tensor([ids + teacher.tokenizer(request.target)["input_ids"]])
            with torch.no_grad():
                ours, theirs = (m(tokens).logits[0, len(ids) - 1 : -1].log_softmax(-1) for m in (model, teacher.model))
            total += ((theirs - ours) * theirs.exp()).sum().item()
            count += len(theirs)
    assert scorer.divergence(0) == pytest.approx(total / count, rel=1e-3)


def test_a_pass_costs_its_share(teacher, bank, task):
    scorer = evaluator(teacher, bank, task)
    scorer(frozenset(), base=frozenset())
    assert scorer.pass_share == pytest.approx(scorer.pass_equivalents)
    assert 0 < scorer.pass_share <= 1


def test_auto_on_a_model_costs_what_it_says(teacher, bank, task):
    result = search(teacher, bank, task, strategy="auto", **PLAIN, p_min=0.9)
    assert result.pass_equivalents <= 25
    assert result.trace.m_opt.score.value >= result.trace.p_min_value - 1e-9
    assert len(result.trace.m_opt.score.per_item) == NUM_ITEMS
    again = search(teacher, bank, task, strategy="auto", **PLAIN, p_min=0.9)
    assert again.trace == result.trace


def test_guards_and_certificates_on_a_model(teacher, bank, task, tmp_path):
    guard = GuardFloor(task=task, p_min=0.98)
    journal = tmp_path / "journal.jsonl"
    limits = {"p_min": 0.8, "p_min_confidence": 0.9, "guards": [guard], "journal": journal}
    result = search(teacher, bank, task, strategy="exact", **limits)
    found = result.trace
    assert found.guards[0].m_opt.value >= found.guards[0].floor - 1e-9
    assert found.certificate.num_items == 100
    assert len(found.m_opt.layers) == found.certificate.num_certified
    assert result.guard_pass_equivalents > 0
    # All from the journal, guards and confirmation included.
    again = search(teacher, bank, task, strategy="exact", **limits)
    assert (again.trace, again.pass_equivalents, again.guard_pass_equivalents) == (found, 0, 0)
    with pytest.raises(OutputError, match="seed = 0"):
        search(teacher, bank, task, strategy="exact", **limits, seed=1)
    other = untrained_bank(teacher)
    with torch.no_grad():
        next(other.mixers[0].parameters()).add_(1.0)
    with pytest.raises(OutputError, match="another search, with bank = "):
        search(teacher, other, task, strategy="exact", **limits)
    fewer = replace(task, splits={**task.splits, "validation": task.splits["validation"][:120]})
    with pytest.raises(OutputError, match="another search, with task = "):
        search(teacher, bank, fewer, strategy="exact", **limits)


def test_a_cache_budget_becomes_a_number_of_layers(teacher, bank, task):
    size = lambda num: decode_cache_bytes(  # noqa: E731
        teacher.geometry,
        NUM_LAYERS - num,
        context_tokens=4096,
        bytes_per_element=teacher.dtype.itemsize,
        state_bytes=num * bank.mixers[0].state_bytes(teacher.dtype.itemsize),
    )
    budget = {"cache_context_tokens": 4096, "p_min": 0.01, **PLAIN}
    result = search(teacher, bank, task, strategy="uniform", max_cache_bytes=size(3) + 1, **budget)
    assert len(result.trace.m_opt.layers) == 3
    assert f"the cache takes {size(3):,} bytes at 4,096 tokens" in result.trace.stop_text
    with pytest.raises(RecipeError, match=f"expected at least {size(NUM_LAYERS):,}"):
        search(teacher, bank, task, max_cache_bytes=size(NUM_LAYERS) - 1, **budget)


def test_the_table_of_strategies(task):
    names = ("exact", "auto", "kl", "random")
    teacher = pico_teacher(num_layers=4)
    bank = untrained_bank(teacher)
    rows = {row["strategy"]: row for row in compare_strategies(teacher, bank, task, strategies=names, p_min=0.9)}
    assert list(rows) == list(names)
    for row in rows.values():
        assert json.loads(json.dumps(row)) == row
        assert row["num_replaced"] == len(row["layers"])
        assert row["val"] >= row["p_min_value"] - 1e-9
        assert row["test_ci95"][0] <= row["test"] <= row["test_ci95"][1]
        assert row["at_share"]["0.5"]["num_replaced"] == 2
        assert row["order"][: row["num_replaced"]] == row["layers"]
    assert rows["exact"]["test_minus_exact"]["mean"] == 0
    # So few layers are scored one by one.
    assert rows["auto"]["layers"] == rows["exact"]["layers"]


def test_a_time_limit_leaves_whole_rows_and_names_what_is_missing(teacher, bank, task, monkeypatch):
    """The second search is cut off in the middle, and the third does not begin."""
    now, events = [0.0], []
    monkeypatch.setattr(strategies, "clock_of", lambda world: lambda: now[0])

    def find_layers(*args, **options):
        *subjects, settings = args
        if settings.strategy == "random":
            now[0], settings = 100.0, settings.changed(max_seconds=1e-9)
        return find(*subjects, settings, **options)

    find = strategies.find_layers
    monkeypatch.setattr(strategies, "find_layers", find_layers)
    limits = {"p_min": 0.9, "shares": (), "time_limit_seconds": 60, "on_event": events.append}
    rows = list(compare_strategies(teacher, bank, task, strategies=("uniform", "random", "exact"), **limits))
    assert [row["strategy"] for row in rows] == ["uniform"]
    left_out = {event["strategy"]: event["reason"] for event in events if event["event"] == "left_out"}
    assert left_out["random"].startswith("The time limit cut it off, with 0 layers")
    assert left_out["exact"] == "The time limit was reached before it began."


def test_floors_on_perplexity_and_on_generation(teacher, bank, task, tmp_path):
    texts = [f"{index} stones lie in the river" for index in range(40)]
    requests = [GenerationRequest(context=text, max_new_tokens=3) for text in texts]
    answers = generate_texts(teacher.model, teacher.tokenizer, requests, chat_template=False, batch_tokens=400)
    # Answers without a letter or digit are refused.
    said = [{"prompt": t, "answer": a.strip()} for t, a in zip(texts, answers) if any(map(str.isalnum, a))]
    for folder, rows in (("text", [{"text": text} for text in texts]), ("words", said)):
        (tmp_path / folder).mkdir()
        for split, chosen in (("validation", rows[:6]), ("test", rows[6:8])):
            (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    perplexity = load_task("perplexity", path=str(tmp_path / "text"))
    options = {"max_new_tokens": 3, "stop": []}
    words = load_task(str(tmp_path / "words"), kind="generation", prompt="{prompt}", options=options)
    limits = {"strategy": "uniform", "p_min": 0.01, **PLAIN}
    silent = load_task(
        str(tmp_path / "words"), kind="generation", prompt="{prompt}", options={**options, "score_answer": False}
    )
    for one in (words, silent):
        asked = []
        found = search(teacher, bank, one, strategy="auto", **PLAIN, p_min=0.5, on_event=asked.append).trace
        assert found.m_opt.score.value >= found.p_min_value - 1e-9
        # Layers are ranked by likelihoods, and writing only decides how many go.
        assert sum(event["event"] == "candidate" for event in asked) < NUM_LAYERS + 6
    assert len(search(teacher, bank, task, **limits).trace.m_opt.layers) == NUM_LAYERS
    for guard in (GuardFloor(task=perplexity, p_min=0.9), GuardFloor(task=words, p_min=0.8)):
        result = search(teacher, bank, task, **limits, guards=[guard])
        (kept,) = result.trace.guards
        assert len(result.trace.m_opt.layers) < NUM_LAYERS
        assert result.trace.stop_reason == "guard"
        if kept.teacher.higher_is_better:
            assert kept.floor <= kept.m_opt.value <= kept.teacher.value
        else:
            assert kept.m_opt.value <= kept.floor == pytest.approx(kept.teacher.value / 0.9)


def test_guards_of_one_name_are_scored_apart(teacher, bank, task, tmp_path):
    """As one task at two lengths: the second would read the first one's scores from the journal."""
    half = replace(task, splits={**task.splits, "validation": task.splits["validation"][:50]})
    guards = [GuardFloor(task=task, p_min=0.5), GuardFloor(task=half, p_min=0.5)]
    found = search(
        teacher, bank, task, strategy="one_shot", **PLAIN, p_min=0.5, guards=guards, journal=tmp_path / "j.jsonl"
    ).trace
    assert [guard.name for guard in found.guards] == [task.name, f"{task.name} (2)"]
    assert [len(guard.m_opt.per_item) for guard in found.guards] == [NUM_ITEMS, 50]
    header = json.loads((tmp_path / "j.jsonl").read_text().splitlines()[0])
    assert list(header["identity"]["guards"]) == [task.name, f"{task.name} (2)"]
    # A resumed run must notice a change of either.
    read = what_was_read(teacher, None, [task, task, half])
    assert {read[f"guard {task.name}"], read[f"guard {task.name} (2)"]} == {fingerprint(task), fingerprint(half)}


def test_impact_is_zero_where_nothing_changes_and_high_where_the_answer_is_lost(teacher, bank, task):
    generator = torch.Generator().manual_seed(0)
    questions = [range(4 * at, 4 * at + 4) for at in range(60)]
    right = [at % 4 for at in range(60)]
    features = 0.1 * torch.randn(240, 8, generator=generator)
    for rows, at in zip(questions, right):
        features[rows[at], 3] += 1.0
    assert impact(features, features, questions, right) == 0
    # Nothing is left to read, and the ranks are chance: 1 - 1/4.
    assert impact(features, torch.randn(240, 8, generator=generator), questions, right) > 0.5
    # Read as well by a probe of its own, and not by the teacher's.
    assert impact(features, features.flip(1), questions, right) == pytest.approx(0.375, abs=0.15)
    measured = evaluator(teacher, bank, task).impact(3)
    assert -1 < measured < 1
    found = search(teacher, bank, task, strategy="impact", **PLAIN, p_min=0.01, max_linear_layers=2)
    impacts = {layer: evaluator(teacher, bank, task).impact(layer) for layer in bank.layers}
    assert list(found.trace.m_opt.layers) == sorted(impacts, key=lambda layer: (impacts[layer], layer))[:2]


def test_python_and_recipes_have_one_default_search(teacher, bank, task):
    recipe = Recipe.model_validate({"teacher": {"source": "pico"}})
    assert search_settings(recipe, ()) == SearchSettings()
    assert (SearchSettings().strategy, SearchSettings().p_min_confidence) == ("auto", 0.95)
    with pytest.raises(RecipeError, match=r"p_min_confidence: got 1\.5"):
        search(teacher, bank, task, p_min_confidence=1.5)
    with pytest.raises(RecipeError, match=r"p_mim.*p_min"):
        search(teacher, bank, task, p_mim=0.9)


def test_a_look_at_items_is_known_from_releases_before(teacher, bank, task, monkeypatch):
    """What it is digested from is written to the cache, so none of its names may change."""
    seen = []
    monkeypatch.setattr(binding, "count_look", lambda subject, asked: seen.append(asked) or 0)
    binding._count_look(teacher, bank, task, SearchSettings(guards=[GuardFloor(task=task, p_min=0.5)]))
    assert seen == [
        {
            "bank": bank.fingerprint,
            "strategy": "auto",
            "p_min": 0.95,
            "p_min_kind": "relative",
            "p_min_confidence": 0.95,
            "confirmation_share": 0.8,
            "guards": [],
            "hold_each": None,
            "max_linear_layers": None,
            "max_cache_bytes": None,
            "cache_context_tokens": 2048,
            "max_seconds": None,
            "run_to_end": False,
            "seed": 0,
            "batch_tokens": 0,
            "cache_bytes": 0,
        }
    ]
