"""Native export: the exported folder, in stock transformers without this package, says what the hybrid says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import assert_same_up_to_rounding
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, pico_model, pico_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtr
from dtr.arch import decoder_layers
from dtr.cli import main
from dtr.errors import ModelError, OutputError, RecipeError
from dtr.export import exporter, granite
from dtr.export.exporter import export_hybrid
from dtr.export.granite import norms_by_group
from dtr.export.parity import Answers, compare, insist
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher

LAYERS = (0, 2, 3)
needs_norms_by_group = pytest.mark.skipif(
    not norms_by_group(), reason="this release of transformers norms all groups of Granite's heads as one"
)
FAMILIES = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 8},
    "qwen2": {"head_dim": 8},
}
GRANITE = [(family, "granite", "linear_attention", "mamba2") for family in sorted(FAMILIES)]
HOMES = [
    ("qwen3", "qwen3_5", "linear_attention", "qwen35_gated_deltanet"),
    *([*GRANITE, ("llama", "granite", "mamba", "mamba2")] if norms_by_group() else []),
]
CLASSES = {"granite": "GraniteMoeHybridForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}


def save_hybrid(folder, family="llama", layers=LAYERS, kind="mamba2", options=None, dtype=torch.float32, **changes):
    """A hybrid with Mamba-2 layers far from their start, on disk."""
    teacher = pico_teacher(family, **changes)
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher(kind, teacher.geometry, i, attention[i], options).eval() for i in layers}
    for mixer in mixers.values():
        # As after training: no weight is where it started, and none is zero.
        for weight in mixer.parameters():
            weight.data.add_(0.2 * max(weight.detach().std().item(), 0.5) * torch.randn_like(weight))
    hybrid = make_hybrid(teacher.model, mixers, {i: {"kind": kind, **(options or {})} for i in layers})
    hybrid.tokenizer = byte_tokenizer()
    hybrid.to(dtype).save_pretrained(folder)
    return hybrid


STOCK = """
import json, sys, torch
sys.modules["dtr"] = None  # as if the package were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(3, 43)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        answers = [model(ids).logits[0].tolist(), text[0].tolist()]
    print(json.dumps([type(model).__module__, type(model).__name__, *answers]))
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
"""


@torch.no_grad()
def test_stock_transformers_without_dtr_gives_the_same(tmp_path):
    hybrids = []
    # One process answers for all, as starting it takes longer than the answers.
    for i, (family, to, spelling, kind) in enumerate(HOMES):
        hybrids.append(save_hybrid(tmp_path / f"hybrid{i}", family, kind=kind, **FAMILIES.get(family, {})))
        record = export_hybrid(tmp_path / f"hybrid{i}", tmp_path / f"out{i}", to=to, layer_types=spelling)
        assert record["parity"]["max_abs_logit_diff"] < 5e-5, family
        assert record["parity"]["same_tokens"], family
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path / f"out{i}") for i in range(len(HOMES))]
    done = subprocess.run([sys.executable, "-c", STOCK, *folders], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == len(HOMES)
    ids = torch.arange(3, 43)[None]
    for home, hybrid, folder, (module, name, logits, text) in zip(HOMES, hybrids, folders, answers):
        _, to, spelling, _ = home
        assert module.startswith("transformers.models.")
        assert name == CLASSES[to]
        torch.testing.assert_close(torch.tensor(logits), hybrid(ids).logits[0], rtol=0, atol=5e-5)
        ours = hybrid.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert text == ours[0].tolist(), home
        config = json.loads((Path(folder) / "config.json").read_text())
        names = {"linear_attention": ("linear_attention", "full_attention"), "mamba": ("mamba", "attention")}[spelling]
        assert config["layer_types"] == [names[0] if i in LAYERS else names[1] for i in range(4)]
        assert "auto_map" not in config
        assert not list(Path(folder).glob("*.py"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_attention_differs_by_rounding_alone(family, tmp_path):
    model = pico_model(family, **FAMILIES[family])
    model.save_pretrained(tmp_path / "model")
    record = export_hybrid(tmp_path / "model", tmp_path / "out")
    assert record["parity"]["max_abs_logit_diff"] < 1e-5
    ids = torch.randint(1, 257, (2, 40))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_up_to_rounding(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"num_groups": 2}, {"head_dim": 8}),
        ({}, {"head_dim": 16}),
        ({}, {"head_dim": 8, "attention_bias": True}),
        ({}, {"head_dim": 8, "tie_word_embeddings": False}),
        (
            {},
            {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
    ],
    ids=["groups_of_heads", "wide_heads", "attention_bias", "untied", "llama3_rope"],
)
@needs_norms_by_group
def test_less_common_models_keep_parity(options, changes, tmp_path):
    save_hybrid(tmp_path / "hybrid", options=options, **changes)
    assert export_hybrid(tmp_path / "hybrid", tmp_path / "out")["parity"]["max_abs_logit_diff"] < 5e-5


def test_norms_of_qwen35_keep_their_digits(tmp_path):
    """A weight of 0.01 less 1 has no digits left in bfloat16."""
    teacher = pico_model("qwen3")
    for name, weight in teacher.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.005, 0.02)
    teacher.bfloat16().save_pretrained(tmp_path / "model")
    assert export_hybrid(tmp_path / "model", tmp_path / "out", to="qwen3_5")["parity"]["max_abs_logit_diff"] < 1e-5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for name, t in stored.items() if "norm" in name} == {"torch.float32"}
    assert {str(t.dtype) for name, t in stored.items() if "norm" not in name} == {"torch.bfloat16"}


@needs_norms_by_group
def test_weights_stay_in_their_type(tmp_path):
    save_hybrid(tmp_path / "hybrid", dtype=torch.bfloat16, head_dim=8)
    assert export_hybrid(tmp_path / "hybrid", tmp_path / "out")["dtype"] == "bfloat16"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}


@needs_norms_by_group
def test_padded_batches_of_the_stock_model_agree_too(tmp_path):
    hybrid = save_hybrid(tmp_path / "hybrid", head_dim=8)
    export_hybrid(tmp_path / "hybrid", tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids, mask = torch.randint(1, 257, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    assert torch.equal(stock.generate(ids, **options), hybrid.generate(ids, **options))


@needs_norms_by_group
def test_the_command_line(tmp_path, monkeypatch, capsys):
    save_hybrid(tmp_path / "hybrid", head_dim=8)
    monkeypatch.setattr(
        sys, "argv", ["dtr", "export", str(tmp_path / "hybrid"), "--to", "granite", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["parity"]["num_same_tokens"] == 64
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert dtr.export_hybrid is export_hybrid


class TestRefusals:
    """Nothing is written, and the message says what would do."""

    @pytest.fixture(scope="class")
    def hybrid(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("refused") / "hybrid"
        save_hybrid(folder, head_dim=8)
        return folder

    @pytest.fixture
    def copy(self, hybrid, tmp_path):
        """The hybrid's folder, to be damaged."""
        target = tmp_path / "copy"
        target.mkdir()
        for file in hybrid.iterdir():
            if file.is_file():
                (target / file.name).write_bytes(file.read_bytes())
        return target

    def refused(self, folder, out, error=ModelError, match="", **options):
        with pytest.raises(error, match=match):
            export_hybrid(folder, out, **options)
        assert not out.exists()
        assert not list(out.parent.glob(f".{out.name}*"))

    def test_mixers_without_a_native_home(self, tmp_path):
        save_hybrid(tmp_path / "hybrid", kind="gated_deltanet", layers=(1, 3), head_dim=8)
        match = (
            r"gated_deltanet in layers 1, 3; expected mamba2 .* Qwen2 models \(--to granite\); "
            r"qwen35_gated_deltanet in Qwen3 models \(--to qwen3_5\)"
        )
        self.refused(tmp_path / "hybrid", tmp_path / "out", match=match)

    def test_a_family_without_a_native_home(self, tmp_path):
        save_hybrid(tmp_path / "hybrid", "qwen3", head_dim=8)
        self.refused(
            tmp_path / "hybrid", tmp_path / "out", match="a Qwen3 model; expected one of Llama, Mistral, Qwen2"
        )

    def test_a_wrong_target(self, hybrid, tmp_path):
        self.refused(hybrid, tmp_path / "out", RecipeError, "Did you mean 'granite'", to="granit")
        self.refused(hybrid, tmp_path / "out", RecipeError, "Did you mean 'mamba'", layer_types="mambo")

    def test_a_folder_that_is_not_ours(self, tmp_path):
        self.refused(tmp_path / "nothing", tmp_path / "out", match="no such folder")
        (tmp_path / "empty").mkdir()
        self.refused(tmp_path / "empty", tmp_path / "out", match=r"config\.json: got no such file")
        (tmp_path / "empty" / "config.json").write_text("{")
        self.refused(tmp_path / "empty", tmp_path / "out", match=r"config\.json: got JSONDecodeError")
        (tmp_path / "empty" / "config.json").write_text('{"model_type": "gpt2"}')
        self.refused(tmp_path / "empty", tmp_path / "out", match="model type 'gpt2'")

    def test_missing_and_damaged_weights(self, copy, hybrid, tmp_path):
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refused(copy, tmp_path / "out", match=r"model\.safetensors: got a damaged file")
        weights.unlink()
        self.refused(copy, tmp_path / "out", match="1 of 1 weight files missing")
        AutoModelForCausalLM.from_pretrained(hybrid).save_pretrained(copy, max_shard_size="20KB")
        shards = sorted(copy.glob("model-*.safetensors"))
        assert len(shards) > 2
        shards[1].unlink()
        self.refused(copy, tmp_path / "out", match=rf"missing \({shards[1].name}\)")

    def test_weights_that_do_not_fit(self, copy, tmp_path):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"mixers": [{"kind": "mamba2"}] * 4}))
        self.refused(copy, tmp_path / "out", match=r"weights that do not fit config\.json")
        (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
        self.refused(copy, tmp_path / "out", match="expected a model that loads|do not fit")

    def test_wrong_types_of_weights(self, copy, tmp_path):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        self.refused(copy, tmp_path / "out", match="weights of type I8; expected float32")

    def test_what_granite_cannot_express(self, tmp_path):
        save_hybrid(tmp_path / "window", "mistral", head_dim=8, sliding_window=64)
        self.refused(tmp_path / "window", tmp_path / "out", match="sliding window of 64 tokens")
        save_hybrid(tmp_path / "linear", layers=(0, 1, 2, 3), head_dim=8)
        self.refused(tmp_path / "linear", tmp_path / "out", match="no attention layer")
        save_hybrid(tmp_path / "bias", head_dim=8, mlp_bias=True)
        self.refused(tmp_path / "bias", tmp_path / "out", match="biases in the MLP")

    def test_a_release_of_transformers_without_norms_by_group(self, hybrid, tmp_path, monkeypatch):
        monkeypatch.setattr(granite, "norms_by_group", lambda: False)
        self.refused(hybrid, tmp_path / "out", match=r"norms all groups .* expected transformers 5\.23 or later")

    def test_a_folder_that_holds_something(self, hybrid, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(OutputError, match="not empty"):
            export_hybrid(hybrid, tmp_path / "out")
        assert (tmp_path / "out" / "mine").read_text() == "mine"

    @needs_norms_by_group
    def test_an_export_that_differs_or_is_interrupted_leaves_nothing(self, hybrid, tmp_path, monkeypatch):
        convert = exporter.TARGETS["granite"].convert

        def slightly_wrong(source):
            model = convert(source)
            model.model.norm.weight = torch.nn.Parameter(1.01 * model.model.norm.weight)
            return model

        wrong = exporter.Target(**vars(exporter.TARGETS["granite"]) | {"convert": slightly_wrong})
        monkeypatch.setitem(exporter.TARGETS._items, "granite", wrong)
        self.refused(hybrid, tmp_path / "out", match="logit difference of")
        monkeypatch.undo()

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(exporter, "_prove", interrupt)
        self.refused(hybrid, tmp_path / "out", KeyboardInterrupt)


def test_the_gate_refuses_other_tokens_and_nan():
    same = Answers(logits=torch.zeros(1, 2, 3), greedy=[1, 2, 3])
    insist(compare(same, same), "here")
    other = compare(same, Answers(logits=same.logits, greedy=[1, 9, 3]))
    assert other.num_same_tokens == 1
    for parity in (other, compare(same, Answers(logits=same.logits * torch.nan, greedy=same.greedy))):
        with pytest.raises(ModelError, match="here"):
            insist(parity, "here")


VLLM = """
import json, os
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
from vllm import LLM, SamplingParams
llm = LLM(model={folder!r}, dtype="float32", max_model_len=256, enforce_eager=True)
wish = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
tokens = list(llm.generate([{{"prompt_token_ids": {prompt!r}}}], wish)[0].outputs[0].token_ids)
print("TOKENS", json.dumps(tokens), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif("DTR_VLLM_PYTHON" not in os.environ, reason="DTR_VLLM_PYTHON names no Python with vLLM")
def test_vllm_gives_the_same_tokens(tmp_path):
    """docs/export.md says how to make the environment."""
    size = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    hybrid = save_hybrid(tmp_path / "hybrid", **size)
    export_hybrid(tmp_path / "hybrid", tmp_path / "out")
    prompt = list(range(3, 43))
    code = VLLM.format(folder=str(tmp_path / "out"), prompt=prompt)
    done = subprocess.run([os.environ["DTR_VLLM_PYTHON"], "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.tensor([prompt])
    ours = hybrid.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    # The engine may say more as it shuts down.
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert json.loads(said.removeprefix("TOKENS ")) == ours[0, 40:].tolist()
