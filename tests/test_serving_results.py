"""`benchmarks/results/serving.json` has the keys that it promises, and parts keep where they were measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import forks
import pytest
from docs_pages import ROOT, load_script
from test_export import needs_norms_by_group, save_hybrid

KEYS = {"decode_speedup", "prefill_speedup", "cache_ratio", "export_parity", "servers", "command", "hardware", "commit"}


def test_parts_become_one_result(tmp_path):
    origin = {"command": "dtr bench generate", "hardware": {"gpu": "big"}, "commit": "a"}
    ratios = {"512": {"1": 1.1, "fill": 2.0}}
    speed = origin | {"decode_speedup": ratios, "prefill_speedup": ratios, "cache_ratio": {"512": 0.5}}
    speed |= {"fill_batch": {"512": 999}, "rows": []}
    elsewhere = {"command": "python x", "hardware": {"cpu": "small"}, "commit": "b"}
    parity = {"max_abs_logit_diff": 1e-6, "same_tokens": True}
    good, bad = ({"version": "1", "works": works, "note": ""} for works in (True, False))
    parts = [
        elsewhere | {"export_parity": {"granite": parity}, "servers": {"vllm": bad, "transformers": good}},
        elsewhere | {"export_parity": {"qwen3_5": parity}, "servers": {"vllm": good, "transformers": good}},
    ]
    (tmp_path / "speed.json").write_text("a table\n" + json.dumps(speed))
    longer = {"decode_speedup": {"2048": {"1": 1.2}, "512": {"16": 1.5}}, "prefill_speedup": {"2048": {"1": 3.0}}}
    longer["fill_batch"] = {}
    (tmp_path / "longer.json").write_text(json.dumps(origin | longer | {"cache_ratio": {"2048": 0.2}}))
    command = [ROOT / "benchmarks" / "serving.py", "--plot", str(tmp_path / "speed.png")]
    # In any order.
    command += ["--speed", str(tmp_path / "longer.json"), "--speed", str(tmp_path / "speed.json")]
    for name, part in zip("ab", parts):
        (tmp_path / name).write_text(json.dumps(part))
        command += ["--served", str(tmp_path / name)]
    done = forks.run(*command, "--out", tmp_path / "serving.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "serving.json").read_text())
    assert set(result) == KEYS
    assert result["decode_speedup"]["512"] == {"1": 1.1, "16": 1.5, "fill": 2.0, "999": 2.0}
    assert list(result["cache_ratio"]) == ["512", "2048"]
    assert result["prefill_speedup"]["2048"] == {"1": 3.0}
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert result["export_parity"]["qwen3_5"] == parity | elsewhere
    assert not result["servers"]["vllm"]["works"]
    assert result["servers"]["vllm"]["target"] == ["granite"]
    assert {key: result[key] for key in origin} == origin
    (tmp_path / "longer.json").write_text(json.dumps(origin | longer | {"cache_ratio": {}, "commit": "b"}))
    refused = forks.run(*command)
    assert "2 machines or commits" in refused.stderr


@pytest.mark.parametrize(("tokens", "works"), [([1, 2, 3], True), ([1, 2, 4], False), ([1, 2], False)])
def test_a_server_works_if_its_tokens_are_the_hybrids(tokens, works):
    script = load_script(ROOT / "benchmarks" / "export_and_serve.py")
    assert script.judged({"version": "1", "tokens": tokens}, [1, 2, 3])["works"] == works
    assert script.judged(script.guarded(lambda: {}["x"]), [1])["note"].startswith("KeyError")


@pytest.mark.slow
@needs_norms_by_group
@pytest.mark.skipif("DTR_VLLM_PYTHON" not in os.environ, reason="DTR_VLLM_PYTHON names no Python with vLLM")
def test_servers_answer_for_an_exported_hybrid(tmp_path):
    """docs/export.md says how to make the environment; DTR_STOCK_PYTHON may name one with transformers alone."""
    size = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 2048}
    save_hybrid(tmp_path / "hybrid", **size)
    command = [sys.executable, str(ROOT / "benchmarks" / "export_and_serve.py"), str(tmp_path / "hybrid")]
    command += ["--vllm", os.environ["DTR_VLLM_PYTHON"], "--tokens", "16", "--out", str(tmp_path / "served.json")]
    if "DTR_STOCK_PYTHON" in os.environ:
        command += ["--transformers", os.environ["DTR_STOCK_PYTHON"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "served.json").read_text())
    assert all(found["works"] for found in result["servers"].values()), result["servers"]
