"""Which implementation of a recurrence runs, and why; `dispatch.py` calls it.

`torch` is the plain PyTorch form and runs everywhere. `triton` are our kernels, for the gated delta rule, the same with
a decay per key channel, gated linear attention, and for what layers do beside a recurrence in several passes over
memory (`FUSED`), the last of which no other backend has. `fla` is the flash-linear-attention library (package
fla-core), whose kernels for the gated delta rule and gated linear attention take the same layouts. Both need CUDA.
`amx` is our kernel for the gated delta rule on a CPU whose matrix units multiply bfloat16.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
WITHOUT_KERNEL = {
    GATED_LINEAR: ("amx",),
    CHANNEL_DELTA: ("fla", "amx"),
    **dict.fromkeys(FUSED, ("triton", "fla", "amx")),
}
"""Requests that auto stands in for, as the backend has no kernel for all that a model runs."""
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


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """What decides which kernels are usable."""

    triton_version: tuple[int, int, int] | None
    is_hopper: bool
    has_fla: bool
    has_tilelang: bool


@dataclass(frozen=True, kw_only=True)
class _Obstacle:
    why: str
    remedy: str


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
        requested: auto, torch, fla, triton or amx. auto takes the first usable of triton, fla, torch, on a CPU of amx
            and torch.
        device_type: as `torch.device.type`.
        op: gated_delta_rule, gated_linear_attention, channel_delta_rule, or one of `FUSED`.
        head_dim: of keys and values; None if it is not known yet, and so no obstacle.
        dtype: of the values; likewise.

    Raises:
        DeviceError: `requested` is unknown or cannot run here.
    """
    assert op in (GATED_DELTA, GATED_LINEAR, CHANNEL_DELTA, *FUSED), op
    if requested not in REQUESTS:
        hint = did_you_mean(requested, REQUESTS)
        raise DeviceError("backend", got=f"'{requested}'", expected="a known backend", hint=hint)
    if requested == "torch":
        return Backend(name="torch", reason="requested")
    obstacles = _obstacles(op, device_type, head_dim, dtype)
    if requested == "auto":
        candidates = {name: obstacles[name] for name in (("amx",) if device_type == "cpu" else ("triton", "fla"))}
        name = next((name for name, obstacle in candidates.items() if obstacle is None), "torch")
        skipped = dict.fromkeys(obstacle.why for obstacle in candidates.values() if obstacle)
        return Backend(name=name, reason="; ".join(skipped) if skipped else "the fastest here")
    obstacle = obstacles[requested]
    if obstacle is not None:
        expected = "a backend that can run here"
        raise DeviceError("backend", got=f"'{requested}', but {obstacle.why}", expected=expected, hint=obstacle.remedy)
    return Backend(name=requested, reason="requested")


