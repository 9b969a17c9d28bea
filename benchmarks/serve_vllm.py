"""Is what vLLM answers what our decoder answers, and how fast are teacher and hybrid in it? On one GPU.

    python benchmarks/serve_vllm.py --out vllm.json                                   # a pico model, in a minute
    python benchmarks/serve_vllm.py --out vllm.json --teacher smollm2-demo --num-tokens 2000000 --graphs
    python benchmarks/serve_vllm.py --out vllm.json --teacher TEACHER --hybrid RUN/hybrid

Without --hybrid the layers are made on the spot: trained on --num-tokens of Python's documentation, or not at all, as
speed does not depend on it. Each engine runs in a process of its own. Rows are written as they come; after --limit
seconds no new part begins, and one that runs is stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PROMPT_TOKENS = (1, 2, 3, 17, 64, 65, 100, 150, 200, 333, 1, 40)
NEW_TOKENS = 64
OPTIONS = {"head_copies": 2, "quadratic": True, "exact_first": True}
MIXER = {"mixer": "gated_deltanet", "options": OPTIONS, "learning_rate": 4e-3, "batch_size": 32}
ROW = "row: "
"""Stands before a row among what an engine prints."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of all rows")
    parser.add_argument("--teacher", help="hub name, folder, GGUF file or smollm2-demo; else a pico model alone")
    parser.add_argument("--hybrid", type=Path, help="a saved hybrid; else made from the teacher")
    parser.add_argument("--num-linear", type=int, help="layers that are made linear; three in four by default")
    parser.add_argument("--num-tokens", type=int, default=0, help="tokens that they are trained on; 0: not trained")
    parser.add_argument("--parts", default="pico,agree,speed", help="which of these, by commas")
    parser.add_argument("--contexts", default="2048,8192,32768", help="tokens of a prompt, by commas")
    parser.add_argument("--most-at-once", type=int, default=256, help="most sequences at once")
    parser.add_argument("--work", type=Path, default=Path("serve-vllm"), help="folder for models that are made")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds in all")
    parser.add_argument("--graphs", action="store_true", help="with compiled steps and CUDA graphs, as served")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        for row in run_part(json.loads(args.part)):
            print(ROW + json.dumps(row), flush=True)
        return
    deadline = time.monotonic() + args.limit
    # In a process of its own: one that has touched a GPU keeps memory of it, which the engines ask for.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        folders = apart.submit(make_models, args).result()
        facts = apart.submit(environment).result()
    record: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "rows": []} | facts
    for part in plan(args, folders):
        seconds = deadline - time.monotonic()
        if seconds < 20:
            print(f"left out, as the time is up: {part}", flush=True)
            continue
        for row in in_a_process(part, seconds):
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plan(args: argparse.Namespace, folders: dict[str, str]) -> list[dict[str, Any]]:
    """The parts in order: equality before speed."""
    wanted = args.parts.split(",")
    # Random weights: in bfloat16 any two ways differ soon, in float32 none may.
    pico = {"kind": "agree", "folder": folders["pico"], "model": "pico", "dtype": "float32"}
    parts = [pico | {"eager": not args.graphs}] if "pico" in wanted else []
    if "hybrid" in folders and "agree" in wanted:
        parts.append({"kind": "agree", "folder": folders["hybrid"], "model": "hybrid", "eager": not args.graphs})
    if "hybrid" in folders and "speed" in wanted:
        for model in ("hybrid", "teacher"):
            one = {"kind": "speed", "folder": folders[model], "model": model, "eager": not args.graphs}
            contexts = [int(num) for num in args.contexts.split(",")]
            parts.append(one | {"contexts": contexts, "most_at_once": args.most_at_once})
    return parts


