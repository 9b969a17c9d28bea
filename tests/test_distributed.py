"""Two processes with gloo, as torchrun starts them, give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import pico_teacher, token_blocks

from dtr.distillation.trainer import distill

SETTINGS = {"num_tokens": 5 * 32 * 12, "batch_size": 5, "learning_rate": 5e-3, "seed": 3, "checkpoint_every_steps": 6}

WORKER = """
import sys
import torch
from tiny import pico_teacher, token_blocks
from dtr.distillation import exchange
from dtr.distillation.trainer import distill
from dtr.distributed import join_world, leave_world

# Two buffers of two layers each.
exchange.BUCKET_BYTES = 60_000
torch.set_num_threads(1)
folder, parallel, stop_after = sys.argv[1], sys.argv[2], int(sys.argv[3])
world, _ = join_world(torch.device("cpu"))

def on_event(event):
    if stop_after and event["event"] == "distill" and event["step"] >= stop_after:
        raise SystemExit(3)

bank = distill(pico_teacher(), token_blocks(), parallel=parallel, checkpoint=folder + "/state.safetensors",
               on_event=on_event, **{settings})
if world.is_first:
    bank.save(folder)
assert world.collect(bank.fingerprint) == [bank.fingerprint] * world.size
leave_world()
"""


def launch(folder: Path, parallel: str, num_processes: int, stop_after: int = 0) -> subprocess.CompletedProcess:
    script = folder / "worker.py"
    script.write_text(WORKER.replace("{settings}", repr(SETTINGS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), str(folder), parallel, str(stop_after)], capture_output=True, text=True, env=env
    )


@pytest.mark.parametrize("parallel", ["data", "layers"])
def test_two_ranks_give_the_bank_of_one(parallel, tmp_path):
    # Batches of 5 and 4 layers: neither part is the same on both ranks.
    alone = distill(pico_teacher(), token_blocks(), **SETTINGS)
    done = launch(tmp_path, parallel, 2)
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "mixers.safetensors")
    for layer, mixer in alone.mixers.items():
        for name, weight in mixer.state_dict().items():
            torch.testing.assert_close(together[f"layers.{layer}.{name}"], weight, rtol=1e-3, atol=1e-4)


def test_a_run_of_two_that_died_goes_on_with_one(tmp_path):
    alone = distill(pico_teacher(), token_blocks(), **SETTINGS)
    died = launch(tmp_path, "layers", 2, stop_after=10)
    assert died.returncode != 0
    assert (tmp_path / "state.safetensors").exists()
    steps = []
    resumed = distill(
        pico_teacher(),
        token_blocks(),
        checkpoint=tmp_path / "state.safetensors",
        on_event=lambda event: steps.append(event.get("step")),
        **SETTINGS,
    )
    assert min(steps) > 6
    for layer, mixer in alone.mixers.items():
        for name, weight in mixer.state_dict().items():
            torch.testing.assert_close(resumed.mixers[layer].get_parameter(name), weight, rtol=1e-3, atol=1e-4)


def test_the_command_line_under_torchrun(place, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dtr", "run"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [str(place / "recipe.yaml"), "--out", str(tmp_path / "run"), "--progress", "quiet"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["search"]["steps"]) == 4
    # A mistake ends all ranks with its message.
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "--overwrite" in done.stderr
