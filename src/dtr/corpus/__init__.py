"""Text for distillation: read, tokenize, pack, split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtr.corpus.blocks import TokenBlocks
    from dtr.corpus.loading import load_text

__all__ = ["TokenBlocks", "load_text"]


def __getattr__(name: str) -> Any:
    # Loaded late, as the tasks read plain text through this room and must not import torch.
    if name == "load_text":
        from dtr.corpus.loading import load_text

        return load_text
    if name == "TokenBlocks":
        from dtr.corpus.blocks import TokenBlocks

        return TokenBlocks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
