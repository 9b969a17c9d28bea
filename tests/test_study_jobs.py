"""Jobs that need one another, on GPUs that are shared out: with a program that only writes down where it ran."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from docs_pages import ROOT, load_script

PROGRAM = """
    import json, os, sys, time
    folder, name, code = sys.argv[1:4]
    began = time.time()
    time.sleep(0.3)
    facts = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": began, "ended": time.time()}
    if os.environ.get("RANK", "0") == "0":
        open(f"{folder}/{name}.json", "w").write(json.dumps(facts))
    sys.exit(int(code) if "WORLD_SIZE" in os.environ or code != "77" else 0)
"""


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    return load_script(ROOT / "benchmarks" / "study_jobs.py")


def run(jobs, tmp_path, todo, places):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    said: list[str] = []
    made = [
        jobs.Job(name=name, arguments=[str(tmp_path), name, str(code)], needs=needs, num_gpus=num_gpus)
        for name, code, needs, num_gpus in todo
    ]
    failed = jobs.run_jobs(made, program=program, places=places, logs=tmp_path / "logs", say=said.append)
    facts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    return failed, facts, said


def test_a_failure_stops_only_what_needs_it_and_jobs_at_once_have_gpus_of_their_own(jobs, tmp_path):
    todo = [("a", 0, (), 1), ("b", 0, ("a",), 1), ("c", 3, (), 1), ("d", 0, ("c",), 1), ("e", 0, ("d",), 1)]
    failed, facts, said = run(jobs, tmp_path, todo, jobs.find_places(2))
    assert failed == {"c": f"see {tmp_path / 'logs' / 'c'}.log", "d": "c failed", "e": "d failed"}
    assert sorted(facts) == ["a", "b", "c"]
    assert facts["b"]["began"] >= facts["a"]["ended"]
    assert {facts["a"]["gpus"], facts["c"]["gpus"]} == {"4", "6"}
    assert facts["c"]["began"] < facts["a"]["ended"]
    assert "d FAILED: c failed" in said


def test_places_go_to_the_gpu_with_most_room(jobs, monkeypatch):
    assert jobs.find_places(5) == ["4", "6", "4", "6", "4"]
    assert jobs.take(["6", "4", "4"], 1) == ["4"]
    assert sorted(jobs.take(["6", "4", "4"], 2)) == ["4", "6"]
    assert jobs.take(["6", "6"], 2) == []
    assert jobs.take([], 1) == []
    assert jobs.take([None, None, None], 2) == [None, None]


def test_what_fails_on_two_gpus_is_tried_on_one(jobs, tmp_path):
    failed, facts, said = run(jobs, tmp_path, [("both", 77, (), 2), ("after", 0, ("both",), 1)], ["4", "6"])
    assert failed == {}
    assert facts["both"]["gpus"] in ("4", "6")
    assert any(line.startswith("both: failed on 2 GPUs") for line in said)
    assert "both: starts on GPU 4, 6" in said


def test_jobs_end_with_the_process_that_gave_them_out(jobs, tmp_path):
    """However it ended: nothing may go on in a folder that the next try works in."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys, time\nfrom study_jobs import end_with_parent\nend_with_parent()\n"
        f"open({str(tmp_path / 'pid.part')!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'pid.part')!r}, {str(tmp_path / 'pid')!r})\ntime.sleep(60)\n"
    )
    giver = (
        "import sys; from pathlib import Path; from study_jobs import Job, run_jobs; "
        f"run_jobs([Job(name='a', arguments=[])], program=Path({str(job)!r}), places=[None], "
        f"logs=Path({str(tmp_path)!r}), say=print)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen([sys.executable, "-c", giver], env=env)
    _until((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    _until(lambda: not _is_alive(pid))


def _until(is_so) -> None:
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < 20
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        # A process that nobody waits for stays in the list; it is over all the same.
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
