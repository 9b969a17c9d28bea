"""Which kernels there are, what each can do, and which one runs and why; `dispatch.py` calls it.

`torch` is the plain PyTorch form and runs everywhere. `triton` are our kernels, for the gated delta rule, the same with
a decay per key channel, gated linear attention, and for what layers do beside a recurrence in several passes over
memory (`FUSED`), the last of which no other backend has. `fla` is the flash-linear-attention library (package
fla-core), whose kernels for the gated delta rule and gated linear attention take the same layouts. Both need CUDA.
`amx` is our kernel for the gated delta rule on a CPU whose matrix units multiply bfloat16.

All of it is in one table, `KERNELS`. Which backend is asked for is a value that each mixer holds.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dtr.errors import DeviceError, did_you_mean

GATED_DELTA = "gated_delta_rule"
GATED_LINEAR = "gated_linear_attention"
CHANNEL_DELTA = "channel_delta_rule"
GATED_DELTA_STEP = "gated_delta_step"
QUADRATIC = "rotated_quadratic_features"
CONVOLUTION = "short_convolution"
FUSED = (QUADRATIC, CONVOLUTION)
REQUESTS = ("auto", "torch", "fla", "triton", "amx")
TRITON_HEAD_DIMS = (16, 32, 64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float32)
"""What our kernels for GPUs are written for."""
QUADRATIC_HEAD_DIMS = {torch.bfloat16: (64,), torch.float32: (16, 32, 64)}
"""Of that, what quadratic features take: larger heads do not fit into registers, and in bfloat16 products over fewer
than 64 features came out wrong on an H100."""
AMX_HEAD_DIMS = (64, 128)
"""What our kernel for CPUs is built for, keys and values alike."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend that can run here, and why it was taken."""

    name: str
    """torch, fla, triton or amx."""
    reason: str
    """One clause for the log."""


class Obstacle(NamedTuple):
    """What keeps a kernel from running on this machine."""

    why: str
    remedy: str = ""
    """What to install, if that would help."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A faster form of one operation and what it can run on; the plain form runs on everything."""

    function: tuple[str, str]
    """Module and name, imported at first use; a module that begins with a dot is our own."""
    devices: tuple[str, ...]
    """As `torch.device.type`."""
    head_dims: Mapping[torch.dtype, tuple[int, ...]] | None
    """Sizes of heads that it takes, by the types of values that it takes; None for all."""
    why_not: Callable[[], Obstacle | None]
    """What of this machine keeps it from running, None where nothing does."""


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """What decides which kernels are usable."""

    triton_version: tuple[int, int, int] | None
    is_hopper: bool
    has_fla: bool
    has_tilelang: bool


def _no_triton() -> Obstacle | None:
    return None if _probe().triton_version else Obstacle("triton is not installed", "Install triton")


def _no_fla() -> Obstacle | None:
    return _no_triton() or (None if _probe().has_fla else Obstacle("fla is not installed", "Install fla-core"))


def _no_gated_delta_of_fla() -> Obstacle | None:
    """fla-core 0.6.0 refuses its backward on Hopper (its issue 640); its GLA does not use that part."""
    if absent := _no_fla():
        return absent
    machine = _probe()
    version = machine.triton_version
    assert version is not None
    if not machine.is_hopper or machine.has_tilelang or not (3, 4, 0) <= version <= (3, 7, 0):
        return None
    why = f"fla refuses the gated delta rule's backward on Hopper with triton {'.'.join(map(str, version))}"
    return Obstacle(why, "Install tilelang or triton 3.7.1 or later")


def _no_amx() -> Obstacle | None:
    """Asked last, as the kernel is built where there is a use for it."""
    why = importlib.import_module(_place(".cpu.gated_delta_amx")).refusal()
    return None if why is None else Obstacle(why)


def _ours(module: str, name: str, head_dims: Mapping[torch.dtype, tuple[int, ...]] | None = None) -> Kernel:
    """A kernel of ours for GPUs."""
    sizes = head_dims or dict.fromkeys(TRITON_DTYPES, TRITON_HEAD_DIMS)
    return Kernel(function=(f".gpu.{module}", name), devices=("cuda",), head_dims=sizes, why_not=_no_triton)


