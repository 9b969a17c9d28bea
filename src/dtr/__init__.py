"""dtr: distil linear attention layers from a pretrained Transformer, then replace as many as a task allows.

Importing this package imports nothing heavy; its names load on first use. Once transformers' Auto classes are
imported, before or after this package, they know our hybrids.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from dtr.corpus import TokenBlocks, load_text
    from dtr.distillation.bank import MixerBank, load_bank
    from dtr.distillation.trainer import distill
    from dtr.environment import doctor
    from dtr.errors import DtrError
    from dtr.evaluation.evaluator import evaluate
    from dtr.evaluation.score import Score
    from dtr.export.exporter import export_hybrid
    from dtr.inference.decoder import Decoder
    from dtr.inference.generate import fast_generate
    from dtr.pipeline import run
    from dtr.recipe import Recipe, read_recipe
    from dtr.selection.search import SearchResult, search
    from dtr.selection.settings import GuardFloor, SearchSettings
    from dtr.tasks import load_task
    from dtr.teacher import Teacher, as_teacher, load_teacher

_HOMES = {
    "Decoder": "dtr.inference.decoder",
    "DtrError": "dtr.errors",
    "GuardFloor": "dtr.selection.settings",
    "MixerBank": "dtr.distillation.bank",
    "Recipe": "dtr.recipe",
    "Score": "dtr.evaluation.score",
    "SearchResult": "dtr.selection.search",
    "SearchSettings": "dtr.selection.settings",
    "Teacher": "dtr.teacher",
    "TokenBlocks": "dtr.corpus",
    "as_teacher": "dtr.teacher",
    "distill": "dtr.distillation.trainer",
    "doctor": "dtr.environment",
    "evaluate": "dtr.evaluation.evaluator",
    "export_hybrid": "dtr.export.exporter",
    "fast_generate": "dtr.inference.generate",
    "load_bank": "dtr.distillation.bank",
    "load_task": "dtr.tasks",
    "load_teacher": "dtr.teacher",
    "load_text": "dtr.corpus",
    "read_recipe": "dtr.recipe",
    "run": "dtr.pipeline",
    "search": "dtr.selection.search",
}

__all__ = [
    "Decoder",
    "DtrError",
    "GuardFloor",
    "MixerBank",
    "Recipe",
    "Score",
    "SearchResult",
    "SearchSettings",
    "Teacher",
    "TokenBlocks",
    "as_teacher",
    "distill",
    "doctor",
    "evaluate",
    "export_hybrid",
    "fast_generate",
    "load_bank",
    "load_task",
    "load_teacher",
    "load_text",
    "read_recipe",
    "run",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dtr' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _register_hybrids(module: Any) -> None:
    try:
        from dtr.hybrid.configuration import register_configs
    except (ImportError, AttributeError):
        # The library is in the middle of importing itself; the second of the two hooks comes when it is done.
        if module.__name__.endswith("modeling_auto"):
            raise
        return
    register_configs()


for _name in ("configuration_auto", "modeling_auto"):
    wrapt.register_post_import_hook(_register_hybrids, f"transformers.models.auto.{_name}")
