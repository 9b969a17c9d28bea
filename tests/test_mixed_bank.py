"""A bank of several kinds: trained like banks of one kind, and searched layer by layer and kind by kind."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from score_tables import Table, acc, search
from tiny import pico_teacher, token_blocks
from transformers import AutoModelForCausalLM

from dtr.bench.strategies import compare_strategies
from dtr.cli import main
from dtr.distillation.bank import load_bank
from dtr.distillation.trainer import distill
from dtr.errors import BankError, RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import make_mixer
from dtr.pipeline import run
from dtr.pipeline.preparation import tell_backends
from dtr.recipe import read_recipe
from dtr.selection.meter import PassMeter
from dtr.selection.search import search as search_model
from dtr.selection.state import Budget
from dtr.tasks import load_task

KINDS = ["gated_deltanet", {"kind": "gated_linear_attention", "options": {"gate_rank": 4}}]
SETTINGS = {"num_tokens": 1024, "batch_size": 4, "learning_rate": 5e-3}
LAYER_OF = {0: 0, 1: 1, 2: 2, 10: 0, 11: 1, 12: 2}


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher()


@pytest.fixture(scope="module")
def bank(teacher):
    return distill(teacher, token_blocks(), mixer=KINDS, **SETTINGS)


def test_each_kind_learns_as_in_a_bank_of_its_own(teacher, bank):
    assert list(bank.mixers) == [0, 4, 1, 5, 2, 6, 3, 7]
    alone = [
        distill(teacher, token_blocks(), mixer="gated_deltanet", **SETTINGS),
        distill(teacher, token_blocks(), mixer="gated_linear_attention", options={"gate_rank": 4}, **SETTINGS),
    ]
    for at, one in enumerate(alone):
        for layer in one.layers:
            ours, theirs = bank.mixers[layer + 4 * at].state_dict(), one.mixers[layer].state_dict()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert bank.nmse_after[layer + 4 * at] == one.nmse_after[layer]
    assert bank.mean_nmse_by_kind == {one.kinds[0]: one.mean_nmse for one in alone}


OPTIONS_OF_OLD = {"exact_first": False, "head_copies": 1, "quadratic": False}
"""Banks that do not name these options have a mixer without them, as all had once."""

PER_LAYER = [
    {"kind": "gated_deltanet", "layers": [0, 3]},
    {"kind": "gated_deltanet", "options": {"head_copies": 1}, "layers": [1, 2, 3]},
]


def test_layers_get_the_kinds_that_name_them(teacher, tmp_path):
    bank = distill(teacher, token_blocks(), mixer=PER_LAYER, **SETTINGS)
    assert list(bank.mixers) == [0, 5, 6, 3, 7]
    assert bank.kinds == ["gated_deltanet", "gated_deltanet head_copies=1"]
    alone = distill(teacher, token_blocks(), mixer="gated_deltanet", options={"head_copies": 1}, **SETTINGS)
    for layer in (1, 2, 3):
        ours, theirs = bank.mixers[layer + 4].state_dict(), alone.mixers[layer].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    bank.save(tmp_path)
    loaded = load_bank(tmp_path, teacher=teacher)
    assert (loaded.fingerprint, loaded.layer_of) == (bank.fingerprint, {0: 0, 5: 1, 6: 2, 3: 3, 7: 3})
    # Without the layers that are not distilled, of the others those that an entry names.
    with pytest.raises(RecipeError, match=r"layers \[0, 3\].*some of the layers to distil, \[1, 2, 3\]"):
        distill(teacher, token_blocks(), mixer=PER_LAYER, layers=[1, 2, 3], **SETTINGS)
    for bad in ([], [4], [-1, 0]):
        with pytest.raises(RecipeError, match=r"mixer\.kind"):
            distill(teacher, token_blocks(), mixer=[{"kind": "gated_deltanet", "layers": bad}], **SETTINGS)


def test_a_run_with_other_options_for_some_layers(place, tmp_path):
    out = tmp_path / "run"
    settings = {"mixer.options": {}, "mixer.kind": PER_LAYER, "distill.num_tokens": 1024, "search.p_min": 0.01}
    recipe = read_recipe(place / "recipe.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    run(recipe, out)
    report = json.loads((out / "report.json").read_text())
    assert [row["layer"] for row in report["distill"]["nmse"]] == [0, 1, 2, 3, 3]
    assert sorted(report["m_opt"]["layers"]) == [0, 1, 2, 3]
    mixers = AutoModelForCausalLM.from_pretrained(out / "hybrid").config.mixers
    assert [mixer.get("head_copies", 1) for mixer in mixers[:3]] == [2, 1, 1]
    page = (out / "report.html").read_text()
    assert not re.findall(r"Layer \d: [^<>]*error (?![0-9])[^<>]*", page), "each layer has its own error"


def test_a_saved_bank_comes_back_and_goes_on(teacher, bank, tmp_path):
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank", teacher=teacher)
    assert loaded.fingerprint == bank.fingerprint
    assert (loaded.specs, loaded.kinds, loaded.layer_of) == (bank.specs, bank.kinds, bank.layer_of)
    assert (loaded.nmse_after, list(loaded.mixers)) == (bank.nmse_after, list(bank.mixers))
    half, blocks = tmp_path / "half.safetensors", token_blocks()

    def stop(event):
        if event["event"] == "nmse" and event["step"] == 4:
            raise KeyboardInterrupt

    options = {"mixer": KINDS, **SETTINGS, "checkpoint": half}
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, blocks, checkpoint_every_steps=3, on_event=stop, **options)
    assert distill(teacher, blocks, **options).fingerprint == bank.fingerprint
    with pytest.raises(BankError, match="mixer"):
        distill(teacher, blocks, **options | {"mixer": KINDS[:1]})


def test_banks_written_before_there_were_several_kinds_are_read(teacher, tmp_path):
    bank = distill(teacher, token_blocks(), layers=[1, 2], options=OPTIONS_OF_OLD, **SETTINGS)
    bank.specs = [{"kind": "gated_deltanet"}]
    bank.save(tmp_path)
    facts = json.loads((tmp_path / "bank.json").read_text())
    assert (facts["format"], facts["kind"], facts["options"]) == (1, "gated_deltanet", {})
    for new in ("specs", "num_model_layers", "sealed", "crc32"):
        del facts[new]
    (tmp_path / "bank.json").write_text(json.dumps(facts))
    loaded = load_bank(tmp_path, teacher=teacher)
    assert (loaded.layers, loaded.fingerprint, loaded.spec(2)) == ([1, 2], bank.fingerprint, bank.specs[0])


def test_kinds_must_differ(teacher):
    with pytest.raises(RecipeError, match="gated_deltanet twice"):
        distill(teacher, token_blocks(), mixer=["gated_deltanet", "gated_deltanet"], **SETTINGS)
    window = {"kind": "gated_deltanet", "options": {"window": 8}}
    bank = distill(teacher, token_blocks(), mixer=["gated_deltanet", window], layers=[0], **SETTINGS)
    assert bank.kinds == ["gated_deltanet", "gated_deltanet window=8"]
    with pytest.raises(RecipeError, match=r"mixer\.options"):
        distill(teacher, token_blocks(), mixer=["gated_deltanet", {"kind": "jet_block", "options": {"no": 1}}])


def mixed_table(seed: int) -> Table:
    """Every choice of at most one mixer for each of three layers, with ties."""
    rng = random.Random(seed)
    places = [(None, layer, layer + 10) for layer in range(3)]
    choices = [tuple(n for n in choice if n is not None) for choice in itertools.product(*places)]
    return Table({choice: acc(rng.randrange(2, 9) / 10, rng.choice((-1.0, -2.0))) for choice in choices})


@pytest.mark.parametrize("seed", range(8))
def test_exact_takes_the_best_layer_and_kind_at_every_step(seed):
    table = mixed_table(seed)
    trace = search(table, layers=LAYER_OF, p_min=0.2, layer_of=LAYER_OF, num_model_layers=3, run_to_end=True)
    linear = frozenset()
    for step in trace.steps:
        left = [n for n in LAYER_OF if LAYER_OF[n] not in {LAYER_OF[m] for m in linear}]
        scores = {n: table.scores[linear | {n}] for n in left}
        assert set(step.candidates) == set(left)
        assert step.layer == min(left, key=lambda n: (-scores[n].value, -scores[n].log_likelihood, n))
        linear |= {step.layer}
    assert len(trace.steps) == 3
    assert trace.num_candidate_evaluations == 6 + 4 + 2


@pytest.mark.parametrize("strategy", ["auto", "uniform", "random", "lowest_mse", "one_shot"])
def test_every_strategy_replaces_a_layer_once(strategy):
    facts = {"nmse": {0: 0.3, 1: 0.2, 2: 0.5, 10: 0.1, 11: 0.4, 12: 0.2}}
    options = {"layer_of": LAYER_OF, "num_model_layers": 3, "run_to_end": True, "strategy": strategy}
    trace = search(mixed_table(3), layers=LAYER_OF, p_min=0.2, facts=facts.__getitem__, **options)
    assert sorted(LAYER_OF[n] for n in trace.steps[-1].linear) == [0, 1, 2]
    if strategy in ("uniform", "lowest_mse", "restore"):
        assert trace.steps[-1].linear == (1, 10, 12)
    assert "All 3 candidate layers" in trace.stop_text or trace.stop_reason == "p_min"


@pytest.mark.parametrize(("p_min", "most", "num_opt"), [(0.76, None, 16), (0.772, None, 14), (0.772, 5, 5)])
def test_auto_takes_the_kind_of_each_layer_that_costs_least(p_min, most, num_opt):
    """Sixteen layers of two kinds: the kind with the higher error on text is the better one for the task."""
    num, better = 16, {layer: layer + 100 * (layer % 2) for layer in range(16)}
    layer_of = {n: n % 100 for layer in range(num) for n in (layer, layer + 100)}

    def score(linear, *, base, items=None):
        loss = sum(0.002 if better[layer_of[n]] == n else 0.02 for n in linear)
        count = 40 if items is None else len(items)
        return acc(0.8 - loss, -loss, (0.8 - loss,) * count)

    # As if prompts were shared, since all items rank the kinds.
    score.pass_share = 0.2
    facts = {"nmse": {n: 0.1 if n < 100 else 0.2 for n in layer_of}}
    options = {"layer_of": layer_of, "num_model_layers": num, "strategy": "auto", "facts": facts.__getitem__}
    trace = search(score, layers=list(layer_of), p_min=p_min, budget=Budget(num_linear=most), **options)
    assert len(trace.m_opt.layers) == num_opt
    assert set(trace.m_opt.layers) <= set(better.values())
    assert f"found {num_opt} of them to go together" in trace.reason


def test_work_is_counted_by_layers():
    meter = PassMeter(num_layers=4, num_items=1, layer_of={0: 0, 1: 1, 2: 2, 3: 3, 7: 3})
    meter.add(frozenset({7}), base=frozenset(), items=[0])
    assert meter.passes == 1
    meter.add(frozenset({3}), base=frozenset(), items=[0])
    assert meter.passes == 1.25


def test_search_chooses_kinds_on_a_model(teacher, bank, place, tmp_path):
    task = load_task(str(place / "task"), num_test=8)
    journal = tmp_path / "journal.jsonl"
    options = {"strategy": "exact", "p_min": 0.5, "p_min_confidence": None, "run_to_end": True, "journal": journal}
    events = []
    result = search_model(teacher, bank, task, on_event=events.append, **options)
    numbers = result.trace.m_opt.layers
    by_hand = {bank.layer_of[n]: bank.mixers[n] for n in numbers}
    hybrid = make_hybrid(teacher.model, by_hand, {bank.layer_of[n]: bank.spec(n) for n in numbers})
    score = evaluate(hybrid, task, split="validation", tokenizer=teacher.tokenizer)
    assert score.per_item == result.trace.m_opt.score.per_item
    assert result.m_opt.config.mixers == hybrid.config.mixers
    seen = [e for e in events if e["event"] == "candidate"]
    assert {(e["layer"], e["kind"]) for e in seen[:8]} == set(itertools.product(range(4), bank.kinds))
    events.clear()
    again = search_model(teacher, bank, task, on_event=events.append, **options)
    assert again.trace == result.trace
    assert all(e["replayed"] for e in events if e["event"] == "candidate")


def test_the_table_of_strategies_speaks_of_layers_and_kinds(teacher, bank, place):
    task = load_task(str(place / "task"))
    (row,) = compare_strategies(teacher, bank, task, strategies=["one_shot"], p_min=0.01)
    assert sorted(row["order"]) == bank.layers
    assert set(row["kinds"]) <= {spec["kind"] for spec in bank.specs}
    assert len(row["kinds"]) == len(row["order"])
    assert set(row["at_share"]) == {"0.5", "0.75", "0.9"}


def test_the_backend_that_is_told_is_that_of_the_bank(teacher, place):
    """Not that of the recipe's mixer, which a bank that is given makes meaningless."""
    recipe, told = read_recipe(place / "recipe.yaml"), []
    mixers = [make_mixer(kind, teacher.geometry, 0) for kind in ("retention", "kimi_delta_attention")]
    bank = SimpleNamespace(mixers=dict(enumerate(mixers)))
    tell_backends(recipe, teacher, bank, told.append)
    plain, channels = told
    assert plain["reason"] == "this mixer has plain operations alone"
    assert "channel delta rule" in channels["reason"]
    tell_backends(recipe, teacher, None, told.append)
    assert [event["event"] for event in told] == ["backend"] * 3
    assert told[2]["reason"] not in (plain["reason"], channels["reason"])


