"""`dtr bench serve`: teacher and hybrid in vLLM, one after the other, asked by vLLM's own client over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.errors import DeviceError, ModelError
from dtr.serving.command import ServeCommand, read_config, serve_command, vllm_command
from dtr.serving.plugin import installed_version, version_obstacle

_MOST_AT_ONCE = re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x")
_START_SECONDS = 1200.0
LENGTHS = (2048, 8192, 32_768)
"""Tokens in all, of prompt and answer, where no contexts are given."""
SPARE_TOKENS = 8
"""A prompt of so many random tokens may have a few more once it was text."""
_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` runs; vllm's own entry asks for a package of that name, which the CPU's build has not."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server is asked.

    Attributes:
        context_tokens: length of each prompt, of random tokens.
        new_tokens: tokens written after each prompt.
        most_sequences: most requests that are open at once; as many as the server's cache holds, if that is fewer.
        num_rounds: requests of each measurement, in units of those open at once.
    """

    context_tokens: int
    new_tokens: int = 128
    most_sequences: int = 256
    num_rounds: int = 2


def bench_serve(
    hybrid: Path,
    teacher: str | None,
    *,
    contexts: Sequence[int] | None = None,
    new_tokens: int = 128,
    most_sequences: int = 256,
    extra: tuple[str, ...] = (),
    on_row: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure a hybrid and its teacher at each length; a server of its own for each, so that all memory is its own.

    Args:
        hybrid: folder of a saved hybrid.
        teacher: hub name or folder of the teacher; None measures the hybrid alone.
        contexts: tokens of a prompt; when left out, such that 2K, 8K and 32K are filled, as far as the model goes.
        new_tokens: tokens written after each prompt.
        most_sequences: most requests that are open at once; as many as the server's cache holds, if that is fewer.
        extra: arguments for both servers.
        on_row: called with all rows so far after each one.

    Returns:
        For each length and model a row: `requests_per_second`, `output_tokens_per_second`, time to first token and time
        per token at p50 and p99 in seconds, both with as many requests open as fit (`fill`) and with one (`alone`), and
        `most_sequences`, how many sequences of full length the cache holds.

    Raises:
        ModelError: the folder is no hybrid that can be served, or a length is beyond its positions.
        DeviceError: vLLM is not installed or of another version, or a server or client failed.
    """
    command, num_positions = _checked(hybrid)
    lengths = _lengths(contexts, new_tokens + SPARE_TOKENS, num_positions)
    loads = [Load(context_tokens=num, new_tokens=new_tokens, most_sequences=most_sequences) for num in lengths]
    commands = {"hybrid": command}
    if teacher is not None:
        commands["teacher"] = vllm_command(teacher, "teacher", port=free_port())
    rows: list[dict[str, Any]] = []
    for load in loads:
        for name, one in commands.items():
            rows.append({"model": name, "context_tokens": load.context_tokens} | _measure(one, load, extra))
            on_row(rows)
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Hybrid over teacher for each context: above 1 is more requests, more tokens, more sequences, or more time."""
    by_model = {(row["context_tokens"], row["model"]): row for row in rows}
    found: dict[str, dict[str, float]] = {}
    for context in sorted({row["context_tokens"] for row in rows}):
        if (context, "hybrid") in by_model and (context, "teacher") in by_model:
            ours, theirs = by_model[context, "hybrid"], by_model[context, "teacher"]
            found[str(context)] = {
                "requests": ours["fill"]["requests_per_second"] / theirs["fill"]["requests_per_second"],
                "output_tokens": ours["fill"]["output_tokens_per_second"] / theirs["fill"]["output_tokens_per_second"],
                "time_per_token": ours["fill"]["tpot_p50_seconds"] / theirs["fill"]["tpot_p50_seconds"],
                "time_to_first_token": ours["alone"]["ttft_p50_seconds"] / theirs["alone"]["ttft_p50_seconds"],
                "most_sequences": ours["most_sequences"] / theirs["most_sequences"],
            }
    return found


@contextmanager
def serving(command: ServeCommand, extra: Sequence[str] = (), *, log: Path) -> Iterator[None]:
    """Run a server until it answers, and stop it at the end with all of its processes.

    Raises:
        DeviceError: it ended or did not answer within twenty minutes; the message holds its last words.
    """
    arguments = [*command.arguments, *extra]
    with log.open("wb") as out:
        server = subprocess.Popen(
            arguments, env=os.environ | dict(command.variables), stdout=out, stderr=out, start_new_session=True
        )
        try:
            _wait_until_it_answers(server, command.address, log)
            yield
        finally:
            # Its engine is a process of its own, which would keep the device's memory.
            for kind, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
                if _signal_group(server.pid, kind):
                    _wait_for_group(server, patience)


def _checked(hybrid: Path) -> tuple[ServeCommand, int]:
    """The hybrid's command, if vLLM is there, and the model's positions."""
    command = serve_command(hybrid, port=free_port())
    if installed_version() is None:
        raise DeviceError("vllm", got=version_obstacle(), expected="vLLM, whose client asks", hint="Install it.")
    return command, read_config(hybrid).max_position_embeddings


def _lengths(contexts: Sequence[int] | None, room: int, num_positions: int) -> list[int]:
    """Tokens of prompts, each with room for what is written after it."""
    if contexts is None:
        contexts = [length - room for length in LENGTHS if room < length <= num_positions]
    longest = max(contexts, default=num_positions) + room
    if longest > num_positions:
        raise ModelError(
            "--contexts",
            got=f"{longest:,} tokens with those written",
            expected=f"at most {num_positions:,}, the model's positions",
            hint="Take shorter contexts.",
        )
    return list(contexts)


def _measure(command: ServeCommand, load: Load, extra: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dtr-serve-") as scratch:
        log, length = Path(scratch) / "server.log", load.context_tokens + load.new_tokens
        # Every request's prompt is another one: what a prefix cache would hold is of no use.
        own = ("--max-model-len", str(length + SPARE_TOKENS), "--no-enable-prefix-caching", *extra)
        with serving(command, own, log=log):
            said = _MOST_AT_ONCE.findall(log.read_text(encoding="utf-8", errors="replace"))
            if not said:
                raise DeviceError("vllm", got="no word on how many sequences fit", expected="it in the server's log")
            most = float(said[-1])
            num = max(1, min(load.most_sequences, int(most)))
            # What is compiled or recorded at first use is not of the measurement.
            _ask(command, load, num_requests=min(num, 4), at_once=min(num, 4), scratch=Path(scratch))
            alone = _ask(command, load, num_requests=4, at_once=1, scratch=Path(scratch))
            fill = _ask(command, load, num_requests=num * load.num_rounds, at_once=num, scratch=Path(scratch))
    return {"most_sequences": most, "new_tokens": load.new_tokens, "alone": alone, "fill": fill}


def _ask(command: ServeCommand, load: Load, *, num_requests: int, at_once: int, scratch: Path) -> dict[str, Any]:
    """One run of vLLM's client."""
    client = [
        sys.executable, "-c", _CLIENT, "--backend", "openai",
        "--base-url", command.address, "--model", command.model, "--tokenizer", command.source,
        "--dataset-name", "random", "--random-input-len", str(load.context_tokens),
        "--random-output-len", str(load.new_tokens), "--ignore-eos", "--num-prompts", str(num_requests),
        "--max-concurrency", str(at_once), "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99",
        "--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", str(scratch),
        "--result-filename", "client.json",
    ]  # fmt: skip
    (scratch / "client.json").unlink(missing_ok=True)
    done = subprocess.run(client, env=os.environ | dict(command.variables), capture_output=True, check=False)
    if done.returncode or not (scratch / "client.json").is_file():
        raise DeviceError("vllm bench serve", got=_last_words(done.stdout + done.stderr), expected="a result")
    found = json.loads((scratch / "client.json").read_text(encoding="utf-8"))
    if failed := [error for error in found["errors"] if error]:
        raise DeviceError("vllm", got=_last_words(failed[0].encode()), expected="an answer to each request")
    times = {f"{name}_p{p}_seconds": found[f"p{p}_{name}_ms"] / 1000 for name in ("ttft", "tpot") for p in (50, 99)}
    return {
        "num_requests": num_requests,
        "at_once": at_once,
        "requests_per_second": found["request_throughput"],
        "output_tokens_per_second": found["output_throughput"],
    } | times


def _wait_until_it_answers(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if server.poll() is not None:
            raise DeviceError("vllm", got=_last_words(log.read_bytes()), expected="a server that starts")
        try:
            # It is on this machine, whatever proxy the environment names.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise DeviceError("vllm", got=_last_words(log.read_bytes()), expected="an answer in time") from None
            time.sleep(0.5)


def _signal_group(group: int, kind: signal.Signals) -> bool:
    """Whether there was anybody left to hear it."""
    try:
        os.killpg(group, kind)
    except ProcessLookupError:
        return False
    return True


def _wait_for_group(server: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        server.poll()
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _last_words(output: bytes) -> str:
    """The last line that tells of an error, else the last one."""
    lines = [line.strip() for line in output.decode("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["nothing"])[-1][-400:]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
