"""Faults on purpose: kills, signals, full disks, flipped bits and malformed inputs, on pico models on a CPU.

    python benchmarks/fault_campaign.py --out benchmarks/results/faults.json

Each trial is a process of its own, forked from this one, which has imported everything already, and calls the command
line as a user would. What is counted:

- kills: a run that is killed before a random change to files or after a random time (some of them again while resumed),
  sent SIGTERM, SIGHUP or SIGINT, or kept from writing beyond a random size; `--resume` must end as if nothing had been.
- corruptions: a random bit is flipped in a file that a later command reads; it must be refused, or told by a warning.
- inputs: recipes, settings, rows, texts, model files damaged at random; exit code 0, or 2 with exactly one line.

With the defaults it takes about 13 minutes on two quiet cores, and stops between trials after --seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from tiny import byte_tokenizer, pico_model

import dtr.pipeline.runs  # noqa: F401 - what every trial would import
from dtr.cli import main as command_line
from dtr.environment import hardware, own_commit
from dtr.files import write_json

WORDS = ["red", "green", "blue", "stone", "river", "tree", "cloud", "bird", "fish", "lamp", "door", "road"]
TRIAL_SECONDS = 120.0
"""A trial that takes longer hangs."""
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
STATE = ("bank/bank.json", "bank/mixers.safetensors", "journal.jsonl", "dtr-run.json", "recipe.yaml", "costs.json")
MODEL = ("model.safetensors", "config.json", "tokenizer.json", "dtr-checksums.json")


@dataclass
class Ended:
    """How a trial's process ended."""

    code: int | None
    """Exit code, minus the signal's number, or None where it hung."""
    told: str
    """What it wrote to stderr."""

    @property
    def is_clear(self) -> bool:
        lines = [line for line in self.told.splitlines() if line.startswith("dtr: ") and "warning" not in line]
        return not self.has_traceback and (self.code == 0 or (self.code == 2 and len(lines) == 1))

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.told


