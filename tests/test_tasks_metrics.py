"""Metrics: by name, by import path, and by running code."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from tiny import pico_teacher

from dtr.errors import DataError, DeviceError, RecipeError
from dtr.evaluation.evaluator import evaluate
from dtr.tasks import load_task
from dtr.tasks.base import Generation, Likelihood
from dtr.tasks.metrics import TEXT_METRICS, f1, find_metric
from dtr.tasks.sandbox import is_isolated, passes

FUNCTIONS = """
import math

def overlap(written, accepted):
    return max(len(set(written.split()) & set(a.split())) for a in accepted) / 2

def not_a_number(written, accepted):
    return math.nan if "wrong" in written else 1

def text(written, accepted):
    return "good"

def broken(written, accepted):
    return accepted[7]

NUMBER = 7
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own_scores.py").write_text(FUNCTIONS)
    # Another test of this process may have imported a module of this name.
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("own_scores", None)


def write(folder: Path, **row) -> str:
    for split in ("validation", "test"):
        rows = [{k: f"{split} {v}" if k == "prompt" else v for k, v in row.items()}]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def grade(task, text: str) -> float:
    return task.grade(task.splits["test"][0], [Generation(text=text), *likely(task)]).value


def likely(task) -> list[Likelihood]:
    num_requests = len(task.splits["test"][0].requests)
    return [Likelihood(log_prob=-1.0, is_greedy=False, num_tokens=1)] * (num_requests - 1)


@pytest.mark.parametrize(
    ("written", "accepted", "expected"),
    [
        ("The river, red!", ["a red river"], 1.0),
        ("red", ["red river"], 2 / 3),
        ("red red red", ["red"], 0.5),
        ("blue", ["red river"], 0.0),
        ("lake", ["red river", "lake"], 1.0),
        ("", ["red"], 0.0),
        ("the", ["a"], 0.0),
        ("", ["A"], 0.0),
        ("a", ["A"], 1.0),
        ("東京は首都", ["東京が首都"], 0.8),
        ("हाँ, राम।", ["राम हाँ"], 1.0),
    ],
)
def test_f1_as_in_squad(written, accepted, expected):
    assert f1(written, accepted) == pytest.approx(expected)


def test_f1_is_a_mean_over_items(tmp_path):
    task = load_task(write(tmp_path, prompt="p", answer="red river"), metric="f1")
    assert grade(task, "the river") == pytest.approx(2 / 3)
    score = evaluate(pico_teacher(), task)
    assert (score.metric, score.num_items) == ("f1", 1)


def test_rouge_l(tmp_path):
    pytest.importorskip("rouge_score", reason="needs the extra rouge")
    task = load_task(write(tmp_path, prompt="p", answer="the cat sat on the mat"), metric="rouge_l")
    # Four words in order of six and of four: precision 1, recall 2/3.
    assert grade(task, "the cat on mats") == pytest.approx(0.8)


def test_rouge_without_its_library_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    from dtr.tasks import metrics

    metrics._rouge_scorer.cache_clear()
    with pytest.raises(DeviceError, match=r"distill-then-replace\[rouge\]"):
        load_task(write(tmp_path, prompt="p", answer="a"), metric="rouge_l")


def test_a_function_by_import_path(functions):
    task = load_task(write(functions, prompt="p", answer="red river"), metric="own_scores:overlap")
    assert (task.metric, grade(task, "a red lake")) == ("own_scores:overlap", 0.5)
    assert evaluate(pico_teacher(), task).metric == "own_scores:overlap"


def test_a_function_grades_the_first_ranked_choice(functions):
    choices = ["red river", "red lake"]
    for split in ("validation", "test"):
        Path(f"{split}.jsonl").write_text(json.dumps({"question": split, "choices": choices, "answer": 0}))
    task = load_task(str(functions), metric="own_scores:overlap")
    low, high = (Likelihood(log_prob=p, is_greedy=False, num_tokens=1) for p in (-9.0, -1.0))
    item = task.splits["test"][0]
    assert (task.grade(item, [high, low]).value, task.grade(item, [low, high]).value) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("own_scores:overlab", RecipeError, "got 'own_scores:overlab' .AttributeError"),
        ("no_such_module:f", RecipeError, "ModuleNotFoundError"),
        ("own_scores:NUMBER", RecipeError, "which is 7; expected a function"),
        ("own_scores:text", DataError, "got 'good' for item validation.jsonl:1; expected a finite number"),
        ("own_scores:broken", DataError, "IndexError: .*--resume"),
        ("blue", RecipeError, r"task\.metric: got 'blue' for a generation task; expected auto or exact_match"),
        ("acc", RecipeError, r"task\.metric: got 'acc' for a generation task"),
        ("pass_at_1", RecipeError, "permission to run it.*allow_code_execution"),
    ],
)
def test_metrics_that_cannot_be_meant_are_told_before_any_work(functions, metric, error, message):
    with pytest.raises(error, match=message):
        load_task(write(functions, prompt="p", answer="red"), metric=metric)


