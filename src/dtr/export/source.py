"""What is exported: a saved hybrid or all-attention model, checked before anything is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dtr.arch import FAMILIES, HYBRID_PREFIX, layer_kind, model_class
from dtr.errors import DtrError, ModelError
from dtr.files import changed_since_written
from dtr.hybrid.modeling import HYBRIDS

WEIGHT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
"""Fields of a config that mean the same in every family and target."""
AGAIN = "Copy the folder again, or save the hybrid again."


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model folder that can be read."""

    folder: Path
    model: Any
    """In float32, on the CPU, in evaluation mode."""
    dtype: torch.dtype
    """Type of the weights on disk."""

    @property
    def family(self) -> str:
        return self.model.config.model_type.removeprefix(HYBRID_PREFIX)

    @property
    def mixers(self) -> list[dict[str, Any] | None]:
        """Per layer: None for attention, or the mixer's kind and options."""
        config = self.model.config
        return getattr(config, "mixers", None) or [None] * config.num_hidden_layers

    @property
    def linear(self) -> list[int]:
        """Indices of the linear layers."""
        return [i for i, spec in enumerate(self.mixers) if spec]


def read_source(folder: str | Path) -> Source:
    """Load a model for export.

    Raises:
        ModelError: no such folder, not a model of ours or of a supported family, or files that are missing, damaged or
            of a type that holds no plain weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(
            str(folder), got="no such folder", expected="a folder of a saved hybrid", hint="Check the path."
        )
    if changed := changed_since_written(folder):
        raise ModelError(str(folder), got=changed, expected="the files as they were saved", hint=AGAIN)
    config = _read_json(folder / "config.json")
    cls = _class_of(folder, config)
    dtype = _weight_type(folder)
    model, report = _load(folder, cls)
    wrong = sorted(
        [*report["missing_keys"], *report["unexpected_keys"], *(key[0] for key in report["mismatched_keys"])]
    )
    if wrong:
        raise ModelError(
            str(folder),
            got=f"{len(wrong)} weights that do not fit config.json ({', '.join(wrong[:3])})",
            expected="every weight of the model, in its shape",
            hint=AGAIN,
        )
    return Source(folder=folder, model=model.eval().requires_grad_(False), dtype=dtype)


def attention_problems(source: Source) -> list[str]:
    """What no stock hybrid has: attention layers that see less than all, or no attention layer; for `refuse`."""
    config, problems = source.model.config, []
    full = [i for i in range(config.num_hidden_layers) if i not in source.linear]
    windowed = [i for i in full if layer_kind(config, i) != "full_attention"]
    if windowed and config.sliding_window < config.max_position_embeddings:
        problems.append(f"a sliding window of {config.sliding_window} tokens in attention layers")
    if not full:
        problems.append("no attention layer, without which transformers' cache does not know its length")
    return problems


def refuse(source: Source, problems: list[str], what: str) -> None:
    """Raise ModelError that tells all problems, if there are any."""
    if problems:
        raise ModelError(
            str(source.folder),
            got="; ".join(problems),
            expected=f"what {what} can express",
            hint="Use the folder as it is with trust_remote_code=True.",
        )


def _load(folder: Path, cls: Any) -> tuple[Any, dict[str, Any]]:
    try:
        return cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    except DtrError:
        raise
    # The library raises many kinds of error on a config or a weight that does not fit.
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            str(folder), got=f"{type(error).__name__}: {first}", expected="a model that loads", hint=AGAIN
        ) from error


def _class_of(folder: Path, config: dict[str, Any]) -> Any:
    kind = str(config.get("model_type"))
    if kind not in HYBRIDS and kind not in FAMILIES:
        raise ModelError(
            str(folder / "config.json"),
            got=f"model type '{kind}'",
            expected="a hybrid saved by dtr, or a model of a family it knows",
            hint=f"Known: {', '.join(sorted([*HYBRIDS, *FAMILIES]))}.",
        )
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        raise ModelError(
            str(folder / "config.json"),
            got="a model with a classification head",
            expected="a causal language model",
            hint="Use the folder as it is with trust_remote_code=True.",
        )
    if config.get("quantization_config"):
        raise ModelError(
            str(folder / "config.json"),
            got="quantized weights",
            expected="weights in float32, bfloat16 or float16",
            hint="Export the unquantized model and quantize the result.",
        )
    return HYBRIDS[kind] if kind in HYBRIDS else model_class(kind, "ForCausalLM")


def _weight_type(folder: Path) -> torch.dtype:
    """The weights' type, read from the files' headers; several are told as the widest."""
    found = set()
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                str(file), got=f"a damaged file ({error})", expected="a safetensors file", hint=AGAIN
            ) from None
    strange = sorted(found - WEIGHT_TYPES.keys())
    if strange or not found:
        raise ModelError(
            str(folder),
            got=f"weights of type {', '.join(strange)}" if strange else "no weights",
            expected="float32, bfloat16 or float16",
            hint="Save the model in one of these types first.",
        )
    return next(dtype for name, dtype in WEIGHT_TYPES.items() if name in found)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            str(folder),
            got=f"{len(missing)} of {len(names)} weight files missing ({', '.join(missing[:3])})",
            expected=f"all of {index.name}" if index.exists() else "model.safetensors",
            hint=AGAIN,
        )
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            str(path), got=got, expected="the JSON file of a saved model", hint="Give the folder of a saved hybrid."
        ) from None
    if not isinstance(content, dict):
        raise ModelError(str(path), got="JSON that is no object", expected="the JSON file of a saved model", hint=AGAIN)
    return content
