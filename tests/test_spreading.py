"""A search on two processes with gloo takes the path of one, with one journal, and ends when a rank does."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import forks
import pytest
from tiny import CHEAP, pico_teacher

from dtr.arch import decoder_layers
from dtr.distillation.bank import MixerBank
from dtr.mixers import mixer_from_teacher
from dtr.selection.search import search
from dtr.selection.settings import GuardFloor
from dtr.tasks import load_task

NUM_LAYERS = 9
STRATEGIES = ("exact", "auto", "kl")
LIMITS = {"p_min": 0.9, "p_min_confidence": None, "test_curve": True, "max_linear_layers": 3}

DOWN = {"p_min": 1.0, "max_linear_layers": None, "journal": None}
"""With which the path of `auto` is not ended by a number of layers."""

WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
from test_spreading import DOWN, STRATEGIES, find, guards, make_bank, make_task, pico_teacher, summary, NUM_LAYERS
from dtr.distributed import join_world
from dtr.errors import DtrError
from dtr.evaluation.evaluator import Evaluator

torch.set_num_threads(1)
folder = Path(sys.argv[1])
world, _ = join_world(torch.device("cpu"))
teacher, task = pico_teacher(num_layers=NUM_LAYERS), make_task(folder)
bank = make_bank(teacher)
own_work = Evaluator.__call__
asked = []

def count(self, linear=frozenset(), **options):
    asked.append(linear)
    return own_work(self, linear, **options)

Evaluator.__call__ = count
found = {"exact": summary(find(teacher, bank, task, "exact", folder))}
# Of exact alone: what auto asks one after the other cannot be shared.
shares = world.collect(len(asked))
found |= {name: summary(find(teacher, bank, task, name, folder)) for name in STRATEGIES if name != "exact"}
# Half a journal, as an interruption leaves it: all go on from there.
whole = (folder / "exact.jsonl").read_bytes()
world.wait()
if world.is_first:
    (folder / "exact.jsonl").write_bytes(b"\\n".join(whole.split(b"\\n")[:9]))
world.wait()
found["resumed"] = summary(find(teacher, bank, task, "exact", folder))
found["timed"] = summary(find(teacher, bank, task, "exact", folder, max_seconds=600))
found["guarded"] = summary(find(teacher, bank, task, "one_shot", folder, guards=guards(task), journal=None))
found["down"] = summary(find(teacher, bank, task, "auto", folder, **DOWN))
assert world.collect(found) == [found] * 2
if world.is_first:
    (folder / "found.json").write_text(json.dumps({**found, "shares": shares}))

def fail(self, linear=frozenset(), **options):
    if world.rank == 1 and len(linear) == 2:
        raise MemoryError("no room on this device")
    return own_work(self, linear, **options)

Evaluator.__call__ = fail
try:
    find(teacher, bank, task, "exact", folder, journal=None)
except (DtrError, MemoryError) as error:
    (folder / f"failed{world.rank}.txt").write_text(str(error))

def die(self, linear=frozenset(), **options):
    if world.rank == 1 and len(linear) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return own_work(self, linear, **options)

Evaluator.__call__ = die
find(teacher, bank, task, "exact", folder, journal=None)
"""


def make_bank(teacher):
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {
        i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, a, CHEAP).eval() for i, a in enumerate(attention)
    }
    return MixerBank(
        specs=[{"kind": "gated_deltanet", **CHEAP}],
        mixers=mixers,
        num_model_layers=len(mixers),
        teacher_fingerprint=teacher.fingerprint,
        geometry=teacher.geometry,
        nmse_after={i: 1.0 / (i + 1) for i in mixers},
    )


def make_task(folder):
    rng = random.Random(6)
    rows = [{"question": f"{index:03d}?", "choices": ["a", "b"], "answer": 1 - rng.randrange(2)} for index in range(90)]
    for split, chosen in {"validation": rows[:70], "test": rows[70:]}.items():
        if not (folder / f"{split}.jsonl").exists():
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    return load_task(str(folder), metric="acc")


def guards(task):
    return [GuardFloor(task=task, p_min=0.95)]


def find(teacher, bank, task, strategy, folder, **options):
    options = {"journal": folder / f"{strategy}.jsonl", **LIMITS, **options}
    return search(teacher, bank, task, strategy=strategy, **options)


def summary(result):
    """All that must be alike: the whole trace, the test scores, and the work."""
    return json.loads(
        json.dumps(
            {
                "trace": result.trace.to_dict(with_items=True),
                "test": [score.to_dict(with_items=True) for score in (result.m_opt_test, *result.test_curve)],
                "pass_equivalents": result.pass_equivalents,
            }
        )
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    make_task(folder)
    (folder / "worker.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    ranks = forks.run_ranks(2, folder / "worker.py", folder, env=env)
    errors = [rank.stderr for rank in ranks]
    assert (folder / "found.json").exists(), "\n".join(errors)
    return folder, [rank.returncode for rank in ranks], errors


def test_two_ranks_take_the_path_of_one(together, tmp_path):
    folder, _, _ = together
    found = json.loads((folder / "found.json").read_text())
    teacher, task = pico_teacher(num_layers=NUM_LAYERS), make_task(tmp_path)
    bank = make_bank(teacher)
    for name in STRATEGIES:
        alone = summary(find(teacher, bank, task, name, tmp_path))
        assert found[name]["trace"] == alone["trace"], name
        assert found[name]["test"] == alone["test"], name
        # Ranks that share a base each make its hidden states: more work in all, and less for each.
        assert alone["pass_equivalents"] <= found[name]["pass_equivalents"] + 1e-9
    alone = summary(find(teacher, bank, task, "auto", tmp_path, **DOWN))
    assert found["down"]["trace"] == alone["trace"]
    assert "ranked by the mean loss" in alone["trace"]["reason"]
    assert found["resumed"]["trace"] == found["exact"]["trace"]
    assert found["resumed"]["pass_equivalents"] < found["exact"]["pass_equivalents"]
    assert found["timed"]["trace"] == found["exact"]["trace"]
    assert found["guarded"]["trace"]["guards"][0]["m_opt"]["value"] >= found["guarded"]["trace"]["guards"][0]["floor"]
    first, second = found["shares"]
    assert 0.5 < second / first <= 1


def test_only_the_first_rank_writes_the_journal(together, tmp_path):
    folder, _, _ = together
    teacher, task = pico_teacher(num_layers=NUM_LAYERS), make_task(tmp_path)
    find(teacher, make_bank(teacher), task, "auto", tmp_path)
    assert (folder / "auto.jsonl").read_text() == (tmp_path / "auto.jsonl").read_text()


def test_a_rank_that_fails_or_dies_ends_all_with_the_reason(together):
    folder, returncodes, errors = together
    assert (folder / "failed1.txt").read_text() == "no room on this device"
    assert "rank 1: got MemoryError: no room on this device" in (folder / "failed0.txt").read_text()
    assert returncodes == [1, -9]
    assert "no answer from another rank" in errors[0]
