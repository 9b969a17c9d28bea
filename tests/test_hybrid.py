"""The hybrid as a Hugging Face model: identity with the teacher, cache, padding, saving."""

from __future__ import annotations

import json
import subprocess
import sys

import forks
import pytest
import torch
from exactness import assert_same_model, assert_same_up_to_rounding
from safetensors.torch import load_file, save_file
from tiny import pico_classifier, pico_teacher
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

from dtr.arch import FAMILIES, LayerRunner, decoder_layers
from dtr.errors import ModelError
from dtr.hybrid.cache import decode_cache_bytes
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import MIXERS, make_mixer, mixer_from_teacher
from dtr.teacher import as_teacher

LAYOUTS = {"first": (0,), "mixed": (0, 2), "last": (3,), "all": (0, 1, 2, 3)}


def hybrid_of(teacher, layers, kind="gated_deltanet"):
    """A hybrid whose linear layers are of one kind, or of the kinds in a tuple, one for each."""
    kinds = dict(zip(layers, kind)) if isinstance(kind, tuple) else dict.fromkeys(layers, kind)
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher(kinds[i], teacher.geometry, i, attention[i]).eval() for i in layers}
    for mixer in mixers.values():
        # Gates that start as the identity would hide a gate that is wired wrongly.
        for name, weight in mixer.named_parameters():
            if "gate_proj" in name or "write_proj" in name or "decay" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return make_hybrid(teacher.model, mixers, {i: {"kind": kinds[i]} for i in layers})


@pytest.fixture(params=sorted(FAMILIES))
def teacher(request):
    return pico_teacher(request.param)


@pytest.fixture
def ids():
    return torch.randint(1, 257, (3, 21))


@torch.no_grad()
def test_zero_replaced_layers_give_the_teachers_logits_bit_for_bit(teacher, ids):
    assert torch.equal(hybrid_of(teacher, ()).forward(ids).logits, teacher.model(ids).logits)


@torch.no_grad()
def test_making_and_using_a_hybrid_leaves_the_teacher_bit_identical(teacher, ids):
    weights = {name: weight.clone() for name, weight in teacher.model.state_dict().items()}
    before = teacher.model(ids).logits
    hybrid = hybrid_of(teacher, (0, 2))
    assert (hybrid(ids).logits - before).abs().max() > 0.1
    assert torch.equal(teacher.model(ids).logits, before)
    assert all(torch.equal(weights[name], weight) for name, weight in teacher.model.state_dict().items())


