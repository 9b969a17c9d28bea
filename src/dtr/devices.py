"""Devices and types of weights by name."""

from __future__ import annotations

import torch

from dtr.errors import DeviceError, RecipeError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


def pick_device(name: str) -> torch.device:
    """A device by name; auto takes the GPU if there is one.

    Raises:
        DeviceError: the name is unknown or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            # Others, as meta and mps, are names that torch knows and places where nothing here was ever run.
            raise RuntimeError(f"no device to run on: {name}")
    except RuntimeError:
        hint = "Write cuda for a GPU." if "gpu" in name.lower() else did_you_mean(name, ["cpu", "cuda"])
        raise RecipeError("runtime.device", got=f"'{name}'", expected="auto, cpu or cuda", hint=hint) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            "runtime.device",
            got=f"'{name}' with {torch.cuda.device_count()} CUDA GPUs in this machine",
            expected="a GPU that is there",
            hint="Use --set runtime.device=cpu, or auto; 'dtr doctor' says what torch sees.",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A weight type by name; auto is bfloat16 on a GPU and on CPUs that multiply it in hardware.

    Raises:
        RecipeError: the name is unknown.
    """
    if name not in ("auto", *DTYPES):
        raise RecipeError(
            "teacher.dtype", got=f"'{name}'", expected="a type of weights", hint=did_you_mean(name, ["auto", *DTYPES])
        )
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" or cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones on this processor (AMX tiles)."""
    return bool(torch.cpu._is_amx_tile_supported())
