"""Strategies on simulated tasks whose truth is known, and on dictionaries worked out by hand."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from score_tables import Table, acc, ppl, table

from dtr.errors import DataError, RecipeError
from dtr.selection import auto as auto_module
from dtr.selection.criteria import Limits
from dtr.selection.gains import estimate_gains
from dtr.selection.items import split_items
from dtr.selection.journal import Journal
from dtr.selection.meter import PassMeter
from dtr.selection.simulation import PRESETS, SimulatedTask
from dtr.selection.state import Budget
from dtr.selection.strategies import STRATEGIES, GuardTask, select_layers
from dtr.selection.trace import SearchTrace
from dtr.selection.trials import simulate_stops

NUM_LAYERS = 30


def run(task: Any, strategy: str, *, num_items: int = 500, layers: Sequence[int] = range(NUM_LAYERS), **options: Any):
    options = {"facts": lambda name: dict.fromkeys(range(99), 0.5), **options}
    limits = Limits(p_min=options.pop("p_min", 0.95), p_min_kind=options.pop("p_min_kind", "relative"))
    limits = options.pop("limits", limits)
    if isinstance(task, SimulatedTask):
        options.setdefault("items", split_items(num_items))
    return select_layers(task, layers=layers, limits=limits, strategy=strategy, **options)


def additive_table(damages: Sequence[float]) -> Table:
    """Every subset loses the sum of its layers' damages."""
    subsets = [[i for i in range(len(damages)) if bits >> i & 1] for bits in range(2 ** len(damages))]
    return Table({tuple(s): acc(0.8 - sum(damages[i] for i in s)) for s in subsets})


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_what_a_strategy_hands_on_is_what_it_measured(strategy: str):
    task = SimulatedTask(PRESETS["arc_easy"], num_layers=12, num_items=200, seed=3)
    trace: SearchTrace = run(task, strategy, num_items=200, layers=range(12))
    assert (trace.strategy, trace.stop_reason is not None) == (strategy, True)
    assert trace.m_opt.score.value >= trace.p_min_value - 1e-9
    assert trace.m_opt.score == task(frozenset(trace.m_opt.layers), base=frozenset(), items=range(200))
    assert len(set(trace.m_opt.layers)) == len(trace.m_opt.layers)
    reached: tuple[int, ...] = ()
    for step in trace.steps:
        reached += step.added
        assert (step.index, set(step.linear), step.layer) == (len(reached), set(reached), step.added[-1])
        assert step.accepted == (step.index <= len(trace.m_opt.layers))
    if strategy == "auto":
        assert trace.reason


@pytest.mark.parametrize("strategy", ["auto", "exact", "lazy", "restore", "one_shot"])
def test_additive_damages_leave_no_doubt(strategy: str):
    # 0.8 may fall to 0.6: damages 0.01, 0.02, 0.05 and 0.11 fit together, 0.2 and 0.3 do not.
    score = additive_table([0.3, 0.02, 0.11, 0.05, 0.01, 0.2])
    trace = run(score, strategy, layers=range(6), p_min=0.75)
    assert set(trace.m_opt.layers) == {4, 1, 3, 2}
    if strategy != "restore":
        assert trace.m_opt.layers == (4, 1, 3, 2)


def test_lazy_asks_for_less_and_finds_the_same():
    damages = [0.013, 0.002, 0.011, 0.005, 0.001, 0.02, 0.03, 0.017]
    exact, lazy = additive_table(damages), additive_table(damages)
    expected, found = run(exact, "exact", layers=range(8)), run(lazy, "lazy", layers=range(8))
    assert found.m_opt == expected.m_opt
    assert len(lazy.calls) < 0.7 * len(exact.calls)


def test_the_block_that_restore_commits_is_ranked_or_says_that_it_is_not():
    damages = [0.3, 0.02, 0.11, 0.05, 0.01, 0.2]
    trace = run(additive_table(damages), "restore", layers=range(6), p_min=0.75)
    assert trace.steps[0].is_ranked
    assert trace.m_opt.layers == (4, 1, 3, 2)
    easy = run(additive_table([0.03, 0.01, 0.02]), "restore", layers=range(3), p_min=0.5)
    assert easy.m_opt.layers == (0, 1, 2)
    assert not easy.steps[0].to_dict()["is_ranked"]
    assert "means nothing" in easy.reason


