"""Models beyond the known families, by transformers' attention interface: one of each anatomy, and what is refused."""

from __future__ import annotations

import json
from functools import cache, partial

import pytest
import torch
from docs_pages import ROOT, load_script
from transformers import T5Config, T5ForConditionalGeneration

import dtr
from dtr.backbone.probe import backbone_of
from dtr.bench.distillation import bench_distill
from dtr.bench.subjects import load_subjects
from dtr.distillation.bank import load_bank
from dtr.environment import doctor_of_model
from dtr.errors import DtrError, ModelError, RecipeError
from dtr.evaluation.attention_reach import attention_reach
from dtr.hybrid.modeling import make_hybrid
from dtr.serving.command import serve_command

families = load_script(ROOT / "benchmarks" / "families.py")

ANATOMIES = {
    "gpt2": "fused qkv with transposed weights, learned positions",
    "gpt_neox": "parallel block, partial rotary positions, another head",
    "opt": "nested body, positions from the mask",
    "phi3": "fused qkv of grouped heads",
    "gemma3_text": "sliding windows beside full layers, post-norms, scaling",
    "gpt_oss": "sinks, windows, experts",
    "mixtral": "experts whose weights are saved under other names",
    "deepseek_v3": "latent queries and keys, values of another size",
    "smollm3": "layers without rotary positions",
    "jamba": "state-space layers beside full attention",
    "lfm2": "convolution layers beside full attention",
    "cohere": "one norm for attention and MLP, scaled logits",
}


@cache
def distilled(model_type: str):
    """A pico teacher of this type and its bank after a few steps."""
    teacher = dtr.as_teacher(families.make_model(model_type), families.byte_tokenizer(), source=model_type)
    tokens = torch.randint(1, 257, (8, 32), generator=torch.Generator().manual_seed(2))
    text = dtr.TokenBlocks.from_tensors(tokens[:6], tokens[6:], source="random")
    return teacher, dtr.distill(teacher, text, num_tokens=6 * 32 * 4, batch_size=6, learning_rate=3e-3)


@pytest.fixture(params=list(ANATOMIES))
def subject(request):
    teacher, bank = distilled(request.param)
    mixers, specs = bank.in_dtype(torch.float32), {i: bank.spec(i) for i in bank.mixers}
    return teacher, bank, make_hybrid(teacher.model, mixers, specs)


@torch.no_grad()
def test_a_hybrid_of_any_anatomy_holds_together(subject, tmp_path):
    teacher, bank, hybrid = subject
    assert bank.layers == teacher.replaceable_layers == hybrid.linear_layers
    assert bank.mean_nmse < sum(bank.nmse_before.values()) / len(bank.nmse_before)
    ids = torch.randint(1, 257, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = hybrid(ids, use_cache=False).logits
    plain = teacher.model(ids, use_cache=False).logits
    assert not torch.allclose(expected, plain, atol=1e-3), "nothing was replaced"
    unchanged = make_hybrid(teacher.model, {}, {})
    assert torch.equal(unchanged(ids, use_cache=False).logits, plain)
    ways = ("_attn_implementation", "_experts_implementation")
    assert all(getattr(unchanged.config, way, 0) == getattr(teacher.model.config, way, 0) for way in ways)
    assert not families.runner_fault(teacher.model, bank.in_dtype(torch.float32), ids, expected)
    assert not families.cache_fault(hybrid, ids, expected)
    assert not families.padding_fault(teacher.model, hybrid, ids)
    assert not families.beams_fault(hybrid, ids[:, :12])
    hybrid.tokenizer = teacher.tokenizer
    hybrid.save_pretrained(tmp_path / "hybrid")
    again, _ = dtr.teacher.load_model(tmp_path / "hybrid", device="cpu", dtype="float32")
    assert not families.apart(again(ids, use_cache=False).logits, expected)
    bank.save(tmp_path / "bank")
    assert load_bank(tmp_path / "bank", teacher=teacher).fingerprint == bank.fingerprint


def test_layers_that_are_not_full_attention_stay():
    teacher, _ = distilled("gemma3_text")
    kinds = backbone_of(teacher.model).kinds
    assert {kinds[i] for i in teacher.replaceable_layers} == {"full_attention"}
    assert len(teacher.replaceable_layers) < len(kinds)
    window = next(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    text = dtr.TokenBlocks.from_tensors(*torch.ones(2, 2, 8, dtype=torch.int32), source="ones")
    with pytest.raises(RecipeError, match="layers with full attention"):
        dtr.distill(teacher, text, layers=[window], num_tokens=16)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("bert", "bidirectional_attention"), ("bloom", "never asks the attention interface")]
)
def test_what_cannot_work_is_refused_with_the_reason(model_type, reason):
    model = families.make_model(model_type)
    with pytest.raises(ModelError, match=reason):
        dtr.as_teacher(model, families.byte_tokenizer())


def test_encoder_decoders_are_refused_in_one_line():
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ModelError, match="encoder-decoders are not supported"):
        dtr.as_teacher(model, families.byte_tokenizer())


