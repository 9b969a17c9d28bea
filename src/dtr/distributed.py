"""Several processes as torchrun starts them: who we are, and the few exchanges that distillation needs.

    torchrun --nproc-per-node 2 -m dtr distill RECIPE --out DIR

Everything is torch.distributed's own; a process that was not started by torchrun is a world of one, where every
exchange does nothing.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from dtr.errors import DeviceError


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The connection that exchanges go over; None is the one that training uses."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of a list; parts differ by one item at most, and may be empty."""
        return items[self.rank :: self.size]

    def owner(self, position: int) -> int:
        """The rank whose `share` holds the item at `position`."""
        return position % self.size

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in one exchange. All must have one dtype and device."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    def start_adding_up(self, tensor: torch.Tensor) -> Any:
        """Begin to replace the tensor by its sum over all ranks; call `wait()` on what this returns."""
        assert self.size > 1, "there is nobody to add up with"
        return dist.all_reduce(tensor, async_op=True)

    def send_from(self, owner: int, tensor: torch.Tensor) -> None:
        """Replace the tensor on all ranks by what `owner` has."""
        if self.size > 1:
            dist.broadcast(tensor, src=owner)

    def collect(self, value: Any) -> list[Any]:
        """Every rank's small value, in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def join_world(device: torch.device) -> tuple[World, torch.device]:
    """Join the processes that torchrun started, if it did; returns our place and our device.

    Args:
        device: what was asked for; on GPUs each process takes the one of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # What to do when nothing moves any more: `kill -USR1 PID` prints where every thread is.
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    if not dist.is_initialized():
        # With its device given, NCCL connects now and not inside the first step.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    return current_world(), device


def current_world() -> World:
    """Our place among the processes that have been joined."""
    if not dist.is_initialized():
        return World()
    return World(rank=dist.get_rank(), size=dist.get_world_size())


def side_world() -> World:
    """The same processes over a connection of their own, on the CPU, as a thread beside training needs; only `collect`
    and `share` work over it. All processes must call this together.
    """
    world = current_world()
    return replace(world, group=dist.new_group(backend="gloo")) if world.size > 1 else world


def lost_rank(error: RuntimeError) -> DeviceError | None:
    """What to say where an exchange failed because another rank is gone; None where the error is another one."""
    told = next(iter(str(error).splitlines()), "")
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "connection was closed", "Broken pipe")
    if current_world().size == 1 or not (isinstance(error, dist.DistError) or any(sign in told for sign in signs)):
        return None
    return DeviceError(
        "torchrun",
        got=f"no answer from another rank ({told[-200:]})",
        expected="every rank to stay",
        hint="Look for what that rank said, then go on with --resume from the last checkpoint.",
    )


def leave_world() -> None:
    """Part from the other processes, once all are here: one that leaves early can abort those still talking to it."""
    if dist.is_initialized():
        dist.barrier()
        # NCCL waits for ever for the end of a CUDA graph that holds its exchanges, and a recorded step lives in a
        # reference cycle with its students.
        gc.collect()
        dist.destroy_process_group()
