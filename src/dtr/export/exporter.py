"""`dtr export`: a hybrid's folder to a folder of a stock architecture, proven equal before it gets its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from dtr.errors import ModelError, OutputError, RecipeError, did_you_mean
from dtr.export.parity import ask, compare, insist, questions
from dtr.export.source import Source, read_source
from dtr.export.targets import TARGETS, Target
from dtr.files import replacing_folder, write_json

RECORD = "export.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
OLDER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
SPELLINGS = ("linear_attention", "mamba")


def export_hybrid(
    folder: str | Path, out: str | Path, *, to: str = "granite", layer_types: str = "linear_attention"
) -> dict[str, Any]:
    """Write a hybrid as a model that stock transformers and servers load without this package.

    The result is written beside `out`, loaded by the stock class, compared with the hybrid in float32 (largest logit
    difference, 64 greedy tokens), and renamed to `out` only if the two agree.

    Args:
        folder: a saved hybrid, or an all-attention model of a supported family.
        out: new or empty folder.
        to: target by name; docs/export.md lists what each can hold.
        layer_types: spelling in config.json. `linear_attention` (with `full_attention`) is what transformers writes,
            `mamba` (with `attention`) what older servers and converters want; transformers reads both.

    Returns:
        what export.json holds: target, architecture, source, versions, and the parity that was measured.

    Raises:
        RecipeError: unknown target or spelling.
        ModelError: a folder that cannot be read, a hybrid that has no home in this target, or one that differs there.
        OutputError: `out` holds something or cannot be written.
    """
    target = TARGETS[to]
    if layer_types not in (SPELLINGS if target.older_layer_types else SPELLINGS[:1]):
        known = SPELLINGS if target.older_layer_types else SPELLINGS[:1]
        raise RecipeError(
            "--layer-types", got=f"'{layer_types}'", expected=" or ".join(known), hint=did_you_mean(layer_types, known)
        )
    out = Path(out)
    _check_free(out)
    source = read_source(folder)
    target.check(source)
    with replacing_folder(out) as beside:
        _write(source, target, beside, layer_types)
        record = {"target": to, "layer_types": layer_types, **_prove(source, target, beside)}
        write_json(beside / RECORD, record)
    return record


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            str(out),
            got="a folder that is not empty" if out.is_dir() else "a file",
            expected="a new or empty folder",
            hint="Choose another --out.",
        )


def _write(source: Source, target: Target, folder: Path, layer_types: str) -> None:
    target.convert(source).save_pretrained(folder)
    if layer_types == "mamba":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["layer_types"] = [OLDER_NAMES[name] for name in config["layer_types"]]
        write_json(folder / "config.json", config)
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copy(source.folder / name, folder / name)


def _prove(source: Source, target: Target, folder: Path) -> dict[str, Any]:
    """Compare what was written with the source, both in float32."""
    cls = getattr(transformers, target.architecture)
    stock, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ModelError(
            str(folder),
            got=f"weights that {target.architecture} does not take: {report}",
            expected="all of them",
            hint=f"This release of transformers ({transformers.__version__}) names them otherwise.",
        )
    texts = questions(source.model)
    parity = compare(ask(source.model, texts), ask(stock.eval(), texts))
    insist(parity, str(source.folder))
    return {
        "architecture": target.architecture,
        "source": source.folder.name,
        "dtype": str(source.dtype).removeprefix("torch."),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "parity": asdict(parity),
    }
