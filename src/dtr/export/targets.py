"""Stock architectures that a hybrid can become, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dtr.arch import FAMILIES
from dtr.errors import ModelError
from dtr.export.granite import to_granite
from dtr.export.qwen35 import to_qwen35
from dtr.export.source import Source
from dtr.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Target:
    """A stock architecture."""

    architecture: str
    """Its class in transformers."""
    families: tuple[str, ...]
    """Families whose attention, norms and MLP it can hold."""
    mixer: str
    """The one kind of linear layer that it knows."""
    convert: Callable[[Source], Any]
    """Makes the stock model, in the source's type of weights."""
    older_layer_types: bool = False
    """Whether servers exist that want `layer_types` in the older spelling, mamba and attention."""

    def check(self, source: Source) -> None:
        """Raise ModelError if the source has no home here, naming what has one."""
        foreign = {i: spec["kind"] for i, spec in enumerate(source.mixers) if spec and spec["kind"] != self.mixer}
        if foreign:
            raise ModelError(
                str(source.folder),
                got=f"{', '.join(sorted(set(foreign.values())))} in layers {', '.join(map(str, foreign))}",
                expected=f"{self.mixer} in every linear layer, which is what {self.architecture} has",
                hint=_homes(),
            )
        if source.family not in self.families:
            raise ModelError(
                str(source.folder),
                got=f"a {FAMILIES[source.family]} model",
                expected=f"one of {', '.join(FAMILIES[f] for f in self.families)} for {self.architecture}",
                hint=_homes(),
            )


TARGETS: Registry[Target] = Registry("export target")
TARGETS.register("granite")(
    Target(
        architecture="GraniteMoeHybridForCausalLM",
        families=("llama", "mistral", "qwen2"),
        mixer="mamba2",
        convert=to_granite,
        older_layer_types=True,
    )
)
TARGETS.register("qwen3_5")(
    Target(
        architecture="Qwen3_5ForCausalLM",
        families=("qwen3",),
        mixer="qwen35_gated_deltanet",
        convert=to_qwen35,
    )
)


def _homes() -> str:
    lines = [
        f"{target.mixer} in {', '.join(FAMILIES[f] for f in target.families)} models (--to {name})"
        for name, target in ((name, TARGETS[name]) for name in TARGETS)
    ]
    return f"Native homes: {'; '.join(lines)}. Every hybrid loads in transformers with trust_remote_code=True."
