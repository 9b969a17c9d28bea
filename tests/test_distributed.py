"""Two processes with gloo, as torchrun starts them, give what one gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from tiny import CHEAP, byte_tokenizer, pico_teacher, token_blocks

from dtr.corpus import load_text, stream_text
from dtr.distillation.trainer import distill

SETTINGS = {"num_tokens": 5 * 32 * 12, "batch_size": 5, "learning_rate": 5e-3, "seed": 3, "checkpoint_every_steps": 6}
SETTINGS |= {"options": CHEAP}

WORKER = """
import os
import signal
import sys
import torch
from tiny import pico_teacher, token_blocks
from dtr.distillation import exchange
from dtr.distillation.trainer import distill
from dtr.distributed import join_world, leave_world
from dtr.teacher import shard_teacher

# Two buffers of two layers each.
exchange.BUCKET_BYTES = 60_000
torch.set_num_threads(1)
folder, kinds, stop_after, shard = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "shard"
world, _ = join_world(torch.device("cpu"))
teacher = pico_teacher()
if shard:
    teacher = shard_teacher(teacher, torch.device("cpu"))
    assert all(p.to_local().numel() < p.numel() for p in teacher.model.model.parameters())

def on_event(event):
    if stop_after and event["event"] == "distill" and event["step"] >= stop_after:
        os.kill(os.getpid(), signal.SIGKILL)

for parallel in kinds.split(","):
    bank = distill(teacher, token_blocks(), parallel=parallel, checkpoint=f"{folder}/{parallel}.safetensors",
                   on_event=on_event, **{settings})
    if world.is_first:
        bank.save(f"{folder}/{parallel}")
    assert world.collect(bank.fingerprint) == [bank.fingerprint] * world.size
leave_world()
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def search_path() -> str:
    return os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def launch(
    folder: Path, kinds: str, num_processes: int, stop_after: int = 0, teacher: str = "whole"
) -> list[subprocess.CompletedProcess]:
    script = folder / "worker.py"
    script.write_text(WORKER.replace("{settings}", repr(SETTINGS)))
    env = os.environ | {"PYTHONPATH": search_path()}
    arguments = (script, folder, kinds, stop_after, teacher)
    if num_processes == 1:
        return [forks.run(*arguments, env=env)]
    return forks.run_ranks(num_processes, *arguments, env=env)


@pytest.fixture(scope="module")
def alone():
    """The bank of one process; only read it."""
    return distill(pico_teacher(), token_blocks(), **SETTINGS)


@pytest.mark.parametrize(
    ("kinds", "num_processes", "teacher"), [(("data", "layers"), 2, "whole"), (("data",), 3, "shard")]
)
def test_several_ranks_give_the_bank_of_one(kinds, num_processes, teacher, alone, tmp_path):
    # Batches of 5, 4 layers and 2 batches to measure on: no part is the same on all ranks, and some have none.
    for rank in launch(tmp_path, ",".join(kinds), num_processes, teacher=teacher):
        assert rank.returncode == 0, rank.stderr
    for kind in kinds:
        together = load_file(tmp_path / kind / "mixers.safetensors")
        for layer, mixer in alone.mixers.items():
            for name, weight in mixer.state_dict().items():
                torch.testing.assert_close(together[f"layers.{layer}.{name}"], weight, rtol=1e-3, atol=1e-4)