KERNELS: dict[tuple[str, str], Kernel] = {
    (GATED_DELTA, "triton"): _ours("gated_delta_triton", "chunked"),
    (GATED_DELTA, "fla"): Kernel(
        function=("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        devices=("cuda",),
        head_dims=None,
        why_not=_no_gated_delta_of_fla,
    ),
    (GATED_DELTA, "amx"): Kernel(
        function=(".cpu.gated_delta_amx", "chunked"),
        devices=("cpu",),
        head_dims={torch.bfloat16: AMX_HEAD_DIMS},
        why_not=_no_amx,
    ),
    (GATED_DELTA_STEP, "triton"): _ours("gated_delta_step_triton", "step"),
    (GATED_LINEAR, "triton"): _ours("channel_decay_triton", "chunked"),
    (GATED_LINEAR, "fla"): Kernel(
        function=("fla.ops.gla", "chunk_gla"), devices=("cuda",), head_dims=None, why_not=_no_fla
    ),
    (CHANNEL_DELTA, "triton"): _ours("channel_decay_triton", "chunked"),
    (QUADRATIC, "triton"): _ours("quadratic_triton", "rotated_features", QUADRATIC_HEAD_DIMS),
    # Its rows have no heads.
    (CONVOLUTION, "triton"): _ours("convolution_triton", "convolution", dict.fromkeys(TRITON_DTYPES, ())),
}
"""All there is beside the plain forms, by operation and backend; of several, auto takes the first that can run."""


def choose_backend(
    requested: str,
    device_type: str,
    *,
    op: str = GATED_DELTA,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """The backend to run `op` with.

    Args:
        requested: auto, torch, fla, triton or amx. auto takes the first of `KERNELS` that can run, else torch.
        device_type: as `torch.device.type`.
        op: an operation of `KERNELS`.
        head_dim: of keys and values; None if it is not known yet, and so no obstacle.
        dtype: of the values; likewise.

    Raises:
        DeviceError: `requested` is unknown or cannot run here.
    """
    known = [name for operation, name in KERNELS if operation == op]
    assert known, op
    _check_request(requested)
    if requested == "torch":
        return Backend(name="torch", reason="requested")
    here = [name for name in known if device_type in KERNELS[op, name].devices]
    if requested == "auto":
        skipped: dict[str, None] = {}
        for name in here:
            obstacle = _obstacle(op, name, device_type, head_dim, dtype)
            if obstacle is None:
                return Backend(name=name, reason="; ".join(skipped) or "the fastest here")
            skipped[obstacle.why] = None
        none = f"there is no kernel for {_spoken(op)} on {device_type}"
        return Backend(name="torch", reason="; ".join(skipped) or none)
    obstacle = _obstacle(op, requested, device_type, head_dim, dtype)
    if obstacle is None:
        return Backend(name=requested, reason="requested")
    # On another device, or with another library, it may be the others that cannot run.
    is_elsewhere = requested in known and requested not in here
    beside = [] if obstacle.remedy or is_elsewhere else [name for name in here if name != requested]
    take = f"{', '.join(['auto', *beside])} or torch."
    raise DeviceError(
        "backend",
        got=f"'{requested}', but {obstacle.why}",
        expected="a backend that can run here",
        hint=f"{obstacle.remedy}, or take {take}" if obstacle.remedy else f"Take {take}",
    )


def backend_of(
    op: str | None,
    requested: str,
    device_type: str,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """What `op` runs with where a whole model was asked to run with `requested`; None is plain operations alone.

    auto stands in for a backend that has no kernel for `op`, and for what a layer does beside its recurrence, so that
    a request for the recurrence's kernel holds whatever else there is.

    Raises:
        DeviceError: as `choose_backend`.
    """
    _check_request(requested)
    if op is None:
        return Backend(name="torch", reason="this mixer has plain operations alone")
    if requested != "torch" and (op in FUSED or (op, requested) not in KERNELS):
        requested = "auto"
    return choose_backend(requested, device_type, op=op, head_dim=head_dim, dtype=dtype)


def _check_request(requested: str) -> None:
    if requested not in REQUESTS:
        hint = did_you_mean(requested, REQUESTS)
        raise DeviceError("backend", got=f"'{requested}'", expected="a known backend", hint=hint)


def _obstacle(op: str, name: str, device_type: str, head_dim: int | None, dtype: torch.dtype | None) -> Obstacle | None:
    """What keeps one backend's kernel for `op` from running, None where nothing does."""
    kernel = KERNELS.get((op, name))
    if kernel is None:
        return Obstacle(f"dtr has no {name} kernel for {_spoken(op)}")
    if device_type not in kernel.devices:
        return Obstacle(f"{name} needs {' or '.join(kernel.devices)} and the device is {device_type}")
    if kernel.head_dims is not None:
        ours = "our CPU kernel" if kernel.devices == ("cpu",) else "our kernel"
        by_type = kernel.head_dims
        all_sizes = tuple(sorted({size for sizes in by_type.values() for size in sizes}))
        sizes = all_sizes if dtype is None else by_type.get(dtype, all_sizes)
        if head_dim is not None and head_dim not in sizes:
            return Obstacle(f"{ours} takes heads of {_listed(map(str, sizes))}, not of {head_dim}")
        if dtype is not None and dtype not in by_type:
            return Obstacle(f"{ours} takes {_listed(map(_plain, by_type))}, not {_plain(dtype)}")
    # Kernel libraries probe the GPU and the compiler as they load, and fail in ways of their own.
    try:
        if (obstacle := kernel.why_not()) is not None:
            return obstacle
        load(op, name)
    except Exception as error:
        return Obstacle(f"{name} does not load ({type(error).__name__}: {error})")
    return None


def _spoken(op: str) -> str:
    return op.replace("_", " ")


def _probe() -> _Machine:
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return _Machine(
        triton_version=_triton_version(),
        is_hopper=is_hopper,
        has_fla=importlib.util.find_spec("fla") is not None,
        has_tilelang=importlib.util.find_spec("tilelang") is not None,
    )


def _triton_version() -> tuple[int, int, int] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    numbers = re.findall(r"\d+", importlib.import_module("triton").__version__)
    major, minor, patch = (*map(int, numbers[:3]), 0, 0, 0)[:3]
    return major, minor, patch


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return " and ".join(names) if len(names) == 2 else ", ".join(names)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_loaded: dict[tuple[str, str], Callable[..., Any]] = {}


def load(op: str, backend: str) -> Callable[..., Any]:
    """A kernel's function, imported at first use and kept, as torch.compile cannot trace an import."""
    if (op, backend) not in _loaded:
        module, name = KERNELS[op, backend].function
        _loaded[op, backend] = getattr(importlib.import_module(_place(module)), name)
    return _loaded[op, backend]


def _place(module: str) -> str:
    """Our own modules lie beside this. A saved checkpoint has a renamed copy of it and no kernels: none is found."""
    return __name__.removesuffix(".backend") + module if module.startswith(".") else module
