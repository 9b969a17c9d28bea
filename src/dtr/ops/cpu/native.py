"""C++ beside this file as a shared library: built once by the system's compiler, kept, and loaded without headers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from dtr.pretrained import cache_folder

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-march=sapphirerapids")
"""The oldest processor with AMX, and not this machine's own, so that what is kept fits any that may find it."""
TIME_LIMIT_SECONDS = 120


def load_library(name: str, headers: tuple[str, ...]) -> ctypes.CDLL:
    """The library of `name`.cpp, which includes `headers`.

    Raises:
        OSError: there is no compiler, it refuses, or what it made does not load; one line says which.
    """
    source, *included = (Path(__file__).with_name(file) for file in (f"{name}.cpp", *headers))
    text = b"".join(file.read_bytes() for file in (source, *included))
    key = hashlib.sha256(text + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"{name}-{key}.so"
    if not library.exists():
        _build(source, library)
    # Functions of OpenMP are found in the library that torch has loaded already, so that there is one pool of threads.
    return ctypes.CDLL(str(library))


def _build(source: Path, library: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None:
        raise OSError("there is no C++ compiler (g++ or clang++)")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Beside it and renamed: another process may build the same, or be stopped in the middle.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        try:
            subprocess.run(
                [compiler, *FLAGS, "-o", str(made), str(source)],
                capture_output=True,
                text=True,
                check=True,
                timeout=TIME_LIMIT_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            first = next(iter(error.stderr.splitlines()), f"exit code {error.returncode}")
            raise OSError(f"{compiler} refuses {source.name}: {first[:200]}") from error
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler} took more than {TIME_LIMIT_SECONDS} s") from error
        made.replace(library)