def in_a_process(part: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """The part's rows as they come; an engine that fails or hangs costs what it had not said yet."""
    command = [sys.executable, __file__, "--out", "-", "--part", json.dumps(part)]
    # One process with the engine in it: what it has allocated can be asked for.
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True)
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        assert child.stdout is not None, "it is a pipe"
        for line in child.stdout:
            if line.startswith(ROW):
                row = json.loads(line.removeprefix(ROW))
                yield part | {"seconds_in_all": round(time.monotonic() - begin, 1)} | row
        timer.cancel()
        if child.wait():
            log.seek(0)
            seconds = time.monotonic() - begin
            yield part | {"error": f"ended with {child.returncode} after {seconds:.0f} s: {log.read()[-3000:]}"}


def environment() -> dict[str, Any]:
    import torch

    from dtr.environment import own_commit
    from dtr.serving.plugin import installed_version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"vllm": installed_version(), "torch": torch.__version__, "hardware": device, "commit": own_commit()}


def make_models(args: argparse.Namespace) -> dict[str, str]:
    """Folders by name: pico, and with a teacher, teacher and hybrid."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dtr.corpus import stream_text
    from dtr.hybrid.modeling import make_hybrid

    torch.manual_seed(0)
    # Heads and widths that all kernels take, weights large enough that no two tokens are nearly as likely.
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    folders = {"pico": str(args.work / "pico")}
    as_hybrid(LlamaForCausalLM(config).eval(), 3, shake=0.1).bfloat16().save_pretrained(folders["pico"])
    if args.teacher is None:
        return folders
    import dtr

    teacher = dtr.load_teacher(args.teacher)
    longest = max(map(int, args.contexts.split(","))) + 4096
    teacher.model.config.max_position_embeddings = max(teacher.model.config.max_position_embeddings, longest)
    folders |= {"teacher": str(args.work / "teacher"), "hybrid": str(args.hybrid or args.work / "hybrid")}
    teacher.model.bfloat16().save_pretrained(folders["teacher"])
    teacher.tokenizer.save_pretrained(folders["teacher"])
    if args.hybrid is None:
        num_layers = teacher.model.config.num_hidden_layers
        num_linear = args.num_linear or num_layers * 3 // 4
        if args.num_tokens:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            teacher.model.to(device)
            # Tokenized while it trains, and no more of it than that takes.
            text = stream_text(
                "python-docs", tokenizer=teacher.tokenizer, seq_len_tokens=512, num_held_out_tokens=16_384
            )
            bank = dtr.distill(teacher, text, num_tokens=args.num_tokens, **MIXER)
            mixers, linear = bank.in_dtype(torch.float32), linear_layers(num_layers, num_linear)
            specs = {index: bank.spec(index) for index in linear}
            hybrid = make_hybrid(teacher.model.float(), {index: mixers[index] for index in linear}, specs)
        else:
            hybrid = as_hybrid(teacher.model.float(), num_linear)
        hybrid.tokenizer = teacher.tokenizer
        hybrid.cpu().bfloat16().save_pretrained(folders["hybrid"])
    return folders


def as_hybrid(model: Any, num_linear: int, shake: float = 0.0) -> Any:
    """A hybrid whose kept layers are spread evenly; with `shake` its gates are random."""
    import torch

    from dtr.arch import read_geometry
    from dtr.hybrid.modeling import make_hybrid
    from dtr.mixers import mixer_from_teacher

    geometry, mixers = read_geometry(model.config), {}
    for index in linear_layers(model.config.num_hidden_layers, num_linear):
        mixer = mixer_from_teacher("gated_deltanet", geometry, index, model.model.layers[index].self_attn, OPTIONS)
        with torch.no_grad():
            for name, weight in mixer.named_parameters():
                if shake and any(part in name for part in ("gate", "decay", "write", "quadratic")):
                    weight.add_(shake * torch.randn_like(weight))
        mixers[index] = mixer
    return make_hybrid(model, mixers, {index: {"kind": "gated_deltanet"} | OPTIONS for index in mixers})


def linear_layers(num_layers: int, num_linear: int) -> list[int]:
    """All but those that keep attention, which are spread evenly."""
    num_kept = num_layers - num_linear
    kept = {round((i + 1) * num_layers / num_kept) - 1 for i in range(num_kept)}
    return sorted(set(range(num_layers)) - kept)


def run_part(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return agree(part) if part["kind"] == "agree" else speed(part)


def engine(part: dict[str, Any], **settings: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=part["folder"],
        dtype=part.get("dtype", "bfloat16"),
        enforce_eager=part["eager"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **settings,
    )


def answers(llm: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done]


def random_prompts(lengths: list[int], vocabulary: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def text_prompts(lengths: list[int], folder: str) -> list[list[int]]:
    """Pieces of Python's documentation, which a model that knows text goes on with surely."""
    from transformers import AutoTokenizer

    from dtr.corpus.python_docs import read_documents

    text = "".join(text for text, _ in zip(read_documents(), range(40)))
    ids, places = AutoTokenizer.from_pretrained(folder)(text)["input_ids"], range(0, sum(lengths) * 3, 3)
    return [ids[place : place + num] for place, num in zip(places, lengths)]