def test_a_metric_that_is_no_number_on_a_later_item(functions):
    task = load_task(write(functions, prompt="p", answer="red"), metric="own_scores:not_a_number")
    assert grade(task, "right") == 1.0
    with pytest.raises(DataError, match=r"own_scores:not_a_number: got nan for item test\.jsonl:1.*--resume"):
        grade(task, "wrong")


def test_code_is_run_with_permission_only_and_with_limits(tmp_path):
    for split in ("validation", "test"):
        row = {"prompt": f"def double(x):  # {split}\n", "tests": "assert double(4) == 8"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    options = {"allow_code_execution": True, "stop": ["\n\n"], "code_seconds": 1}
    task = load_task(str(tmp_path), kind="generation", metric="pass_at_1", options=options)
    assert grade(task, "    return 2 * x") == 1.0
    assert grade(task, "    return x") == 0.0
    assert grade(task, "    return (") == 0.0
    assert grade(task, "    import os; os._exit(0)") == 0.0
    assert grade(task, "    while True: pass") == 0.0


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_written_program_writes_no_file_and_takes_little_memory(tmp_path):
    target = tmp_path / "written"
    assert not passes(f"with open({str(target)!r}, 'w') as f: f.write('x')", seconds=2)
    assert not target.exists() or not target.read_text()
    assert not passes("x = bytearray(4 << 30)", seconds=2)
    assert not passes("import os\nassert os.environ.get('HOME')", seconds=2)
    assert passes("import json", seconds=2)


@pytest.mark.parametrize("code", ["import os; os._exit(0)", "import os; os._exit(42)", "raise SystemExit(0)", "quit()"])
def test_no_exit_code_passes_for_the_end_of_a_program(code):
    assert not passes(code, seconds=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("isolate", [True, False])
def test_nothing_that_a_program_starts_is_left_behind(isolate):
    mark = f"left-{os.getpid()}-{isolate}"
    code = (
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execlp('sleep', {mark!r}, '60')\ntime.sleep(0.2)"
    )
    passes(code, seconds=2, isolate=isolate)
    names = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(mark.encode() in name for name in names)


@pytest.mark.skipif(not is_isolated(), reason="needs user namespaces")
def test_an_isolated_program_reaches_no_file_process_or_network(tmp_path):
    target = tmp_path / "mine"
    target.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert not passes(code, seconds=2)
    for code in (
        f"open({str(target)!r}, 'w')",
        f"import os\nos.remove({str(target)!r})",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})",
        f"open('/proc/{os.getpid()}/environ')",
        f"import os\nos.kill({os.getpid()}, 0)",
    ):
        assert not passes(code, seconds=2), code
    assert target.read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert passes(f"assert open({str(target)!r}).read() == 'x'", seconds=2)


def test_metrics_by_name_are_functions():
    assert all(find_metric(name) is function for name, function in TEXT_METRICS.items() if name != "rouge_l")


def test_meetings_in_the_shape_of_qmsum(tmp_path):
    (tmp_path / "docs_val.jsonl").write_text(json.dumps({"context_id": "a", "context": "begun " + "x " * 900 + "end"}))
    (tmp_path / "docs_test.jsonl").write_text(json.dumps({"context_id": "b", "context": "short"}))
    for split, name in (("val", "a"), ("test", "b")):
        row = {"context_id": name, "question": "What was said?", "answers": ["It was said."]}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    options = {"max_context_chars": 40}
    task = load_task(str(tmp_path), validation="val", metric="f1", options=options)
    context = task.splits["validation"][0].requests[0].context
    assert context.startswith("begun x")
    assert context.endswith("x end\nQuestion: What was said?\nAnswer:")
    assert len(context) < 100
    assert task.splits["test"][0].requests[0].context.startswith("short\nQuestion")
