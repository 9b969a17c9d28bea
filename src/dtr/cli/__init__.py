"""The command line. `dtr --help` imports neither torch nor transformers."""

from dtr.cli.verbs import app, main

__all__ = ["app", "main"]