def test_restore_keeps_only_the_layers_that_matter():
    score = additive_table([0.001, 0.2, 0.002, 0.15, 0.001])
    trace = run(score, "restore", layers=range(5), run_to_end=True)
    assert trace.m_opt.layers == (0, 4, 2)
    assert [(s.index, s.layer, s.accepted) for s in trace.steps] == [(3, 2, True), (4, 3, False), (5, 1, False)]
    assert trace.stop_text == "With layer 3 linear as well, acc would be 0.646."


def test_baselines_follow_their_numbers():
    score = additive_table([0.001] * 5)
    numbers = {"nmse": [3, 1, 4, 1.5, 9], "kl": [0.2, 0.1, 0.5, 0.4, 0.3], "impact": [5, 4, 3, 2, 1]}
    facts = lambda name: dict(enumerate(numbers[name]))  # noqa: E731
    order = lambda name: run(score, name, layers=range(5), facts=facts).m_opt.layers  # noqa: E731
    assert order("lowest_mse") == (1, 3, 0, 2, 4)
    assert order("kl") == (1, 0, 4, 3, 2)
    assert order("impact") == (4, 3, 2, 1, 0)
    # Positions 0, 4, 2, 1, 3 of five are spread at any number of layers.
    assert order("uniform") == (0, 4, 2, 1, 3)
    assert order("random") == order("random")
    with pytest.raises(RecipeError, match="no impact known of layers"):
        run(score, "impact", layers=range(5), facts=lambda name: {})


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_auto_is_as_good_as_exact_for_25_passes(preset: str):
    """With prompts shared as four choices to a question share them on ARC-easy."""
    found: dict[str, list[SimulatedTask]] = {"exact": [], "auto": []}
    traces: dict[str, list[SearchTrace]] = {"exact": [], "auto": []}
    for seed in range(3):
        for strategy, tasks in found.items():
            tasks.append(SimulatedTask(PRESETS[preset], num_items=250, seed=seed, pass_share=0.46))
            traces[strategy].append(run(tasks[-1], strategy, num_items=250))
    passes = {strategy: [task.pass_equivalents for task in tasks] for strategy, tasks in found.items()}
    assert max(passes["auto"]) <= 25
    layers = {s: [len(trace.m_opt.layers) for trace in traces[s]] for s in traces}
    assert statistics.fmean(layers["auto"]) >= statistics.fmean(layers["exact"]) - 1
    if preset not in ("hard", "pairs"):
        # On the hard ones, which end half way, 15 % of the runs are short, see dev/LOG.md.
        assert all(ours >= theirs - 1 for ours, theirs in zip(layers["auto"], layers["exact"]))
    # Of the same number of layers, as one strategy that goes further gives up more for it.
    truth: dict[str, list[float]] = {"exact": [], "auto": []}
    for index in range(3):
        num = min(len(traces[s][index].m_opt.layers) for s in traces)
        for s in traces:
            truth[s].append(found[s][index].truth(frozenset(traces[s][index].m_opt.layers[:num])))
    assert statistics.fmean(truth["auto"]) >= statistics.fmean(truth["exact"]) - 0.01


def test_auto_goes_down_where_a_tenth_of_the_items_says_nothing():
    """The tasks on which it once ended 2, 9 and 13 layers short: it committed early what those few items let pass."""
    for preset, seed, least in (("measured", 3, 28), ("measured", 7, 24), ("near_limit", 9, 28)):
        task = SimulatedTask(PRESETS[preset], num_items=250, seed=seed, pass_share=0.46)
        trace = run(task, "auto", num_items=250)
        assert len(trace.m_opt.layers) >= least
        assert task.pass_equivalents <= 25
        assert "attention was given back" in trace.reason


def test_auto_going_down_heeds_a_guard_and_says_what_is_ranked():
    task = SimulatedTask(PRESETS["measured"], num_items=250, seed=0, pass_share=0.46)
    free = run(task, "auto", num_items=250)
    assert free.steps[0].is_ranked
    spared = free.m_opt.layers[0]

    def recall(linear: frozenset[int], *, base: frozenset[int]):
        return acc(1.0 - 0.5 * (spared in linear))

    trace = run(task, "auto", num_items=250, guards=[GuardTask(name="recall", score=recall, p_min=0.8)])
    assert spared not in trace.m_opt.layers
    assert len(trace.m_opt.layers) > 10
    assert trace.guards[0].m_opt.value == 1.0


