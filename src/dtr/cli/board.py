"""A run's events as TensorBoard scalars, on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtr.errors import DeviceError

Listener = Callable[[dict[str, Any]], None]
SCALARS = {
    "distill": ("step", {"distill/loss": "mean_loss"}),
    "nmse": ("num_tokens", {"distill/held_out_nmse": "mean_nmse"}),
    "realign_nmse": ("num_tokens", {"realign/held_out_nmse": "mean_nmse"}),
    "step": ("step", {"search/score": "score", "search/layer": "layer"}),
}
"""Event to the field that counts and the fields that are drawn."""


@contextmanager
def open_board(folder: Path) -> Iterator[Listener]:
    """A listener that writes event files into `folder`, for `tensorboard --logdir`.

    Raises:
        DeviceError: the library is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DeviceError(
            "--tensorboard",
            got="a request for TensorBoard files, whose library is not installed",
            expected="the extra tensorboard",
            hint="pip install 'distill-then-replace[tensorboard]'",
        ) from None
    # Made at the first scalar: a run that is refused leaves nothing behind.
    writer: Any = None

    def write(event: dict[str, Any]) -> None:
        nonlocal writer
        counter, fields = SCALARS.get(event["event"], ("", {}))
        for tag, field in fields.items():
            if isinstance(event.get(field), int | float):
                writer = writer or SummaryWriter(str(folder))
                writer.add_scalar(tag, event[field], event[counter])

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