@pytest.mark.parametrize("kind", ["mamba2", "jet_block"])
def test_kinds_without_a_core_are_refused_with_those_that_have_one(kind):
    """jet_block's own convolution would be left out without a word."""
    teacher, _ = distilled("gpt2")
    text = dtr.TokenBlocks.from_tensors(*torch.ones(2, 2, 8, dtype=torch.int32), source="ones")
    fitting = "Take one of gated_deltanet, gated_linear_attention, kimi_delta_attention, retention"
    with pytest.raises(RecipeError, match=fitting):
        dtr.distill(teacher, text, mixer=kind, num_tokens=16)


def test_layers_whose_arguments_depend_on_lower_layers_fail_their_check():
    """As a layer that also reads the output of the first one: evaluation would go on with a stale one."""
    model, seen = families.make_model("gpt2"), {}

    class Passing(torch.nn.ModuleList):
        def __iter__(self):
            for number, block in enumerate(super().__iter__()):
                yield partial(block, first=seen["out"]) if number == 1 and seen else block

    blocks = Passing(model.transformer.h)
    own = blocks[1].forward
    blocks[1].forward = lambda *args, first=0.0, **kwargs: own(*args, **kwargs) + first
    blocks[0].register_forward_hook(lambda _module, _args, out: seen.update(out=out))
    model.transformer.h = blocks
    model.register_forward_hook(lambda *_: seen.clear())
    with pytest.raises(ModelError, match="self-check 'layer by layer'"):
        dtr.as_teacher(model, families.byte_tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a teacher and of a hybrid."""
    teacher, bank = distilled("gpt2")
    folder = tmp_path_factory.mktemp("gpt2")
    hybrid = make_hybrid(teacher.model, bank.in_dtype(torch.float32), {i: bank.spec(i) for i in bank.mixers})
    for name, model in (("teacher", teacher.model), ("hybrid", hybrid)):
        model.save_pretrained(folder / name)
        teacher.tokenizer.save_pretrained(folder / name)
    return folder


def blocks():
    return dtr.TokenBlocks.from_tensors(*torch.ones(2, 2, 8, dtype=torch.int32), source="ones")


NOT_FOR_PROBED_MODELS = {
    "distill.refit_tokens": lambda folder: dtr.distill(distilled("gpt2")[0], blocks(), num_tokens=16, refit_tokens=8),
    "distill.segment_tokens": lambda folder: dtr.distill(
        distilled("gpt2")[0], blocks(), num_tokens=16, segment_tokens=4
    ),
    "attention_reach": lambda folder: attention_reach(distilled("gpt2")[0], []),
    "dtr bench distill": lambda folder: list(bench_distill(distilled("gpt2")[0], sizes=[(1, 8)])),
    "dtr bench generate": lambda folder: load_subjects(
        str(folder / "hybrid"), num_linear=None, mixer="gated_deltanet", keep=None, device="cpu", dtype="float32"
    ),
    "config.json": lambda folder: serve_command(folder / "hybrid"),
    "dtr_gpt2": lambda folder: dtr.export_hybrid(folder / "hybrid", folder / "stock"),
    "model": lambda folder: dtr.Decoder(distilled("gpt2")[0].model, batch_size=1, capacity_tokens=16),
}


@pytest.mark.parametrize("what", NOT_FOR_PROBED_MODELS)
def test_what_other_models_do_not_have_is_refused_in_one_line(what, saved):
    """Before any work, and by the entry points that people take."""
    with pytest.raises(DtrError) as caught:
        NOT_FOR_PROBED_MODELS[what](saved)
    assert what in str(caught.value)
    assert "gpt2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_whose_attention_is_something_else_fails_its_check(monkeypatch):
    from transformers.models.gpt2 import modeling_gpt2

    model, own = families.make_model("gpt2"), modeling_gpt2.ALL_ATTENTION_FUNCTIONS.get_interface

    def louder(name, default):
        function = own(name, default)
        return lambda module, q, k, v, mask, **options: (1.5 * function(module, q, k, v, mask, **options)[0], None)

    monkeypatch.setattr(type(modeling_gpt2.ALL_ATTENTION_FUNCTIONS), "get_interface", lambda _, *a: louder(*a))
    with pytest.raises(ModelError, match="self-check 'attention'"):
        dtr.as_teacher(model, families.byte_tokenizer())


def test_doctor_says_what_would_be_done_with_a_model(tmp_path):
    teacher, _ = distilled("gemma3_text")
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    found = doctor_of_model(tmp_path, device="cpu", dtype="float32")
    assert found["replaceable_layers"] == teacher.replaceable_layers
    assert found["layers"]["full_attention"] == len(teacher.replaceable_layers)
    assert "gated_deltanet" in found["mixers"]
    assert "mamba2" not in found["mixers"]


@pytest.mark.slow
def test_every_type_works_or_is_refused_as_recorded(tmp_path):
    """`benchmarks/families.py` anew: no type is worse than in the committed result."""
    committed = {r["model_type"]: r["status"] for r in json.loads(families.OUT.read_text(encoding="utf-8"))["models"]}
    fresh = families.FreshProcess()
    worse = []
    for model_type, status in committed.items():
        record = families.examine(model_type, fresh)
        if status == "works" != record["status"]:
            worse.append((model_type, record["message"]))
    assert not worse