def test_estimates_that_tie_are_set_apart_by_likelihood():
    """Where no item changes sides; so a certificate does not begin with the layers of the lowest numbers."""
    base = acc(0.6, items=(1.0, 1.0, 0.0, 1.0, 0.0))
    moves = {0: -0.3, 1: 0.1, 2: -0.1, 3: 0.2, 4: -0.2}
    after = {layer: replace(base, log_likelihood=base.log_likelihood + move) for layer, move in moves.items()}
    gains = estimate_gains(base, after)
    assert sorted(gains, key=gains.__getitem__) == [0, 4, 2, 1, 3]
    assert max(abs(gain) for gain in gains.values()) < 1e-3


def test_auto_ends_as_exact_does_and_spends_what_shared_prompts_save():
    found: dict[float, list[int]] = {1.0: [], 0.3: []}
    for preset, seed in itertools.product(("near_limit", "arc_easy", "hard"), range(4)):
        for pass_share, sizes in found.items():
            task = SimulatedTask(PRESETS[preset], num_items=250, seed=seed, pass_share=pass_share)
            trace = run(task, "auto", num_items=250)
            assert task.pass_equivalents <= 25
            sizes.append(len(trace.m_opt.layers))
            if trace.stop_reason == "p_min":
                # No layer was left out because half of the items were against it.
                assert set(trace.steps[-1].candidates) == set(range(30)) - set(trace.m_opt.layers)
            elif trace.stop_reason == "budget":
                assert task.pass_equivalents > 20
                assert "passes, with" in trace.stop_text
    assert statistics.fmean(found[0.3]) > statistics.fmean(found[1.0])


def test_layers_chosen_anew_make_the_hybrid_better_or_leave_it(monkeypatch):
    """Also where the time is spent in the middle of it."""
    exchange, gains = auto_module.exchange, []
    for seed in range(6):
        found, calls = {}, {}
        for name, seconds in (("without", None), ("whole", None), ("cut", "half way")):
            monkeypatch.setattr(auto_module, "exchange", exchange if name != "without" else lambda *_, **__: None)
            task = SimulatedTask(PRESETS["pairs"], num_items=250, seed=seed, pass_share=0.33)
            clock = itertools.count()
            limit = (calls["without"] + calls["whole"]) // 2 if seconds else 10**6
            budget = Budget(seconds=limit)
            found[name] = run(task, "auto", num_items=250, budget=budget, clock=clock.__next__).m_opt
            calls[name] = next(clock)
            assert task.pass_equivalents <= 25
        for name in ("whole", "cut"):
            ours, theirs = (
                (len(x.layers), x.score.value, x.score.log_likelihood) for x in (found[name], found["without"])
            )
            assert ours >= theirs
        gains.append(len(found["whole"].layers) - len(found["without"].layers))
    assert sum(gains) > 0


def test_auto_says_when_there_was_nothing_to_choose():
    task = SimulatedTask(PRESETS["easy"], num_items=500, seed=0)
    trace = run(task, "auto")
    assert len(trace.m_opt.layers) == NUM_LAYERS
    assert trace.stop_reason == "all_linear"
    # The teacher, the all-linear model, and a ranking on a tenth of the items for the order of the path.
    assert task.pass_equivalents < 5
    assert "nothing to choose" in trace.reason


