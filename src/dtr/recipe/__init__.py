"""Every setting of a run, its meaning and unit; from YAML and back. No torch in here."""

from dtr.recipe.reading import read_recipe
from dtr.recipe.sections import Recipe, Section, TaskSection

__all__ = ["Recipe", "Section", "TaskSection", "read_recipe"]
