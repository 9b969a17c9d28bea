"""Put the code a hybrid needs beside its weights, so that `trust_remote_code=True` loads it without this package.

The library copies a flat folder of modules that import each other relatively. Ours live in packages, so each file that
a hybrid's module needs is written under a flat name with its imports of `dtr` rewritten:
`from dtr.ops.rotary import rotate` becomes `from .dtr_ops_rotary import rotate`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

_IMPORT = re.compile(r"^(\s*)from (dtr(?:\.\w+)*) import ", flags=re.MULTILINE)


def auto_map(model_class: type) -> dict[str, str]:
    """What config.json says of where its classes are."""
    made: Any = model_class
    entry = flat_name(made.code_entry)
    kind = "SequenceClassification" if made.__name__.endswith("SequenceClassification") else "CausalLM"
    classes = {"AutoConfig": made.config_class, "AutoModel": made.body_class, f"AutoModelFor{kind}": made}
    return {auto: f"{entry}.{cls.__name__}" for auto, cls in classes.items() if cls is not None}


def flat_name(module: str) -> str:
    return module.replace(".", "_")


def write_code(folder: str | Path, entry: str) -> list[Path]:
    """Write every module that `entry` needs into `folder`; returns the files."""
    if not __name__.startswith("dtr."):
        # We are bundled code ourselves: a hybrid that was loaded without the package is saved again.
        return [Path(shutil.copy(file, folder)) for file in sorted(Path(__file__).parent.glob("dtr_*.py"))]
    written: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module in written:
            continue
        text = _source(module)
        waiting += [name for _, name in _IMPORT.findall(text)]
        flat = _IMPORT.sub(lambda m: f"{m[1]}from .{flat_name(m[2])} import ", text)
        written[module] = Path(folder, flat_name(module) + ".py")
        written[module].write_text(flat, encoding="utf-8")
    return list(written.values())


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is not there"
    assert spec.origin is not None, f"{module} has no source file"
    return Path(spec.origin).read_text(encoding="utf-8")
