"""A whole run from a recipe to a run folder, and its parts by themselves."""

from dtr.pipeline.runs import distill_only, evaluate_model, run

__all__ = ["distill_only", "evaluate_model", "run"]
