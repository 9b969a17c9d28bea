"""Which causal model types of transformers work: a pico model of each is loaded, distilled, saved and reloaded.

    python benchmarks/families.py [MODEL_TYPE ...] [--out benchmarks/results/families.json]

Every type of transformers' causal mapping is tried with random weights and a few small layers; sizes are set by the
names that configs have for them. For each type the result says `works`, `refused` (by dtr, with its message; also types
that transformers cannot build here, which are told apart by `reason`) or `wrong`: loaded, but a check failed. Checks:
the self-check at load; a hybrid without linear layers equal bit for bit; the layer-by-layer pass equal to the hybrid's
own; a cached pass equal to one without; padding on the left; beams; reload in a fresh process without dtr; and that
distillation makes the error of every layer smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from random_model import byte_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dtr
from dtr.arch import make_runner
from dtr.environment import command_line, hardware, own_commit
from dtr.errors import DtrError
from dtr.hybrid.modeling import make_hybrid

OUT = Path(__file__).parent / "results" / "families.json"
MAX_SECONDS = 300
MAX_PARAMETERS = 30_000_000
NUM_TOKENS = 32
TOLERANCE = 1e-3
"""Of logits that other kernels compute, as a share of the largest."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 257),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "attention_head_dim", "kv_lora_rank", "lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_d_state", "mamba_dt_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(
        ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_experts_per_layer"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_heads_", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("q_lora_rank",), 24),
}
"""What the fields of configs are called, and how small each is made."""
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "xglm": {"num_layers": 4},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0], "num_local_experts": 2, "num_experts_per_tok": 1},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 1},
    "nemotron_h": {"hybrid_override_pattern": "M*-*", "mamba_num_heads": 8, "mamba_head_dim": 16},
    "mpt": {"expansion_ratio": 2},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "dots1": {"n_shared_experts": 1},
}
"""What a type needs beside that."""


def make_config(model_type: str) -> Any:
    """A small config of this type."""
    return small(CONFIG_MAPPING[model_type], model_type)


def small(cls: Any, model_type: str) -> Any:
    """A config of this class with small sizes, those of its parts included."""
    renamed = getattr(cls, "attribute_map", {})
    plain = cls()
    known = getattr(cls, "__dataclass_fields__", None) or vars(plain)
    fields = {name: value for name, value in SIZES.items() if name in known and name not in renamed}
    if "kv_lora_rank" in fields and "qk_rope_head_dim" in fields:
        # Latent attention: what is called head_dim is the part with rotary positions, and every head has keys.
        fields |= {name: value for name, value in {"num_key_value_heads": 4, "head_dim": 8}.items() if name in known}
    # What has no value by default is left out, as a window that none is meant to have.
    optional = ("sliding_window", "q_lora_rank", "n_inner", "attention_chunk_size", "rotary_dim")
    fields = {
        name: value for name, value in fields.items() if name not in optional or vars(plain).get(name) is not None
    }
    for name, part in getattr(cls, "sub_configs", {}).items():
        if isinstance(part, type) and hasattr(part, "model_type") and part is not transformers.AutoConfig:
            fields[name] = small(part, part.model_type).to_dict()
    config = cls(**fields | SPECIAL.get(model_type, {}))
    kinds = getattr(config, "layer_types", None) if "layer_types" in known else None
    if kinds and len(set(kinds)) == 1 and kinds[0] not in ("full_attention", "attention"):
        config = cls(**fields | {"layer_types": [kinds[0], "full_attention"] * 2} | SPECIAL.get(model_type, {}))
    return config


def make_model(model_type: str) -> Any:
    """A small model with random weights, larger than the library's, with which every layer is almost the identity."""
    config = make_config(model_type)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{num_parameters / 1e6:.0f} million parameters, as its sizes have names that are not known here"
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and weight.is_floating_point():
                weight.normal_(std=0.12)
            elif "norm" in name.lower() and weight.is_floating_point():
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def apart(got: torch.Tensor, expected: torch.Tensor) -> str:
    """How far two results are apart, if it is more than rounding."""
    far = float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-12))
    return "" if far <= TOLERANCE else f"{far:.2g} of the largest apart"


