"""Export a hybrid and ask real servers for the hybrid's own greedy tokens: stock transformers, and vLLM over HTTP.

    python benchmarks/export_and_serve.py RUN/hybrid --to granite --out served.json \\
        --transformers stock-env/bin/python --vllm vllm-env/bin/python

Each server is named by the Python of an environment of its own; that of `--transformers` must not have this package.
Everything runs on the CPU in float32. `docs/export.md` says how to make the environment for vLLM. The result is one
JSON file, which `benchmarks/serving.py` takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtr.environment import hardware, own_commit
from dtr.export.exporter import export_hybrid

PROMPT = "The three primary colours are"
START_SECONDS = 300

STOCK = """
import importlib.util, json, sys
import torch, transformers
assert importlib.util.find_spec("dtr") is None, "this environment has dtr"
folder, prompt, num = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = torch.tensor([prompt])
out = model.generate(ids, max_new_tokens=num, do_sample=False, eos_token_id=None, pad_token_id=0)
print(json.dumps({"version": transformers.__version__, "tokens": out[0, len(prompt):].tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hybrid", type=Path, help="folder of a saved hybrid")
    parser.add_argument("--to", default="granite", help="target of the export")
    parser.add_argument("--transformers", help="Python with transformers and without this package")
    parser.add_argument("--vllm", help="Python with vLLM")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens to ask for")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "exported")
        record = export_hybrid(args.hybrid, folder, to=args.to)
        prompt, expected = own_answer(args.hybrid, args.tokens)
        servers = {}
        if args.transformers:
            answer = guarded(lambda: ask_transformers(args.transformers, folder, prompt, args.tokens))
            servers["transformers"] = judged(answer, expected)
        if args.vllm:
            answer = guarded(lambda: ask_vllm(args.vllm, folder, prompt, args.tokens))
            servers["vllm"] = judged(answer, expected)
    parity = record["parity"]
    result = {
        "command": shlex.join(["python", "benchmarks/export_and_serve.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "commit": own_commit(),
        "export_parity": {
            args.to: {
                "max_abs_logit_diff": parity["max_abs_logit_diff"],
                "same_tokens": parity["same_tokens"],
                "architecture": record["architecture"],
                "versions": record["versions"],
            }
        },
        "servers": servers,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


@torch.no_grad()
def own_answer(folder: Path, num_tokens: int) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and the hybrid's greedy ones after it."""
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return prompt, model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def ask_transformers(python: str, folder: Path, prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """Version and tokens of stock transformers in another environment."""
    command = [python, "-c", STOCK, str(folder), json.dumps(prompt), str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env=_plain_environment())
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask_vllm(python: str, folder: Path, prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """Version and tokens of a vLLM server, by its completions endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "it"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        environment = _plain_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(address, server, log)
            wish = {"model": "it", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
            answer = fetch(f"{address}/v1/completions", wish | {"return_token_ids": True})
            tokens = answer["choices"][0]["token_ids"]
            return {"version": fetch(f"{address}/version")["version"], "tokens": tokens}
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_for(address: str, server: subprocess.Popen, log: Any) -> None:
    """Return when the server answers; raise with the end of its log if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    log.seek(0)
    said = [line for line in log.read().splitlines() if "Error" in line]
    raise RuntimeError(said[-1] if said else "the server did not start")


def fetch(address: str, wish: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if wish is None else json.dumps(wish).encode()
    request = urllib.request.Request(address, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
        return json.load(answer)


def guarded(ask: Any) -> dict[str, Any]:
    """A server's answer, or the error that kept it from one."""
    try:
        return ask()
    except (RuntimeError, OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def judged(answer: dict[str, Any], expected: list[int]) -> dict[str, Any]:
    """What `serving.json` says of a server: it works if its tokens are the hybrid's."""
    if "error" in answer:
        return {"version": answer.get("version"), "works": False, "note": answer["error"][:300]}
    tokens = answer["tokens"]
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), min(len(tokens), len(expected)))
    note = f"{same} of {len(expected)} greedy tokens as the hybrid's, float32 on a CPU"
    return {"version": answer["version"], "works": same == len(expected), "note": note}


def _plain_environment() -> dict[str, str]:
    apart = ("PYTHONPATH", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in apart} | {"HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    main()
