"""Load and check the frozen teacher: a hub name, a folder, a GGUF file, or a packaged model."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dtr.arch import HYBRID_PREFIX, HeadGeometry, check_supported, decoder_layers, read_geometry
from dtr.distributed import current_world
from dtr.errors import DeviceError, ModelError, RecipeError, did_you_mean
from dtr.pretrained import PACKAGED_MODELS, fetch_packaged_model

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen causal language model with its tokenizer. Nothing in this package changes it."""

    model: Any
    tokenizer: Any
    source: str
    geometry: HeadGeometry
    fingerprint: str
    """Hash of the config and a sample of every weight, 16 hex digits."""
    is_sharded: bool = False
    """Whether each rank holds only its part of every weight; all ranks must then run the same passes together."""

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def kernel_dtype(self) -> torch.dtype | None:
        """Type of what kernels get; None for float16, in which a model runs and is not trained."""
        return None if self.dtype == torch.float16 else self.dtype


def load_teacher(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    shard: bool = False,
) -> Teacher:
    """Load a pretrained full-attention model, frozen and in evaluation mode.

    Args:
        source: hub name, local folder, GGUF file, or a packaged model such as `smollm2-demo`.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16; auto is bfloat16 where the device multiplies it fast.
        trust_remote_code: run Python code that comes with the model.
        shard: spread every weight over the ranks that torchrun started (FSDP2), for a model larger than one GPU; such
            a teacher can be distilled, not searched with. Does nothing in a world of one.

    Raises:
        ModelError: not found, damaged, or of a family whose attention we do not know.
        DeviceError: a GPU is asked for and there is none.
    """
    place = pick_device(device)
    shard = shard and current_world().size > 1
    if shard:
        # Read into main memory; each layer visits the GPU once as a whole and leaves this rank's part there.
        device, dtype = "cpu", str(pick_dtype(dtype, place)).removeprefix("torch.")
    model, tokenizer = load_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    teacher = as_teacher(model, tokenizer, source=str(source))
    return shard_teacher(teacher, place) if shard else teacher


