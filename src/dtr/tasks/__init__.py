"""Tasks: what to ask a model and how to grade its responses. No torch in here."""

from dtr.tasks.base import Item, Task, fingerprint
from dtr.tasks.loading import load_task
from dtr.tasks.spec import TASKS

__all__ = ["TASKS", "Item", "Task", "fingerprint", "load_task"]