def test_the_whole_path_through_the_command_line(place, tmp_path, monkeypatch, capsys):
    def dtr(*args):
        monkeypatch.setattr(sys, "argv", ["dtr", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    out, recipe = tmp_path / "run", place / "recipe.yaml"
    options = ["--mixer", "gated_deltanet,gated_linear_attention", "--set", "search.run_to_end=false"]
    options += ["--set", "distill.num_tokens=1024", "--set", "search.test_curve=false"]
    assert "mean NMSE" in dtr("distill", recipe, "--out", out, *options, "--progress", "quiet")
    # A bank that is there is taken up by the run.
    dtr("run", recipe, "--out", out, *options, "--resume", "--progress", "json")
    report = json.loads((out / "report.json").read_text())
    kinds = ["gated_deltanet", "gated_linear_attention"]
    assert report["mixer"]["kinds"] == kinds
    assert [(row["layer"], row["kind"]) for row in report["distill"]["nmse"]] == [*itertools.product(range(4), kinds)]
    assert set(report["distill"]["mean_nmse_by_kind"]) == set(kinds)
    opt = report["m_opt"]
    assert len(report["search"]["steps"][0]["candidates"]) == 8
    model = AutoModelForCausalLM.from_pretrained(out / "hybrid")
    assert {i: spec["kind"] for i, spec in enumerate(model.config.mixers) if spec} == dict(
        zip(opt["layers"], opt["kinds"])
    )
    card, page = (out / "hybrid" / "README.md").read_text(), (out / "report.html").read_text()
    assert f"{opt['layers'][0]} ({opt['kinds'][0]})" in card
    assert all(f"- {kind}" in card for kind in kinds)
    assert f"linear ({opt['kinds'][0]}), replaced as number 1" in page
    assert "gated_linear_attention after" in page
    legend = json.loads((out / "search.json").read_text())["mixers"]
    assert legend["4"] == {"layer": 0, "kind": "gated_linear_attention"}