def test_a_killed_rank_ends_all_and_one_goes_on(alone, tmp_path):
    died = launch(tmp_path, "layers", 2, stop_after=10)
    codes = [rank.returncode for rank in died]
    assert -signal.SIGKILL in codes
    assert 0 not in codes
    resumed, steps = resume(tmp_path / "layers.safetensors")
    assert min(steps) > 6
    for layer, mixer in alone.mixers.items():
        for name, weight in mixer.state_dict().items():
            torch.testing.assert_close(resumed.mixers[layer].state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(alone, tmp_path):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (died,) = launch(tmp_path, "data", 1, stop_after=10)
        assert died.returncode == -signal.SIGKILL
        resumed, steps = resume(tmp_path / "data.safetensors")
    finally:
        torch.set_num_threads(num_threads)
    assert min(steps) > 6
    assert resumed.fingerprint == alone.fingerprint


def resume(checkpoint: Path):
    """The bank of a run that goes on in this process, and the steps at which it told of itself."""
    steps = []
    bank = distill(
        pico_teacher(),
        token_blocks(),
        checkpoint=checkpoint,
        on_event=lambda event: steps.append(event.get("step")),
        **SETTINGS,
    )
    return bank, steps


@pytest.mark.parametrize("launcher", ["forks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_command_line_on_two_ranks(launcher, place, tmp_path):
    arguments = [str(place / "recipe.yaml"), "--out", str(tmp_path / "run"), "--progress", "quiet"]
    arguments += ["--set", "text.streaming=true", "--set", "realign.num_tokens=2048"]
    if launcher == "forks":
        ranks = forks.run_ranks(2, "-m", "dtr", "run", *arguments)
    else:
        command, env = [*TORCHRUN, "-m", "dtr", "run", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [subprocess.run(command, capture_output=True, text=True, env=env)]
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["search"]["steps"]) == 4
    assert report["realigned"]["val_before"]["value"] == report["m_opt"]["val"]["value"]
    # A mistake ends all ranks with its message.
    ranks = forks.run_ranks(2, "-m", "dtr", "run", *arguments)
    codes = [rank.returncode for rank in ranks]
    assert 2 in codes
    assert 0 not in codes
    assert any("--overwrite" in rank.stderr for rank in ranks)


TEXT_WORKER = """
import json
import sys
import torch
from test_distributed import TEXT_OPTIONS, CountingTokenizer
from dtr.corpus import load_text, stream_text
from dtr.distributed import join_world, leave_world, side_world

world, _ = join_world(torch.device("cpu"))
source, out = sys.argv[1:]
tokenizers = CountingTokenizer(), CountingTokenizer()
whole = load_text(source, tokenizer=tokenizers[0], **TEXT_OPTIONS, world=side_world())
stream = stream_text(source, tokenizer=tokenizers[1], **TEXT_OPTIONS, world=side_world(), pool_chars=1500)
held_out = tokenizers[1].num_chars
blocks = [stream.batch(step, batch_size=5, seed=3) for step in range(90)]
stream.finish()
counts = {"whole": tokenizers[0].num_chars, "stream": tokenizers[1].num_chars - held_out}
if world.is_first:
    torch.save({"whole": whole.train, "stream": torch.cat(blocks)}, out)
# Not to stdout, where lines of two processes may run into each other.
with open(f"{out}.{world.rank}", "w") as file:
    json.dump(counts, file)
leave_world()
"""
TEXT_OPTIONS = {"seq_len_tokens": 16, "num_held_out_tokens": 64, "seed": 3}


class CountingTokenizer:
    """The byte tokenizer, which counts what it is given."""

    def __init__(self) -> None:
        self._tokenizer, self.num_chars = byte_tokenizer(), 0
        self.eos_token_id = self._tokenizer.eos_token_id

    def __call__(self, texts, **options):
        self.num_chars += sum(map(len, texts))
        return self._tokenizer(texts, **options)


def test_ranks_share_the_tokenizing_and_get_the_same_blocks(tmp_path):
    documents = [" ".join(f"{n:03d}x{i:02d}" for i in range(20)) for n in range(48)]
    source = tmp_path / "text.txt"
    source.write_text("\n<|doc|>\n".join(documents))
    script = tmp_path / "worker.py"
    script.write_text(TEXT_WORKER)
    env = os.environ | {"PYTHONPATH": search_path()}
    for rank in forks.run_ranks(2, script, source, tmp_path / "blocks.pt", env=env):
        assert rank.returncode == 0, rank.stderr
    found = torch.load(tmp_path / "blocks.pt")
    tokenizer = CountingTokenizer()
    whole = load_text(str(source), tokenizer=tokenizer, **TEXT_OPTIONS)
    stream = stream_text(str(source), tokenizer=byte_tokenizer(), **TEXT_OPTIONS, pool_chars=1500)
    assert torch.equal(found["whole"], whole.train)
    assert torch.equal(found["stream"], torch.cat([stream.batch(n, batch_size=5, seed=3) for n in range(90)]))
    counts = [json.loads((tmp_path / f"blocks.pt.{rank}").read_text()) for rank in range(2)]
    assert sum(count["whole"] for count in counts) == tokenizer.num_chars
    for name in ("whole", "stream"):
        shares = [count[name] for count in counts]
        assert max(shares) < 0.6 * sum(shares)


DYING = """
import os
import signal
import torch
from tiny import pico_teacher, token_blocks
from dtr.distillation.trainer import distill
from dtr.distributed import join_world

torch.set_num_threads(1)
world, _ = join_world(torch.device("cpu"))

def on_event(event):
    if world.rank == 1 and event["event"] == "distill":
        os.kill(os.getpid(), signal.SIGKILL)

distill(pico_teacher(), token_blocks(), on_event=on_event, **{settings})
"""


def test_a_rank_that_dies_while_distilling_is_told_by_the_other(tmp_path):
    (tmp_path / "dying.py").write_text(DYING.replace("{settings}", repr(SETTINGS | {"checkpoint_every_steps": 2})))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    first, second = forks.run_ranks(2, tmp_path / "dying.py", env=env)
    assert second.returncode == -signal.SIGKILL
    assert "DeviceError: torchrun: got no answer from another rank (" in first.stderr
    assert first.stderr.rstrip().endswith("go on with --resume from the last checkpoint.")
