"""The list of a study: what each teacher and task is made from, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dtr.files import write_text
from dtr.pretrained import PACKAGED_MODELS

ROOT = Path(__file__).resolve().parent.parent


def at_home(value: Any, data: str) -> Any:
    """The list with `data/` at the beginning of any text replaced by the folder where the data is."""
    if isinstance(value, dict):
        return {key: at_home(inner, data) for key, inner in value.items()}
    return f"{data.rstrip('/')}/{value[5:]}" if isinstance(value, str) and value.startswith("data/") else value


@dataclass(kw_only=True)
class Study:
    """The list, where everything lies, and which teachers could not be made."""

    plan: dict[str, Any]
    out: Path
    results: Path
    settings: list[str]
    """section.key=value for every run."""
    banks: dict[str, Path]
    """Folders of banks that were made before, by teacher."""
    failed: dict[str, str] = field(default_factory=dict)
    """Teachers that failed, and why: their other tasks need not try again."""

    def teacher_of(self, name: str) -> str:
        return self.plan["tasks"][name].get("teacher", next(iter(self.plan["teachers"])))

    def task_of(self, teacher: str) -> str:
        """The task that a teacher is fine-tuned on: the first of its own."""
        return next(name for name in self.plan["tasks"] if self.teacher_of(name) == teacher)

    def tuning_of(self, teacher: str) -> dict[str, Any] | None:
        return self.plan["teachers"][teacher].get("finetune")

    def packed_of(self, teacher: str) -> str | None:
        """The teacher, it or its `base`, whose weights are packed and take long to read."""
        entry = self.plan["teachers"][teacher]
        if "source" not in entry:
            return self.packed_of(entry["base"])
        packed = entry["source"] in PACKAGED_MODELS or entry["source"].endswith(".gguf")
        return teacher if packed and "finetune" not in entry else None

    def folder_of(self, teacher: str) -> Path:
        """Where a teacher that is made here is kept."""
        return self.out / "teachers" / teacher

    def start_of(self, teacher: str) -> str:
        """The weights that fine-tuning begins with."""
        entry = self.plan["teachers"][teacher]
        return entry["source"] if "source" in entry else self.source_of(entry["base"])

    def source_of(self, teacher: str) -> str:
        """The weights that are distilled: fine-tuned or unpacked ones, or where the list says."""
        if self.tuning_of(teacher) or self.packed_of(teacher) == teacher:
            return str(self.folder_of(teacher))
        return self.start_of(teacher)

    def is_made(self, teacher: str) -> bool:
        """Whether the weights that `source_of` names are there; the tokenizer is saved last."""
        is_ours = self.source_of(teacher) == str(self.folder_of(teacher))
        return not is_ours or (self.folder_of(teacher) / "tokenizer_config.json").is_file()

    def bank_of(self, teacher: str) -> Path:
        if teacher not in self.banks:
            return self.out / "banks" / teacher / "bank"
        given = self.banks[teacher]
        return given if (given / "bank.json").is_file() else given / "bank"


def write_recipe(study: Study, name: str | None, teacher: str) -> Path:
    """The base recipe with the sections of study, teacher and task over it; without a task that of the teacher's bank,
    which must be the same whichever task comes first."""
    plan = study.plan
    base = yaml.safe_load((ROOT / plan["recipe"]).read_text(encoding="utf-8"))
    entry, task = plan["teachers"][teacher], plan["tasks"][name] if name else {}
    recipe: dict[str, Any] = {"teacher": {**base.get("teacher", {}), "source": study.source_of(teacher)}}
    for section in ("text", "mixer", "distill", *(("search",) if name else ()), "runtime"):
        layers = [layer.get(section) or {} for layer in (base, plan, entry, task)]
        if merged := {key: value for layer in layers for key, value in layer.items()}:
            recipe[section] = merged
    if name:
        recipe["task"] = task["task"]
    elif study.tuning_of(teacher):
        # Its text may name the task's training rows.
        recipe["task"] = plan["tasks"][study.task_of(teacher)]["task"]
    path = study.out / "recipes" / f"{name or 'bank-' + teacher}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    return path
