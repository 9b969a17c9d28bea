"""A few trials of each kind of the fault campaign; the whole of it is run by hand."""

from __future__ import annotations

import json

import pytest
from docs_pages import ROOT
from forks import run


@pytest.mark.slow
def test_nothing_falls_short(tmp_path):
    out = tmp_path / "faults.json"
    sizes = ["--kills", "1", "--corruptions", "2", "--inputs", "2", "--seed", "1", "--seconds", "100", "--out", out]
    done = run(ROOT / "benchmarks" / "fault_campaign.py", *sizes)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["fell_short"] == {}
    assert (record["kills"], record["kills_resumed"], record["mismatches"]) == (1, 1, 0)
    assert (record["corruptions"], record["corruptions_noticed"]) == (2, 2)
    assert (record["inputs"], record["inputs_clear"], record["tracebacks"], record["hangs"]) == (2, 2, 0, 0)
