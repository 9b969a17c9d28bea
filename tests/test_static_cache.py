"""A static cache gives the tokens of the growing one, and a compiled step serves every token.

The compiler's front end runs for real here, with a back end that does nothing: what it would compile, and how often.
"""

from __future__ import annotations

import pytest
import torch
from test_hybrid import hybrid_of
from tiny import pico_teacher
from transformers import CompileConfig

from dtr.errors import ModelError
from dtr.mixers import MIXERS

OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}


@pytest.fixture
def prompts():
    """Two prompts, the first padded on the left."""
    ids = torch.randint(1, 257, (2, 13))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same_tokens(model, prompts, **options):
    growing = model.generate(**prompts, **(OPTIONS | options))
    return torch.equal(model.generate(**prompts, **(OPTIONS | options), cache_implementation="static"), growing)


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_padded_prompts_give_the_same_tokens(kind, prompts):
    model = hybrid_of(pico_teacher(), (0, 2), kind)
    assert same_tokens(model, prompts)
    # The cache of the call before was longer than this one asks for.
    assert same_tokens(model, {"input_ids": prompts["input_ids"]}, max_new_tokens=4)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1,), ()], ids=["all", "one", "none"])
def test_wherever_the_linear_layers_are(layers, prompts):
    model = hybrid_of(pico_teacher(), layers)
    assert same_tokens(model, prompts)
    assert same_tokens(model, prompts, num_beams=3)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families_and_attention_over_a_window(family, prompts):
    window = {"sliding_window": 8} if family == "mistral" else {}
    assert same_tokens(hybrid_of(pico_teacher(family, **window), (0, 2)), prompts)


def test_sampling(prompts):
    model = hybrid_of(pico_teacher(), (0, 2))
    texts = []
    for kind in (None, "static"):
        torch.manual_seed(3)
        options = OPTIONS | {"do_sample": True, "temperature": 0.8, "top_k": 20}
        texts.append(model.generate(**prompts, **options, cache_implementation=kind))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "sliding_window"])
def test_one_compiled_step_serves_every_token(kind, prompts):
    model = hybrid_of(pico_teacher(), (0, 2), kind)
    growing = model.generate(**prompts, **OPTIONS)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiling = CompileConfig(backend=count, mode="default", fullgraph=True)
    # By itself the library compiles on accelerators alone.
    compiling._compile_all_devices = True
    # What was compiled for another model is no recompilation.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        static = model.generate(**prompts, **OPTIONS, cache_implementation="static", compile_config=compiling)
    assert torch.equal(static, growing)
    assert len(graphs) == 1


@torch.no_grad()
def test_a_cache_of_ones_own_stays_where_it_is_and_can_be_used_again(prompts):
    model = hybrid_of(pico_teacher(), (0, 2), ("gated_deltanet", "sliding_window"))
    ids = prompts["input_ids"]
    cache = model.new_cache(max_cache_len=20)

    def read_all():
        logits = [model(part, past_key_values=cache).logits for part in ids.split([6, 1, 1, 5], dim=1)]
        return torch.cat(logits, dim=1)

    torch.testing.assert_close(read_all(), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length()) == 13
    held = [cache.layers[0].read(), cache.layers[1].keys, *cache.layers[2].read_window()]
    addresses = [x.data_ptr() for x in held]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(read_all(), model(ids).logits, rtol=1e-4, atol=1e-4)
    held = [cache.layers[0].read(), cache.layers[1].keys, *cache.layers[2].read_window()]
    assert [x.data_ptr() for x in held] == addresses


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_other_caches_are_refused_with_what_there_is(kind, prompts):
    with pytest.raises(ModelError, match=r"cache_implementation.*'dynamic' or 'static'"):
        hybrid_of(pico_teacher(), (0,)).generate(**prompts, **OPTIONS, cache_implementation=kind)