def backend_of(
    op: str | None,
    requested: str,
    device_type: str,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """What `op` runs with where a whole model was asked to run with `requested`; None is plain operations alone.

    Raises:
        DeviceError: as `choose_backend`.
    """
    if op is None:
        return Backend(name="torch", reason="this mixer has plain operations alone")
    requested = "auto" if requested in WITHOUT_KERNEL.get(op, ()) else requested
    return choose_backend(requested, device_type, op=op, head_dim=head_dim, dtype=dtype)


def _obstacles(
    op: str, device_type: str, head_dim: int | None, dtype: torch.dtype | None
) -> dict[str, _Obstacle | None]:
    """What keeps each kernel library from running, None where nothing does; the preferred one first."""
    amx = _amx_obstacle(op, device_type, head_dim, dtype)
    machine = _probe() if device_type == "cuda" else None
    if machine is None:
        needs_cuda = _Obstacle(why=f"kernels need CUDA and the device is {device_type}", remedy="Take auto or torch.")
        return {"triton": needs_cuda, "fla": needs_cuda, "amx": amx}
    if machine.triton_version is None:
        absent = _Obstacle(why="triton is not installed", remedy="Install triton, or take auto or torch.")
        return {"triton": absent, "fla": absent, "amx": amx}
    return {"triton": _triton_obstacle(op, head_dim, dtype), "fla": _fla_obstacle(op, machine), "amx": amx}


def _amx_obstacle(op: str, device_type: str, head_dim: int | None, dtype: torch.dtype | None) -> _Obstacle | None:
    remedy = "Take auto or torch."
    if device_type != "cpu":
        return _Obstacle(why=f"amx is a CPU's and the device is {device_type}", remedy=remedy)
    if op != GATED_DELTA:
        return _Obstacle(why=f"amx has no kernel for {_spoken(op)}", remedy=remedy)
    if head_dim is not None and head_dim not in AMX_HEAD_DIMS:
        sizes = " and ".join(map(str, AMX_HEAD_DIMS))
        return _Obstacle(why=f"our CPU kernel takes heads of {sizes}, not of {head_dim}", remedy=remedy)
    if dtype is not None and dtype != torch.bfloat16:
        why = f"our CPU kernel takes bfloat16, not {str(dtype).removeprefix('torch.')}"
        return _Obstacle(why=why, remedy=remedy)
    obstacle = _load_obstacle("amx", op)
    if obstacle is None:
        # Only now: it is built where there is a use for it.
        why = importlib.import_module(_beside("cpu.gated_delta_amx")).refusal()
        return None if why is None else _Obstacle(why=why, remedy=remedy)
    return obstacle


def _triton_obstacle(op: str, head_dim: int | None, dtype: torch.dtype | None) -> _Obstacle | None:
    head_dims: tuple[int, ...] = TRITON_HEAD_DIMS
    if op == QUADRATIC and dtype in QUADRATIC_HEAD_DIMS:
        head_dims = QUADRATIC_HEAD_DIMS[dtype]
    if op != CONVOLUTION and head_dim is not None and head_dim not in head_dims:
        sizes = ", ".join(map(str, head_dims))
        return _Obstacle(why=f"our kernel takes heads of {sizes}, not of {head_dim}", remedy="Take auto, fla or torch.")
    if dtype is not None and dtype not in TRITON_DTYPES:
        why = f"our kernel takes bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
        return _Obstacle(why=why, remedy="Take auto, fla or torch.")
    return _load_obstacle("triton", op)


def _fla_obstacle(op: str, machine: _Machine) -> _Obstacle | None:
    if op in (CHANNEL_DELTA, *FUSED):
        has = "is not used" if op == CHANNEL_DELTA else "has no kernel"
        return _Obstacle(why=f"fla {has} for {_spoken(op)}", remedy="Take auto, triton or torch.")
    if not machine.has_fla:
        return _Obstacle(why="fla is not installed", remedy="Install fla-core, or take auto or torch.")
    version = machine.triton_version
    assert version is not None
    # fla-core 0.6.0 refuses the backward of its gated delta rule there (its issue 640); its GLA does not use that part.
    if op == GATED_DELTA and machine.is_hopper and (3, 4, 0) <= version <= (3, 7, 0) and not machine.has_tilelang:
        return _Obstacle(
            why=f"fla refuses the gated delta rule's backward on Hopper with triton {'.'.join(map(str, version))}",
            remedy="Install tilelang or triton 3.7.1 or later, or take auto, triton or torch.",
        )
    return _load_obstacle("fla", op)


def _spoken(op: str) -> str:
    return op.replace("_", " ")


def _load_obstacle(backend: str, op: str) -> _Obstacle | None:
    try:
        kernel(backend, op)
    # Kernel libraries probe the GPU and the compiler as they load, and fail in ways of their own.
    except Exception as error:
        why = f"{backend} does not load ({type(error).__name__}: {error})"
        return _Obstacle(why=why, remedy="Take auto or torch.")
    return None


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


_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def kernel(backend: str, op: str) -> Callable[..., Any]:
    """The library's function, imported at first use and kept, as torch.compile cannot trace an import."""
    if (backend, op) not in _kernels:
        module, name = {
            ("triton", GATED_DELTA): (_beside("gpu.gated_delta_triton"), "chunked"),
            ("triton", GATED_DELTA_STEP): (_beside("gpu.gated_delta_step_triton"), "step"),
            ("triton", GATED_LINEAR): (_beside("gpu.channel_decay_triton"), "chunked"),
            ("triton", CHANNEL_DELTA): (_beside("gpu.channel_decay_triton"), "chunked"),
            ("triton", QUADRATIC): (_beside("gpu.quadratic_triton"), "rotated_features"),
            ("triton", CONVOLUTION): (_beside("gpu.convolution_triton"), "convolution"),
            ("amx", GATED_DELTA): (_beside("cpu.gated_delta_amx"), "chunked"),
            ("fla", GATED_DELTA): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
            ("fla", GATED_LINEAR): ("fla.ops.gla", "chunk_gla"),
        }[backend, op]
        _kernels[backend, op] = getattr(importlib.import_module(module), name)
    return _kernels[backend, op]


def _beside(module: str) -> str:
    """The kernels' own modules. A saved checkpoint holds a renamed copy of this file and no kernels: none is found."""
    return __name__.removesuffix("backend") + module
