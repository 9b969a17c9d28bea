"""Sizes to measure, as text of a command line, and whether this machine could hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtr.arch import read_geometry
from dtr.errors import DeviceError, RecipeError
from dtr.pipeline.tryout import machine_room

FILL = "fill"
"""As a batch: the largest with which the teacher's cache fits at that context."""
MAX_SIZE = 2**31 - 1
"""Of sequences or tokens; what a machine can hold of them is known once there is a model."""


def numbers(option: str, text: str, *, least: int = 1, words: tuple[str, ...] = ()) -> list[Any]:
    """`1,16,fill` to [1, 16, "fill"].

    Raises:
        RecipeError: something else than whole numbers from `least` on and the given words, each once.
    """
    parts = [part.strip() for part in text.split(",")]
    found = [part if part in words else _whole(part, least) for part in parts]
    if None in found or len(set(found)) < len(found):
        expected = [f"whole numbers from {least} to {MAX_SIZE:,}, by commas and each once"]
        raise RecipeError(option, got=_short(text), expected=" or ".join([*expected, *(f"'{w}'" for w in words)]))
    return found


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`32x512,8x2048` to [(32, 512), (8, 2048)].

    Raises:
        RecipeError: something else than pairs of whole numbers from 1 on.
    """
    sizes = [tuple(_whole(number.strip(), 1) for number in part.split("x")) for part in text.split(",")]
    if any(len(size) != 2 or None in size for size in sizes) or len(set(sizes)) < len(sizes):
        expected = f"sequences x tokens, as 32x512,8x2048, numbers from 1 to {MAX_SIZE:,} and each size once"
        raise RecipeError("--sizes", got=_short(text), expected=expected)
    return sizes  # type: ignore[return-value]


def _whole(text: str, least: int) -> int | None:
    """A number of plain digits within the bounds; None for anything else."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_SIZE))
    return int(text) if is_number and least <= int(text) <= MAX_SIZE else None


def _short(text: str) -> str:
    return f"'{text}'" if len(text) <= 60 else f"'{text[:60]}...', {len(text):,} characters"


def pick_batches(batches: Sequence[int | str] | None, device_type: str) -> list[int | str]:
    """The batches that are asked for, or where none are 1, 16 and what fills the GPU if there is one.

    Raises:
        DeviceError: a batch that fills the GPU where there is none.
    """
    on_gpu = device_type == "cuda"
    if batches is None:
        return [1, 16, FILL] if on_gpu else [1, 16]
    if FILL in batches and not on_gpu:
        raise DeviceError("--batch", got="'fill' on a CPU", expected="a number of sequences", hint="As --batch 1,8.")
    return list(batches)


def check_caches(teacher: Any, contexts: Sequence[int], batches: Sequence[int | str], num_steps: int) -> None:
    """Refuse sizes whose teacher's cache cannot fit into this machine, where the system would end the process for it.

    On a GPU what does not fit is one of the results: the teacher's cache may be too large where the hybrid's is not.

    Raises:
        RecipeError: names the largest size and the memory that there is.
    """
    room = machine_room(teacher.device)
    if teacher.device.type != "cpu" or room is None:
        return
    g, batch = read_geometry(teacher.config), max(size for size in batches if not isinstance(size, str))
    num_tokens = max(contexts) + num_steps
    per_token = 2 * g.num_kv_heads * g.head_dim * teacher.config.num_hidden_layers * teacher.dtype.itemsize
    if (needed := per_token * num_tokens * batch) > room:
        raise RecipeError(
            "--contexts",
            got=f"{num_tokens:,} tokens in {batch:,} sequences, {needed / 1e9:,.1f} GB of keys and values",
            expected=f"sizes that fit into {room / 1e9:,.1f} GB",
            hint="Lower --contexts, --batch or --steps.",
        )