@dataclass
class Tally:
    """What is counted, and by name what fell short."""

    counts: dict[str, int] = field(default_factory=dict)
    short: dict[str, list[str]] = field(default_factory=dict)

    def count(self, name: str, value: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + value

    def note(self, name: str, what: str) -> None:
        self.short.setdefault(name, []).append(what if len(what) < 700 else f"{what[:100]} ... {what[-500:]}")

    def look(self, ended: Ended, what: str) -> None:
        """Whatever a trial was for, it must neither hang nor end in a traceback."""
        if ended.code is None:
            self.note("hangs", what)
        if ended.has_traceback:
            self.note("tracebacks", f"{what}: {ended.told}")


def start(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> tuple[int, Path]:
    """Fork a process that runs `dtr ARGUMENTS`; returns its id and the file of its stderr."""
    handle, name = tempfile.mkstemp(prefix="dtr-fault-")
    process = os.fork()
    if process:
        os.close(handle)
        return process, Path(name)
    code = 1
    try:
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", buffering=1), os.fdopen(1, "w")
        sys.argv = ["dtr", *arguments]
        # As in a process that was started anew: a warning is shown wherever it comes from.
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        prepare()
        command_line()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(process: int, told: Path, *, after: float | None = None, number: int = signal.SIGKILL) -> Ended:
    """Wait for the end; after so many seconds send a signal."""
    began, sent = time.monotonic(), False
    while time.monotonic() - began < TRIAL_SECONDS:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            text = told.read_text(errors="replace")
            told.unlink()
            return Ended(os.waitstatus_to_exitcode(status), text)
        if after is not None and not sent and time.monotonic() - began >= after:
            os.kill(process, number)
            sent = True
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return Ended(None, told.read_text(errors="replace"))


def call(*arguments: object, prepare: Callable[[], None] = lambda: None, **how: Any) -> Ended:
    return finish(*start([str(one) for one in arguments], prepare), **how)


def dying_at(number: int) -> Callable[[], None]:
    """Makes a process die at once before its so manieth change to files."""

    def prepare() -> None:
        left = number

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)

    return prepare


def make_place(folder: Path) -> Path:
    """A pico model, a text, a task and a recipe of about a second."""
    folder.mkdir(parents=True)
    pico_model(num_layers=3).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n<|doc|>\n".join(" ".join(draw.choices(WORDS, k=60)) for _ in range(40)))
    (folder / "task").mkdir()
    for split in ("validation", "test"):
        rows = [
            {"question": f"{split} {i} {draw.choice(WORDS)}?", "choices": draw.sample(WORDS, 3), "answer": i % 3}
            for i in range(12)
        ]
        (folder / "task" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "teacher": {"source": str(folder / "model"), "dtype": "float32"},
        "text": {"source": str(folder / "text.txt"), "num_held_out_tokens": 512},
        "distill": {"num_tokens": 2048, "seq_len_tokens": 64, "batch_size": 4, "checkpoint_every_steps": 2},
        "task": {"source": str(folder / "task")},
        "search": {"strategy": "exact", "p_min": 0.5, "p_min_confidence": None, "run_to_end": True},
        "runtime": {"device": "cpu", "num_threads": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def result_of(run: Path) -> Any:
    """What must not differ between a run and one that was disturbed."""
    report = json.loads((run / "report.json").read_text())
    found = {key: report[key] for key in ("teacher", "m_opt", "m_best")}
    return found, report["search"]["steps"], report["distill"]["nmse"], (run / "hybrid/model.safetensors").read_bytes()


class Campaign:
    """All trials of one seed; each has its own random draws, so that any can be repeated by its number."""

    def __init__(self, place: Path, scratch: Path, seed: int) -> None:
        self.place, self.scratch, self.seed, self.tally = place, scratch, seed, Tally()
        self.run = ["run", place / "recipe.yaml", "--progress", "quiet", "--out"]
        began = time.monotonic()
        whole = call(*self.run, scratch / "whole")
        assert whole.code == 0, whole.told
        self.seconds, self.expected = time.monotonic() - began, result_of(scratch / "whole")
        # Stopped in the middle of distillation: what remains of it is a checkpoint.
        self.stopped = scratch / "stopped"
        for part in range(1, 40):
            shutil.rmtree(self.stopped, ignore_errors=True)
            call(*self.run, self.stopped, prepare=dying_at(12 + 2 * part))
            if (self.stopped / "distill.safetensors").exists():
                break
        assert (self.stopped / "distill.safetensors").exists()

    def kill(self, number: int) -> None:
        draw, run = random.Random(f"kill {self.seed} {number}"), self.scratch / f"kill-{number}"
        kind = draw.choices(["change", "time", "signal", "disk"], weights=[8, 8, 3, 2])[0]
        what = f"kill {number} by {kind}"
        for again in ([], ["--resume"])[: draw.choice((1, 1, 1, 2))]:
            after = draw.uniform(0, 1.1 * self.seconds) if kind in ("time", "signal") else None
            sent = draw.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]) if kind == "signal" else signal.SIGKILL
            limit = int(10 ** draw.uniform(1.5, 5))
            prepare = dying_at(draw.randint(1, 120)) if kind == "change" else lambda: None
            if kind == "disk":
                prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: B023, E731
            ended = call(*self.run, run, *again, prepare=prepare, after=after, number=sent)
            # A signal before the command line has begun ends a process as it ends any other.
            is_early = ended.code is not None and ended.code < 0 and kind == "signal"
            self.tally.look(ended, what)
            if kind == "signal" and not is_early and ended.code not in (0, 130):
                self.tally.note("signals", f"{what}: exit code {ended.code}: {ended.told}")
        resumed = call(*self.run, run, "--resume")
        self.tally.look(resumed, f"{what}, resumed")
        self.tally.count("kills")
        if resumed.code == 0:
            self.tally.count("kills_resumed")
            if result_of(run) != self.expected:
                self.tally.note("mismatches", what)
        else:
            self.tally.note("kills_resumed", f"{what}: {resumed.told}")
        shutil.rmtree(run, ignore_errors=True)

    def corrupt(self, number: int) -> None:
        draw, run = random.Random(f"bit {self.seed} {number}"), self.scratch / f"bit-{number}"
        name = draw.choice([*STATE, *(f"hybrid/{one}" for one in MODEL), "report.json", "distill.safetensors"])
        shutil.copytree(self.stopped if name == "distill.safetensors" else self.scratch / "whole", run)
        data = bytearray((run / name).read_bytes())
        at = draw.randrange(8 * len(data))
        data[at // 8] ^= 1 << at % 8
        (run / name).write_bytes(data)
        arguments: list[object] = [*self.run, run, "--resume"]
        if name.startswith("hybrid/"):
            arguments = ["eval", run / "hybrid", "--task", self.place / "task", "--set", "runtime.device=cpu"]
        elif name == "report.json":
            arguments = ["report", run]
        ended, what = call(*arguments), f"bit {at} of {name} ({number})"
        self.tally.look(ended, what)
        self.tally.count("corruptions")
        if ended.code == 2 or "dtr: warning" in ended.told:
            self.tally.count("corruptions_noticed")
        else:
            self.tally.note("corruptions_noticed", f"{what}: exit code {ended.code}")
        shutil.rmtree(run, ignore_errors=True)

    def feed(self, number: int) -> None:
        draw, place = random.Random(f"input {self.seed} {number}"), self.scratch / f"input-{number}"
        shutil.copytree(self.place, place)
        recipe = (place / "recipe.yaml").read_text().replace(str(self.place), str(place))
        (place / "recipe.yaml").write_text(recipe.replace("num_tokens: 2048", "num_tokens: 512"))
        names = ["recipe.yaml", "text.txt", "task/validation.jsonl", "task/test.jsonl"]
        names += ["model/config.json", "model/tokenizer.json", "model/tokenizer_config.json", "model/model.safetensors"]
        name, sets = draw.choice([*names, "--set"]), []
        if name == "--set":
            sets = ["--set", f"{draw.choice(SETTINGS)}={draw.choice(VALUES)}"]
        else:
            (place / name).write_bytes(damaged((place / name).read_bytes(), draw))
        ended = call("run", place / "recipe.yaml", "--progress", "quiet", "--out", place / "run", *sets)
        what = f"{' '.join(sets) or name} ({number})"
        self.tally.look(ended, what)
        self.tally.count("inputs")
        if ended.is_clear:
            self.tally.count("inputs_clear")
        else:
            self.tally.note("inputs_clear", f"{what}: exit code {ended.code}: {ended.told}")
        shutil.rmtree(place, ignore_errors=True)


SETTINGS = """teacher.source teacher.dtype text.source text.num_held_out_tokens mixer.kind mixer.options
distill.num_tokens distill.batch_size distill.learning_rate distill.layers task.source task.kind task.metric
task.fields task.prompt task.validation task.num_test search.strategy search.p_min search.guards
search.max_cache_bytes runtime.device
runtime.backend runtime.num_threads seed nonsense task realign.num_tokens text.mix""".split()  # noqa: SIM905
VALUES = [
    *("", "null", "true", "-1", "0", "1.5", "1e400", ".nan", "99999999999999999999", "[]", "{}", "[1, 1]", "{a: b}"),
    *(
        "x" * 300,
        "../nowhere",
        "/dev/null",
        "recall",
        "test[0:99]",
        "{question} {",
        "[[[",
        "\u00e9\u4e2d",
        "a:b",
        "os:system",
    ),
]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The file cut, emptied, with bytes changed, a piece twice, or a value of another type."""
    at = draw.randrange(len(data))
    piece = data[at : at + draw.randint(1, 40)]
    odd = draw.choice([b"\xff\xfe", b"\0", b"null", b"[]", b"-1", b'"', b"{", b"\xed\xa0\x80", b"NaN", b"9" * 5000])
    return draw.choice(
        [
            data[:at],
            b"",
            data[:at] + odd + data[at:],
            data[:at] + odd + data[at + len(piece) :],
            data[:at] + data[at + len(piece) :],
            data[:at] + piece * 50 + data[at:],
            data[:at] + draw.randbytes(8) + data[at + 8 :],
        ]
    )


def run_campaign(scratch: Path, *, kills: int, corruptions: int, inputs: int, seconds: float, seed: int) -> Tally:
    """All trials, two at a time, the kinds in turn; those that no time is left for are not counted."""
    torch.set_num_threads(1)
    campaign, ends = Campaign(make_place(scratch / "place"), scratch, seed), time.monotonic() + seconds
    plan = [(campaign.kill, kills), (campaign.corrupt, corruptions), (campaign.feed, inputs)]
    trials = [((at + 0.5) / number, trial, at) for trial, number in plan for at in range(number)]

    def work(trial: Callable[[int], None], at: int) -> None:
        if time.monotonic() < ends:
            trial(at)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, trial, at) for _, trial, at in sorted(trials, key=lambda one: one[0])]:
            done.result()
    return campaign.tally


def record_of(tally: Tally, command: str) -> dict[str, Any]:
    lists = ("mismatches", "tracebacks", "hangs")
    counts = ("kills", "kills_resumed", "corruptions", "corruptions_noticed", "inputs", "inputs_clear")
    return {
        **{name: tally.counts.get(name, 0) for name in counts},
        **{name: len(tally.short.get(name, [])) for name in lists},
        "fell_short": {name: sorted(what) for name, what in sorted(tally.short.items())},
        "command": command,
        "hardware": hardware(torch.device("cpu")),
        "commit": own_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("kills", 200), ("corruptions", 200), ("inputs", 400), ("seconds", 1800), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = {name: getattr(given, name) for name in ("kills", "corruptions", "inputs", "seconds", "seed")}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dtr-faults-") as scratch:
        tally = run_campaign(Path(scratch), **sizes)
    words = " ".join(f"--{name} {value}" for name, value in sizes.items())
    record = record_of(tally, f"python benchmarks/fault_campaign.py {words}")
    record["seconds"] = round(time.monotonic() - began)
    if given.out:
        write_json(given.out, record)
    print(json.dumps({key: value for key, value in record.items() if key != "fell_short"}))


if __name__ == "__main__":
    main()
