"""The model that is loaded is the one that is meant: keys of checkpoints, the self-check, hooks, fingerprints."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_hybrid import hybrid_of
from tiny import byte_tokenizer, pico_model, pico_teacher
from transformers import AutoModelForCausalLM

import dtr
from dtr.arch import LayerRunner, decoder_layers, with_mixer
from dtr.errors import ModelError
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher
from dtr.self_check import CHECKS, self_check
from dtr.teacher import as_teacher, load_model, load_teacher

OPTIONS = {"device": "cpu", "dtype": "float32"}


def saved(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_nan(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")


DAMAGES = {
    "a weight is missing": (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "no weights for .*1.mlp.up_proj"),
    "one too many": (lambda w: w.update({"model.layers.9.x.weight": torch.ones(2)}), r"no place for \(.*layers.9.x"),
    "another shape": (lambda w: w.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight"),
    "no number": (put_nan, r"NaN or infinity in model.layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("what", ["teacher", "hybrid"])
@pytest.mark.parametrize("case", DAMAGES)
def test_a_checkpoint_with_other_weights_is_refused_by_name(case, what, tmp_path):
    model = pico_model() if what == "teacher" else hybrid_of(pico_teacher(), (0, 2))
    change, message = DAMAGES[case]
    change_weights(saved(tmp_path, model), change)
    with pytest.raises(ModelError, match=message):
        (load_teacher if what == "teacher" else load_model)(tmp_path, **OPTIONS)


def test_a_hybrid_without_a_mixers_weights_is_refused(tmp_path):
    saved(tmp_path, hybrid_of(pico_teacher(), (0, 2)))
    change_weights(tmp_path, lambda w: w.pop("model.layers.2.self_attn.gate_proj.weight"))
    with pytest.raises(ModelError, match=r"no weights for model.layers.2.self_attn.gate_proj.weight"):
        load_model(tmp_path, **OPTIONS)


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_and_obsolete_weights_are_no_mistake(is_tied, tmp_path):
    model = pico_model(tie_word_embeddings=is_tied)
    saved(tmp_path, model)

    def as_once(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        if is_tied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(tmp_path, as_once)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(load_teacher(tmp_path, **OPTIONS).model(ids).logits, model(ids).logits)


def lora(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model = pico_model()
    saved(folder, model)
    peft.get_peft_model(model, config).save_pretrained(folder)


def remote(folder):
    saved(folder, pico_model())
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "class Own(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n"
        "        out.logits = out.logits * 0.9\n"
        "        return out\n"
    )
    change_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})


def with_fields(family="llama", **fields):
    def make(folder):
        change_config(saved(folder, pico_model(family)), **fields)

    return make


FOUR_KINDS = ["full_attention", "sliding_attention"] * 2
WRONGS = {
    "a base model": (lambda folder: saved(folder, pico_model("qwen2").model), "lm_head.weight.*base model"),
    "a window that is ignored": (with_fields(sliding_window=8), "'settings'.*sliding_window 8"),
    "a wide window that is ignored": (with_fields(sliding_window=4096), "'settings'.*sliding_window 4096"),
    "kinds of layers that are ignored": (
        with_fields(layer_types=FOUR_KINDS, sliding_window=None),
        "'settings'.*layer_types",
    ),
    "not causal": (with_fields(is_causal=False), "'causality'"),
    "an adapter": (lora, "'plain projections'.*o_proj of layer 0.*peft.*merge_and_unload"),
    "another forward": (remote, "'layer by layer'.*other logits"),
}


@pytest.mark.parametrize("case", WRONGS)
def test_a_model_that_is_not_what_its_family_is_is_refused(case, tmp_path):
    make, message = WRONGS[case]
    make(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_teacher(tmp_path, **OPTIONS, trust_remote_code=case == "another forward")


def double_values(model):
    attention = decoder_layers(model)[2].self_attn
    attention.v_proj.register_forward_hook(lambda _module, _args, out: 2 * out)


def closure(model):
    layer = decoder_layers(model)[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)


def later_tokens(model):
    # Too little to show in the first token's output alone.
    norm = model.model.norm
    norm.register_forward_hook(lambda _module, _args, out: out + 0.01 * out.mean(1, keepdim=True))


def scale_logits(model):
    model.lm_head.register_forward_hook(lambda _module, _args, out: out.clamp(-0.5, 0.5))


def forget(model):
    layer = decoder_layers(model)[3].self_attn
    own = layer.forward
    layer.forward = lambda *args, past_key_values=None, **kwargs: own(*args, past_key_values=None, **kwargs)


def lose_a_token(model):
    model.to(torch.bfloat16)
    own = model.forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            past_key_values.layers[2].values[:, :, 3] = 0
        return own(*args, past_key_values=past_key_values, **kwargs)

    model.forward = forward


class RoundingLinear(torch.nn.Linear):
    """As quantised layers are: a Linear whose weight is not what it multiplies with."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.sign(), self.bias)


def quantise(model):
    decoder_layers(model)[2].self_attn.k_proj.__class__ = RoundingLinear