def shard_teacher(teacher: Teacher, device: torch.device) -> Teacher:
    """Spread a teacher's weights over all ranks by FSDP2; its body only, as the LM head is not run in distillation.

    A layer's weights come together while it runs and part again, so that a rank needs room for its part and one layer.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (current_world().size,))
    body = teacher.model.model
    for layer in decoder_layers(teacher.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(body, mesh=mesh)
    body.to(device)
    return replace(teacher, is_sharded=True)


@contextmanager
def whole_weights(layer: Any) -> Iterator[None]:
    """While open, a layer's weights are plain tensors on every rank, sharded or not."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def load_model(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A causal language model or classifier (our hybrids too) and its tokenizer; arguments as for `load_teacher`."""
    place = pick_device(device)
    weights = pick_dtype(dtype, place)
    path = fetch_packaged_model(str(source)) if str(source) in PACKAGED_MODELS else Path(source)
    near = [] if "/" in str(source) or path.exists() else difflib.get_close_matches(str(source), PACKAGED_MODELS, n=1)
    if near:
        # The hub would be asked for it again and again before it says that there is no such model.
        raise ModelError("teacher.source", got=f"'{source}'", expected="a model", hint=f"Did you mean '{near[0]}'?")
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(str(path), got="no such file", expected="a GGUF file", hint="Check the path.")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = path / "hybrid"
        raise ModelError(
            f"teacher.source {source}",
            got="a folder without config.json",
            expected="a saved model",
            hint=f"Did you mean '{inside}'?" if (inside / "config.json").is_file() else "Check the path.",
        )
    where, extra = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
    # A wrong family is told before its weights are read.
    options = {"trust_remote_code": trust_remote_code, **extra}
    config = _guarded(source, lambda: AutoConfig.from_pretrained(where, **options))
    check_supported(config)
    has_classes = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    auto = AutoModelForSequenceClassification if has_classes else AutoModelForCausalLM
    tokenizer = _guarded(source, lambda: AutoTokenizer.from_pretrained(where, **options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if extra and hasattr(transformers, "GgufConfig"):
        # Newer releases keep some formats packed in special modules unless asked not to.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _guarded(source, lambda: auto.from_pretrained(where, dtype=weights, **options))
    if extra and hasattr(model.config, "quantization_config"):
        # The weights are plain by now; the leftover entry would make save_pretrained refuse.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model.eval().to(place), tokenizer


def as_teacher(model: Any, tokenizer: Any, *, source: str = "in memory") -> Teacher:
    """Wrap a model that is loaded already; it is frozen and put in evaluation mode.

    Raises:
        ModelError: the model is of an unknown family.
    """
    check_supported(model.config)
    if model.config.model_type.startswith(HYBRID_PREFIX):
        raise ModelError(
            "teacher.source",
            got=f"a hybrid ({model.config.model_type})",
            expected="a model whose layers all have full attention",
            hint="Give the model that the hybrid was made from.",
        )
    model.requires_grad_(False).eval()
    return Teacher(
        model=model,
        tokenizer=tokenizer,
        source=source,
        geometry=read_geometry(model.config),
        fingerprint=_fingerprint(model),
    )


def pick_device(name: str) -> torch.device:
    """A device by name; auto takes the GPU if there is one.

    Raises:
        DeviceError: the name is unknown or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            # Others, as meta and mps, are names that torch knows and places where nothing here was ever run.
            raise RuntimeError(f"no device to run on: {name}")
    except RuntimeError:
        hint = "Write cuda for a GPU." if "gpu" in name.lower() else did_you_mean(name, ["cpu", "cuda"])
        raise RecipeError("runtime.device", got=f"'{name}'", expected="auto, cpu or cuda", hint=hint) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            "runtime.device",
            got=f"'{name}' with {torch.cuda.device_count()} CUDA GPUs in this machine",
            expected="a GPU that is there",
            hint="Use --set runtime.device=cpu, or auto; 'dtr doctor' says what torch sees.",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A weight type by name; auto is bfloat16 on a GPU and on CPUs that multiply it in hardware.

    Raises:
        RecipeError: the name is unknown.
    """
    if name not in ("auto", *DTYPES):
        raise RecipeError(
            "teacher.dtype", got=f"'{name}'", expected="a type of weights", hint=did_you_mean(name, ["auto", *DTYPES])
        )
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" or cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones on this processor (AMX tiles)."""
    return bool(torch.cpu._is_amx_tile_supported())


def _guarded(source: Any, load: Any) -> Any:
    """Run a library's loader; whatever it raises on a bad file becomes one clear message."""
    try:
        return load()
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if _is_path(source) and not Path(source).expanduser().exists():
            # The hub's complaint about the name would hide that a path is mistyped.
            first = "no such file or folder"
            error = FileNotFoundError(first)
        raise ModelError(
            f"teacher.source {source}",
            got=f"{type(error).__name__}: {first}",
            expected="a readable pretrained model",
            hint="Give a hub name, a folder with config.json and safetensors, or a GGUF file (needs the gguf extra).",
        ) from error


def _fingerprint(model: Any) -> str:
    # Where a model lies, what wrote it and in which precision it was loaded do not change which model it is.
    apart = ("transformers_version", "_name_or_path", "dtype", "quantization_config")
    fields = {k: v for k, v in model.config.to_dict().items() if k not in apart}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        sample = flat[:: max(1, flat.numel() // 1024)].bfloat16().float()
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that turns text into tokens, chat template included, 16 hex digits."""
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two are set by whoever pads or cuts a batch.
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    else:
        rules = tokenizer.get_vocab()
    facts = [rules, getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_path(source: Any) -> bool:
    """Whether a source cannot be a hub name, which has one slash at most, and not at its start."""
    return str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1