def test_interrupted_races_resume_from_the_journal(tmp_path: Path):
    expected = run(SimulatedTask(PRESETS["arc_easy"], num_items=300, seed=8), "auto", num_items=300)

    class Interrupted:
        def __init__(self, at: int) -> None:
            self.task, self.at, self.calls = SimulatedTask(PRESETS["arc_easy"], num_items=300, seed=8), at, []

        def __call__(self, linear, *, base, items=None):
            if len(self.calls) == self.at:
                raise KeyboardInterrupt
            self.calls.append((linear, None if items is None else tuple(items)))
            return self.task(linear, base=base, items=items)

    for at in (0, 1, 20, 60):
        path = tmp_path / f"{at}.jsonl"
        options = {"num_items": 300, "items": split_items(300)}
        first, second = Interrupted(at), Interrupted(10**6)
        with Journal(path, identity={"seed": 0}) as journal, pytest.raises(KeyboardInterrupt):
            select_layers(
                first, layers=range(30), limits=Limits(p_min=0.95), strategy="auto",
                items=options["items"], journal=journal,
            )  # fmt: skip
        with Journal(path, identity={"seed": 0}, resume=True) as journal:
            found = select_layers(
                second, layers=range(30), limits=Limits(p_min=0.95), strategy="auto",
                items=options["items"], journal=journal,
            )  # fmt: skip
        assert found == expected
        assert set(Counter(first.calls + second.calls).values()) == {1}


def test_a_guard_refuses_the_swap_that_breaks_its_floor():
    score = table(full=0.6, l0=0.6, l1=0.59, l2=0.58, l01=0.6, l02=0.58, l12=0.57, l012=0.6)
    guard = Table({(): acc(1.0), (0,): acc(0.5), (1,): acc(0.95), (2,): acc(0.97), (1, 2): acc(0.92)})
    events: list[dict[str, Any]] = []
    guards = [GuardTask(name="recall", score=guard, p_min=0.9)]
    for strategy in ("exact", "lazy", "auto"):
        trace = run(score, strategy, layers=range(3), guards=guards, on_event=events.append)
        assert trace.m_opt.layers == (1, 2)
        assert trace.stop_reason == "guard"
        assert trace.stop_text == "Layers 0 are left, and each would break a floor of recall."
    assert {"event": "refused", "layers": [0], "guard": "recall", "num_linear": 1} in events
    assert (trace.guards[0].floor, trace.guards[0].m_opt.value) == (0.9, 0.92)


def test_a_guard_holds_back_leaps_too():
    task = SimulatedTask(PRESETS["easy"], num_items=300, seed=1)

    def recall(linear: frozenset[int], *, base: frozenset[int]):
        return acc(1.0 - 0.5 * (7 in linear) - 0.01 * len(linear))

    trace = run(task, "auto", num_items=300, guards=[GuardTask(name="recall", score=recall, p_min=0.8)])
    assert 7 not in trace.m_opt.layers
    assert 15 <= len(trace.m_opt.layers) <= 20


def test_a_floor_that_the_teacher_misses_is_refused():
    guard = GuardTask(name="recall", score=table(full=ppl(20)), p_min=19.0, p_min_kind="absolute")
    score = table(full=0.6)
    with pytest.raises(RecipeError, match=r"search\.guards \(recall\)\.p_min.*teacher itself misses"):
        run(score, "exact", layers=range(2), guards=[guard])
    assert len(score.calls) == 1


@pytest.mark.parametrize("strategy", ["exact", "lazy", "restore", "auto", "uniform"])
def test_a_budget_of_layers_ends_the_search(strategy: str):
    budget = Budget(num_linear=11, num_linear_text="the cache fits")
    trace = run(SimulatedTask(PRESETS["easy"], num_items=300, seed=2), strategy, num_items=300, budget=budget)
    assert len(trace.m_opt.layers) == 11
    assert (trace.stop_reason, trace.stop_text) == ("budget", "11 layers are linear, the cache fits.")


def test_a_budget_of_seconds_keeps_what_is_in_hand():
    options = {"budget": Budget(seconds=4), "clock": iter(range(10**6)).__next__}
    trace = run(additive_table([0.01, 0.02, 0.03]), "exact", layers=range(3), p_min=0.5, **options)
    assert trace.m_opt.layers == (0,)
    assert (trace.stop_reason, trace.stop_text) == ("budget", "The budget of 4 seconds is spent.")


def flipping(num_items: int, lost: dict[int, int]) -> Table:
    """The teacher has all items right; each layer loses its own few."""
    scores = {}
    for bits in range(2 ** len(lost)):
        chosen = tuple(layer for layer in lost if bits >> layer & 1)
        num_lost = sum(lost[layer] for layer in chosen)
        items = (0.0,) * num_lost + (1.0,) * (num_items - num_lost)
        scores[chosen] = replace(acc(1 - num_lost / num_items, items=items), num_items=num_items)
    return Table(scores)


