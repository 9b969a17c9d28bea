"""What this machine is and can do: versions, devices, backends and why. Behind `dtr doctor` and every report."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "datasets",
    "triton",
    "fla-core",
    "gguf",
    "lm-eval",
    "peft",
)
EXTRAS = {
    "gguf": "gguf",
    "fla": "fla",
    "lm-eval": "lm_eval",
    "rouge": "rouge_score",
    "tensorboard": "tensorboard",
    "peft": "peft",
}
"""Extra of this package to the module it brings."""


def library_versions() -> dict[str, str | None]:
    """Version of each library that matters to a run; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "dtr": own_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def own_version() -> str:
    try:
        return version("distill-then-replace")
    except PackageNotFoundError:
        return "0+unknown"


def own_commit() -> str | None:
    """Git commit of this package's checkout, with `+changes` if files differ from it; None for an installed wheel.

    A copy of the tree whose history is missing or stale carries the commit in the environment, as `DTR_COMMIT`.
    """
    if commit := os.environ.get("DTR_COMMIT"):
        return commit
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """How this process was started, for a record that others repeat; torchrun's own part included."""
    program = Path(sys.argv[0])
    # A program of its own that calls us, as those in benchmarks/.
    script = program.as_posix() if program.suffix == ".py" and program.name != "__main__.py" else None
    if num_processes := os.environ.get("WORLD_SIZE"):
        start = ["python", "-m", "torch.distributed.run", "--nproc-per-node", num_processes]
        start += [script] if script else ["-m", "dtr"]
    else:
        start = ["python", script] if script else ["dtr"]
    return shlex.join([*start, *sys.argv[1:]])


def compile_caches() -> dict[str, Any]:
    """Where Inductor, Triton and we keep compiled code between runs, and whether anything is there yet.

    A cold start that finds them filled is shorter; set the variables to empty folders to measure a first one.
    """
    import getpass
    import tempfile

    from dtr.pretrained import cache_folder

    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    return {
        name: {"variable": variable, "folder": folder, "was_empty": not any(Path(folder).glob("*"))}
        for name, variable, folder in (
            ("inductor", "TORCHINDUCTOR_CACHE_DIR", inductor),
            ("triton", "TRITON_CACHE_DIR", triton),
            ("amx", "DTR_CACHE", str(cache_folder() / "kernels")),
        )
    }


def hardware(device: Any = None) -> dict[str, Any]:
    """Processor, memory and, for a CUDA device, the GPU."""
    import torch

    facts: dict[str, Any] = {
        "device": str(device) if device is not None else "cpu",
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
    }
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def peak_rss_bytes() -> int | None:
    """Most memory that this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def doctor() -> dict[str, Any]:
    """Everything `dtr doctor` prints: versions, hardware, GPUs, the backend of each device and why, missing extras."""
    import torch

    from dtr.ops.backend import choose_backend
    from dtr.teacher import pick_device, pick_dtype

    auto = pick_device("auto")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    backends = {}
    for kind in ["cpu", *(["cuda"] if gpus else [])]:
        choice = choose_backend("auto", kind)
        backends[kind] = {"name": choice.name, "reason": choice.reason}
    return {
        "versions": library_versions(),
        "hardware": hardware(auto),
        "gpus": gpus,
        "default_device": str(auto),
        "default_dtype": str(pick_dtype("auto", auto)).removeprefix("torch."),
        "backends": backends,
        "missing_extras": [extra for extra, module in EXTRAS.items() if importlib.util.find_spec(module) is None],
    }


def doctor_of_model(source: str | Path, *, device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """What would be done with this model: its layers by kind, its attention, which mixers fit, which fast paths apply.

    Raises:
        ModelError: the model cannot be read, or fails a check.
    """
    from dtr.arch import is_family, layer_kind
    from dtr.backbone.probe import backbone_of
    from dtr.mixers import MIXERS, misfit
    from dtr.teacher import load_teacher

    teacher = load_teacher(source, device=device, dtype=dtype)
    config, g = teacher.model.config, teacher.geometry
    has_kernels = is_family(config)
    if has_kernels:
        kinds = [layer_kind(config, index) for index in range(teacher.num_layers)]
    else:
        kinds = backbone_of(teacher.model).kinds
    place = teacher.place(teacher.replaceable_layers[0])
    heads = f"{g.num_heads} query and {g.num_kv_heads} key/value heads of {g.head_dim}"
    return {
        "model_type": config.model_type,
        "layers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "replaceable_layers": teacher.replaceable_layers,
        "attention": f"{type(teacher.model).__name__} at {place}: {heads}",
        "mixers": [name for name in MIXERS if not misfit(name, g)],
        "fast_paths": ["compiled training step", "fused decoder", "vLLM"] if has_kernels else [],
        "self_check": teacher.self_check,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