def agree(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Greedy tokens by vLLM, of all prompts together and in chunks of 64, and by our decoder, prompt by prompt.

    `num_equal_control` says how many are the same by our decoder and by transformers: what rounding alone changes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import dtr

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, part.get("dtype", "bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(part["folder"], dtype=dtype).eval().to(device)
    lengths = [*PROMPT_TOKENS] * 2
    # What follows random tokens is a close call at each step, which rounding decides.
    has_words = part["model"] != "pico"
    prompts = text_prompts(lengths, part["folder"]) if has_words else random_prompts(lengths, model.config.vocab_size)
    wanted, control = [], []
    for ids in prompts:
        given = torch.tensor([ids], device=device)
        limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ours = functools.partial(dtr.fast_generate, model)
        for generate, found in ((ours, wanted), (model.generate, control)):
            out = generate(given, attention_mask=torch.ones_like(given), **limits)
            found.append(out[0, len(ids) :].tolist())
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    share = 0.5 if has_words else 0.05
    llm = engine(part, max_model_len=1024, max_num_batched_tokens=64, max_num_seqs=8, gpu_memory_utilization=share)
    got = answers(llm, prompts, NEW_TOKENS)
    places = [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), NEW_TOKENS) for a, b in zip(wanted, got)]
    yield {
        "num_prompts": len(prompts),
        "num_equal": places.count(NEW_TOKENS),
        "num_equal_control": sum(a == b for a, b in zip(wanted, control)),
        "first_difference": places,
    }


def speed(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each length time to first token, tokens and requests per second of as many sequences as fit."""
    new_tokens, longest = 128, max(part["contexts"])
    llm = engine(
        part, max_model_len=longest + new_tokens, max_num_seqs=part["most_at_once"], gpu_memory_utilization=0.9
    )
    vocabulary = llm.llm_engine.vllm_config.model_config.hf_config.vocab_size
    for context in part["contexts"]:
        capacity = most_sequences(llm, context + new_tokens)
        num = int(max(1, min(part["most_at_once"], capacity, 2**23 // context)))
        one = random_prompts([context], vocabulary)
        answers(llm, one, 4)
        first = statistics.median(timed(answers, llm, one, 1) for _ in range(3))
        prompts = random_prompts([context] * num, vocabulary)
        reading = timed(answers, llm, prompts, 1)
        whole = timed(answers, llm, prompts, new_tokens)
        yield {
            "context": context,
            "most_sequences": capacity,
            "num_sequences": num,
            "new_tokens": new_tokens,
            "time_to_first_token_seconds": round(first, 4),
            "requests_per_second": round(num / whole, 3),
            "prompt_tokens_per_second": round(num * context / reading),
            "decode_tokens_per_second": round(num * (new_tokens - 1) / max(1e-9, whole - reading)),
        }


def most_sequences(llm: Any, num_tokens: int) -> float:
    """Sequences of that length whose cache fits."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    config = llm.llm_engine.vllm_config
    core = llm.llm_engine.engine_core.engine_core
    longest, config.model_config.max_model_len = config.model_config.max_model_len, num_tokens
    try:
        return round(get_max_concurrency_for_kv_cache_config(config, core.scheduler.kv_cache_config), 2)
    finally:
        config.model_config.max_model_len = longest


def timed(work: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
