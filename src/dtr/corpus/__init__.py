"""Text for distillation: read, tokenize, pack, split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtr.corpus.blocks import TokenBlocks
    from dtr.corpus.loading import load_text
    from dtr.corpus.streaming import StreamedBlocks, stream_text

__all__ = ["StreamedBlocks", "TokenBlocks", "load_text", "stream_text"]


def __getattr__(name: str) -> Any:
    # Loaded late, as the tasks read plain text through this room and must not import torch.
    if name == "load_text":
        from dtr.corpus.loading import load_text

        return load_text
    if name == "TokenBlocks":
        from dtr.corpus.blocks import TokenBlocks

        return TokenBlocks
    if name in ("StreamedBlocks", "stream_text"):
        from dtr.corpus import streaming

        return getattr(streaming, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