@pytest.mark.parametrize("strategy", ["auto", "exact", "lazy", "restore", "one_shot"])
def test_a_safety_keeps_its_distance_from_the_limit(strategy):
    table = flipping(400, {0: 4, 1: 6, 2: 8})
    sizes = []
    for safety in (0, 1.5, 3):
        trace = run(table, strategy, layers=range(3), limits=Limits(p_min=0.95, safety=safety))
        sizes.append(len(trace.m_opt.layers))
        assert trace.safety == safety
    # 18, 10 and 4 of the 20 items that the limit allows: 0.5, 2.3 and 3.7 standard errors.
    assert sizes == [3, 2, 1]
    if strategy == "exact":
        assert "standard errors from the limit of 0.95; search.safety asks for 3." in trace.stop_text


def test_a_safety_needs_items():
    with pytest.raises(DataError, match=r"search\.safety: got 400 validation items, too few for 9 standard errors"):
        run(flipping(400, {0: 1}), "exact", layers=range(1), limits=Limits(p_min=0.95, safety=9))
    with pytest.raises(RecipeError, match=r"search\.safety: got -1"):
        run(flipping(400, {0: 1}), "exact", layers=range(1), limits=Limits(p_min=0.95, safety=-1))


def test_a_safety_holds_more_often_than_the_plain_limit():
    found = simulate_stops(16, safeties=(0, 2), confidences=(0.8,), presets=("hard",), num_layers=12, num_items=400)
    plain, safe, sure = found["stops"].values()
    assert safe["violations"] < 0.5 * plain["violations"]
    assert 1 < safe["mean_layers"] < plain["mean_layers"]
    assert sure["violations"] < plain["violations"]


def test_unknown_strategy():
    with pytest.raises(RecipeError, match=r"search\.strategy: got 'exat'.*Did you mean 'exact'"):
        run(table(full=0.6), "exat")


def test_items_are_split_once_and_for_all():
    split = split_items(500, confirmation_share=0.4, seed=3)
    assert split == split_items(500, confirmation_share=0.4, seed=3) != split_items(500, confirmation_share=0.4, seed=4)
    assert [len(block) for block in split.blocks] == [300]
    assert sorted(split.selection + split.confirmation) == list(range(500))
    assert [len(block) for block in split_items(500).blocks] == [50, 50, 150, 250]
    assert len(split_items(100).blocks) == 1


def test_the_meter_counts_what_an_evaluator_runs():
    meter = PassMeter(num_layers=4, num_items=2)
    empty, one = frozenset(), frozenset({1})
    meter.add(empty, base=empty, items=(0, 1))
    assert meter.passes == 1
    # The base is known: layers 1 to 3 run anew, for one item of two.
    meter.add(one, base=empty, items=(0,))
    assert meter.passes == pytest.approx(1 + 3 / 8)
    meter.add(one, base=empty, items=(0,))
    assert meter.passes == pytest.approx(1 + 3 / 8)
    # A new base is known up to its first change: layers 1 and 2 of it, then layer 3 of the candidate.
    meter.add(frozenset({1, 3}), base=one, items=(0, 1))
    assert meter.passes == pytest.approx(1 + 3 / 8 + 3 / 4)


def test_likelihood_finds_what_few_items_hide():
    """Estimates from a tenth of the items rank layers better than their plain differences do."""
    plain_error, error = 0.0, 0.0
    for seed in range(6):
        task = SimulatedTask(PRESETS["hard"], num_items=500, seed=seed)
        items = split_items(500, seed=seed).blocks[0]
        before = task(frozenset(), base=frozenset(), items=items)
        after = {layer: task(frozenset({layer}), base=frozenset(), items=items) for layer in range(NUM_LAYERS)}
        truth = {layer: task.truth(frozenset({layer})) - task.truth(frozenset()) for layer in after}
        gains = estimate_gains(before, after)
        plain_error += sum((after[layer].value - before.value - truth[layer]) ** 2 for layer in after)
        error += sum((gains[layer] - truth[layer]) ** 2 for layer in after)
    assert error < 0.6 * plain_error