class FreshProcess:
    """Another Python that loads models as anyone would, and knows nothing of this package."""

    CODE = """
import sys, warnings; warnings.filterwarnings("ignore")
import torch, transformers
transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar(); torch.set_num_threads(1)
for line in sys.stdin:
    folder = line.strip()
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
        assert "dtr" not in sys.modules, "dtr was imported"
        missing = sorted(told["missing_keys"]) + sorted(told["unexpected_keys"])
        assert not missing, f"keys missing or left over: {missing[:3]}"
        with torch.no_grad():
            torch.save(model.eval()(torch.load(folder + "/ids.pt"), use_cache=False).logits, folder + "/logits.pt")
        print("answer", flush=True)
    except Exception as error:
        print("answer", type(error).__name__, " ".join(str(error).split())[:200], flush=True)
"""

    def __init__(self) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Its own code for hybrids, not that of an earlier one of the same name.
        env = kept | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._child = subprocess.Popen([sys.executable, "-c", self.CODE], text=True, env=env, cwd="/", **pipes)

    def logits(self, folder: Path, ids: torch.Tensor) -> torch.Tensor | str:
        """What the model saved in `folder` answers, or the error."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        torch.save(ids, folder / "ids.pt")
        self._child.stdin.write(f"{folder}\n")
        self._child.stdin.flush()
        for line in self._child.stdout:
            if line.startswith("answer"):
                return line.removeprefix("answer").strip() or torch.load(folder / "logits.pt")
        return "the process ended"


def examine(model_type: str, fresh: FreshProcess) -> dict[str, Any]:
    """The record of one model type."""
    record: dict[str, Any] = {"model_type": model_type, "status": "refused", "checks": {}, "message": ""}
    try:
        model = make_model(model_type)
    except Exception as error:
        return record | {"reason": "not built", "message": f"{type(error).__name__}: {first_line(error)}"}
    try:
        teacher = dtr.as_teacher(model, byte_tokenizer(), source=model_type)
    except DtrError as error:
        return record | {"reason": "refused", "message": " ".join(str(error).split())}
    checks, faults = record["checks"], []
    record |= {"layers": len(make_runner(model).layers), "replaceable": teacher.replaceable_layers}
    checks["self_check"] = True

    def check(name: str, find: Any) -> None:
        try:
            found = find()
        except Exception as error:
            found = f"{type(error).__name__}: {first_line(error)}"
        checks[name] = not found
        if found:
            faults.append(f"{name}: {found}")

    with torch.no_grad():
        ids = torch.randint(1, 257, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
        plain = model(ids, use_cache=False).logits
        zero = make_hybrid(model, {}, {})
        check("zero_swap", lambda: "" if torch.equal(zero(ids, use_cache=False).logits, plain) else "other logits")
    # Distillation is to reproduce attention on any text, random ones included.
    tokens = torch.randint(1, 257, (176, 64), generator=torch.Generator().manual_seed(2))
    text = dtr.TokenBlocks.from_tensors(tokens[:160], tokens[160:], source="random")
    bank = dtr.distill(teacher, text, num_tokens=10_000, batch_size=8, learning_rate=2e-3)
    worse = [i for i in bank.layers if not bank.nmse_after[i] < bank.nmse_before[i]]
    check("nmse_falls", lambda: f"not in layers {worse}" if worse else "")
    mixers, specs = bank.in_dtype(torch.float32), {i: bank.spec(i) for i in bank.mixers}
    hybrid = make_hybrid(model, mixers, specs)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits
        check("runner", lambda: runner_fault(model, mixers, ids, expected))
        check("cached_equals_full", lambda: cache_fault(hybrid, ids, expected))
        check("padding", lambda: padding_fault(model, hybrid, ids))
        check("beams", lambda: beams_fault(hybrid, ids[:, :12]))
        check("reload_without_dtr", lambda: reload_fault(hybrid, ids, expected, fresh))
    return record | {"status": "wrong" if faults else "works", "message": "; ".join(faults)}


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def runner_fault(model: Any, mixers: Any, ids: torch.Tensor, expected: torch.Tensor) -> str:
    """Layers one by one, as evaluation runs them, against the hybrid's own pass."""
    from dtr.arch import with_mixer

    runner = make_runner(model)
    batch = runner.prepare(ids)
    hidden = batch.hidden_BTD
    for index, layer in enumerate(runner.layers):
        chosen = with_mixer(layer, mixers[index]) if index in mixers else layer
        hidden = runner.run_layer(index, chosen, hidden, batch)
    return apart(runner.logits(hidden.flatten(0, 1)), expected.flatten(0, 1))


def cache_fault(hybrid: Any, ids: torch.Tensor, expected: torch.Tensor) -> str:
    start = hybrid(ids[:, :20], use_cache=True)
    parts, cache = [start.logits], start.past_key_values
    for at in range(20, ids.shape[1]):
        parts.append(hybrid(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return apart(torch.cat(parts, 1), expected)


def padding_fault(model: Any, hybrid: Any, ids: torch.Tensor) -> str:
    """Logits of greedy texts after padding on the left against those without, where the model itself has the same."""
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids[:, :16]], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 16, dtype=torch.long)], 1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def fault(one: Any) -> str:
        bare = one.generate(ids[:, :16], attention_mask=torch.ones(2, 16, dtype=torch.long), **options)
        after = one.generate(padded, attention_mask=mask, **options)
        return apart(torch.stack(after.logits), torch.stack(bare.logits))

    found = fault(hybrid)
    return "" if not found or fault(model) else f"other logits after padding, {found}"


def beams_fault(hybrid: Any, prompt: torch.Tensor) -> str:
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    texts = [hybrid.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False)]
    return "" if torch.equal(*texts) else "other beams with a cache than without"


def reload_fault(hybrid: Any, ids: torch.Tensor, expected: torch.Tensor, fresh: FreshProcess) -> str:
    with tempfile.TemporaryDirectory() as folder:
        hybrid.save_pretrained(folder)
        got = fresh.logits(Path(folder), ids)
    return got if isinstance(got, str) else apart(got, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of the causal mapping when left out")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {MAX_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    fresh, records = FreshProcess(), []
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(MAX_SECONDS)
        try:
            record = examine(model_type, fresh)
        except Exception as error:
            message = f"{type(error).__name__}: {first_line(error)}"
            record = {"model_type": model_type, "status": "wrong", "checks": {}, "message": message}
        signal.alarm(0)
        records.append(record | {"commit": own_commit()})
        write(args.out, records)
        print(f"{model_type:24s} {record['status']:8s} {record['message'][:300]}", flush=True)
    print(json.loads(args.out.read_text(encoding="utf-8"))["counts"])


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """The result, in which types that were not asked for this time stay as they were; each has the commit it ran at."""
    before = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else []
    by_type = {record["model_type"]: record for record in [*before, *records]}
    models = [by_type[model_type] for model_type in sorted(by_type)]
    counts = {status: sum(r["status"] == status for r in models) for status in ("works", "refused", "wrong")}
    facts = {"transformers": transformers.__version__, "torch": torch.__version__, "hardware": hardware()}
    facts |= {"command": command_line(), "counts": counts, "models": models}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