IN_MEMORY = {
    "a kind of linear map": (quantise, "'plain projections'.*k_proj of layer 2 as a .*RoundingLinear"),
    "a hook on a projection": (double_values, "'first token'.*layer 2"),
    "a layer patched on the object": (closure, "'swap'|wrapped|replaced"),
    "a sight of later tokens": (later_tokens, "'causality'"),
    "a head of its own": (scale_logits, "'layer by layer'"),
    "a cache that is not used": (forget, "'cache'"),
    "a cache that loses a token, in bfloat16": (lose_a_token, "'cache'"),
    "a lost layer": (lambda model: model.model.layers.__delitem__(3), "'parts'.*3 layers"),
    "a weight that is none": (lambda model: model.lm_head.weight.data[5].fill_(float("inf")), "'finite weights'"),
    "offloaded": (lambda model: decoder_layers(model)[0].mlp.to("meta"), "'weights in place'"),
    "other weights": (
        lambda model: model.model.norm.register_buffer("extra", torch.ones(1)),
        "'zero swap'.*norm.extra",
    ),
}


@pytest.mark.parametrize("case", IN_MEMORY)
def test_a_model_that_was_changed_in_memory_is_refused(case):
    model = pico_model(tie_word_embeddings=False)
    change, message = IN_MEMORY[case]
    change(model)
    with pytest.raises(ModelError, match=message):
        as_teacher(model, byte_tokenizer())


def test_wrappers_are_refused():
    peft = pytest.importorskip("peft")
    with pytest.raises(ModelError, match=r"'parts'.*PeftModel"):
        as_teacher(peft.get_peft_model(pico_model(), peft.LoraConfig(target_modules=["q_proj"])), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_as_they_should_be_pass_in_every_type(family, dtype):
    windows = {"mistral": {"sliding_window": 64}, "qwen2": {"sliding_window": 4, "use_sliding_window": True}}
    model = pico_model(family, **windows.get(family, {}), **({"max_window_layers": 2} if family == "qwen2" else {}))
    window = model.config.sliding_window if family in windows else None
    line = as_teacher(model.to(dtype), byte_tokenizer(), source="pico").self_check
    assert line.startswith("self-check of pico: ")
    assert all(check.name in line for check in CHECKS)
    if window:
        assert model.config.sliding_window == window


def test_a_hybrid_is_checked_as_far_as_it_goes():
    assert "layer by layer" in self_check(hybrid_of(pico_teacher(), (0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_state_that_is_not_handed_on_whole_shows_in_few_bits_too(share, dtype):
    """Of one layer of four: by the logits alone it went unseen in bfloat16."""
    hybrid = hybrid_of(pico_teacher(), (0, 1, 2, 3)).to(dtype)
    own = hybrid.model.layers[2].self_attn.recur

    def recur(*args):
        state = args[-1]
        return own(*args[:-1], None if state is None else share * state)

    hybrid.model.layers[2].self_attn.recur = recur
    with pytest.raises(ModelError, match=r"'cache'.*layer 2"):
        self_check(hybrid)


@pytest.mark.parametrize("seed", range(3))
def test_what_rounding_changes_of_a_hybrid_with_a_cache_is_no_fault(seed):
    self_check(hybrid_of(pico_teacher(seed=seed), (0, 1, 2, 3)).to(torch.bfloat16))


def hooked(model):
    """With the hooks of accelerate that a device_map puts on every layer."""
    hooks = pytest.importorskip("accelerate.hooks")
    for layer in decoder_layers(model):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def partly(model):
    for layer in decoder_layers(model):
        layer.forward = functools.partial(type(layer).forward, layer)
    return model


@pytest.mark.parametrize("wrap", [hooked, partly])
@torch.no_grad()
def test_layers_with_hooks_are_really_replaced(wrap):
    ids = torch.randint(1, 257, (2, 9))
    plain = pico_teacher()
    teacher = as_teacher(wrap(pico_model()), byte_tokenizer())
    expected, got = (hybrid_of(t, (0, 2)) for t in (plain, teacher))
    for one, other in zip(got.parameters(), expected.parameters(), strict=True):
        one.copy_(other)
    assert torch.equal(got(ids).logits, expected(ids).logits)
    assert (got(ids).logits - teacher.model(ids).logits).abs().max() > 0.1
    assert torch.equal(teacher.model(ids).logits, plain.model(ids).logits)


@torch.no_grad()
def test_a_layer_that_cannot_be_replaced_is_refused():
    model = pico_model()
    closure(model)
    runner = LayerRunner(model)
    mixer = mixer_from_teacher("gated_deltanet", pico_teacher().geometry, 1, runner.layers[1].self_attn)
    with pytest.raises(ModelError, match="copy runs the original"):
        with_mixer(runner.layers[1], mixer)


ALL_OPTIONS = {"quadratic": True, "conv_tokens": 4, "window": 4, "exact_first": True}


@pytest.mark.parametrize(
    ("kind", "options"), [*((k, {}) for k in sorted(dtr.mixers.MIXERS)), ("gated_deltanet", ALL_OPTIONS)]
)
@torch.no_grad()
def test_mixers_run_with_weights_that_are_brought_in_by_hooks(kind, options, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    teacher = pico_teacher(num_layers=1)
    mixer = mixer_from_teacher(kind, teacher.geometry, 0, decoder_layers(teacher.model)[0].self_attn, options)
    hybrid = make_hybrid(teacher.model, {0: mixer}, {0: {"kind": kind, **options}})
    ids = torch.randint(1, 257, (2, 9))
    expected = hybrid(ids).logits
    hybrid.save_pretrained(tmp_path)
    offloaded = accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(tmp_path), execution_device="cpu")
    torch.testing.assert_close(offloaded(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["5.16.2", "5.24.0", "6.0.0.dev0"])
def test_a_release_of_transformers_that_was_not_tested_is_told(version, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ModelError, match=rf"version {version}.*5.17 to 5.23"):
        load_teacher(tmp_path)