@pytest.mark.parametrize("kind", sorted(MIXERS))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(kind, layout, ids):
    hybrid = hybrid_of(pico_teacher(), LAYOUTS[layout], kind)
    full = hybrid(ids, use_cache=False).logits
    out = hybrid(ids[:, :10], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for first, last in ((10, 11), (11, 16), (16, 17), (17, 21)):
        assert cache.get_seq_length() == first
        parts.append(hybrid(ids[:, first:last], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", sorted(MIXERS))
@torch.no_grad()
def test_padding_changes_nothing(kind, layout, ids):
    hybrid = hybrid_of(pico_teacher(), LAYOUTS[layout], kind)
    full = hybrid(ids, use_cache=False).logits
    for num_left, num_right in ((7, 0), (0, 7), (3, 4)):
        padded, mask = torch.zeros(2, 3, 28, dtype=torch.long)
        real = slice(num_left, 28 - num_right)
        padded[:, real], mask[:, real] = ids, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = hybrid(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(out[:, real], full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_with_cache_equals_generate_without(teacher, layout, beams):
    hybrid = hybrid_of(teacher, LAYOUTS[layout])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    prompts = [torch.randint(1, 257, (n,)) for n in (4, 9, 7)]
    alone = [hybrid.generate(p[None], attention_mask=torch.ones(1, len(p)), **options)[0, len(p) :] for p in prompts]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    for use_cache in (True, False):
        batch = hybrid.generate(ids, attention_mask=mask, use_cache=use_cache, **options)[:, 9:]
        assert torch.equal(batch, torch.stack(alone))


@torch.no_grad()
def test_a_saved_and_loaded_hybrid_is_the_same_model(teacher, ids, tmp_path):
    hybrid = hybrid_of(teacher, (0, 2))
    hybrid.tokenizer = teacher.tokenizer
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, hybrid, input_ids=ids)
    assert loaded.linear_layers == [0, 2]
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == teacher.tokenizer("ab")["input_ids"]
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert_same_model(AutoModelForCausalLM.from_pretrained(again), hybrid, input_ids=ids)


FRESH = """
import sys, json, torch
if {blocked!r}:
    sys.modules["dtr"] = None  # as if the package were not installed
else:
    import dtr
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code={blocked!r})
ids = torch.arange(1, 22)[None]
with torch.no_grad():
    logits = model(ids).logits[0, -1].tolist()
    for cache in (None, "static"):
        text = model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation=cache)[0].tolist()
        print(json.dumps([logits, text]))
if {blocked!r}:
    model.save_pretrained({folder!r} + "/again")
    from transformers import AutoModelForSequenceClassification
    print(type(AutoModelForSequenceClassification.from_pretrained({head!r}, trust_remote_code=True)).__module__)
"""


@pytest.mark.parametrize("blocked", [False, True], ids=["import_dtr", "trust_remote_code_without_dtr"])
@torch.no_grad()
def test_a_fresh_process_loads_the_folder(blocked, tmp_path):
    hybrid = hybrid_of(pico_teacher(), (0, 2), ("gated_deltanet", "mamba2"))
    hybrid.save_pretrained(tmp_path / "hybrid")
    make_hybrid(pico_classifier(), {}, {}).save_pretrained(tmp_path / "head")
    code = FRESH.format(blocked=blocked, folder=str(tmp_path / "hybrid"), head=str(tmp_path / "head"))
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_NUM_THREADS": "1"}
    if blocked:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    else:
        done = forks.run("-c", code, env=env)
    assert done.returncode == 0, done.stderr
    growing, static = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert ("dtr_hybrid_modeling" in done.stdout) == blocked
    assert static == growing
    logits, text = growing
    ids = torch.arange(1, 22)[None]
    assert_same_up_to_rounding(torch.tensor(logits), hybrid(ids).logits[0, -1])
    assert text == hybrid.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    if blocked:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid" / "again")
        assert_same_model(again, hybrid, input_ids=ids)


@torch.no_grad()
def test_running_layers_one_by_one_equals_the_forward_pass(teacher, ids):
    model = hybrid_of(teacher, (1, 2))
    runner = LayerRunner(model)
    batch = runner.prepare(ids)
    hidden = batch.hidden_BTD
    for index, layer in enumerate(runner.layers):
        hidden = runner.run_layer(index, layer, hidden, batch)
    assert torch.equal(runner.logits(hidden), model(ids).logits)


@torch.no_grad()
def test_sliding_window_teacher(ids):
    teacher = pico_teacher("mistral", sliding_window=8)
    hybrid = hybrid_of(teacher, (0, 2))
    assert torch.equal(hybrid_of(teacher, ()).forward(ids).logits, teacher.model(ids).logits)
    full = hybrid(ids, use_cache=False).logits
    out = hybrid(ids[:, :12], use_cache=True)
    rest = hybrid(ids[:, 12:], past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([out.logits, rest.logits], dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(MIXERS))
@torch.no_grad()
def test_cache_bytes_are_what_the_arithmetic_says(kind, ids):
    teacher = pico_teacher()
    cache = hybrid_of(teacher, (0, 2), kind)(ids, use_cache=True).past_key_values
    state_bytes = 2 * make_mixer(kind, teacher.geometry, 0).state_bytes(4)
    expected = decode_cache_bytes(teacher.geometry, 2, context_tokens=21, bytes_per_element=4, state_bytes=state_bytes)
    assert cache.num_bytes() == 3 * expected


def test_misuse_is_told(ids):
    hybrid = hybrid_of(pico_teacher(), (0,))
    with pytest.raises(ModelError, match="HybridCache"):
        hybrid(ids, past_key_values=DynamicCache())
    with pytest.raises(ModelError, match="full attention"):
        as_teacher(hybrid, None)


@pytest.mark.parametrize(
    "first",
    [
        "transformers.models.auto.modeling_auto",
        *(
            pytest.param(f"transformers.{name}", marks=pytest.mark.slow)
            for name in (
                "trainer",
                "models.llama.modeling_llama",
                "models.auto.configuration_auto",
                "cache_utils",
                "pipelines",
            )
        ),
    ],
)
def test_our_import_hook_disturbs_no_other_import(first):
    code = f"import dtr, {first}; from transformers import AutoConfig; print(AutoConfig.for_model('dtr_qwen3').mixers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[None")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("change", ["lost", "under another name"])
def test_a_damaged_checkpoint_is_refused_by_the_library_too(name, change, tmp_path):
    hybrid_of(pico_teacher(), (0, 2)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = weights.pop(name)
    if change != "lost":
        weights[f"{name}_old"] = lost
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert told["missing_keys"] == {name}


def test_a_hybrid_takes_another_head_as_its_family_does(tmp_path):
    hybrid_of(pico_teacher(), (0, 2)).save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier.score.out_features == 3
    assert classifier.linear_layers == [0, 2]
