"""Where tests of Triton kernels run: on a GPU, and elsewhere as a program of its own in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import forks
import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def run_in_the_interpreter(file: str) -> None:
    """Run a test file as a program, in a process of its own: Triton decides as it is imported whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = forks.run(file, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def accept_numpy_2_4() -> None:
    """NumPy 2.4 refuses int() of a one-element array, by which Triton 3.6's interpreter reads loop bounds."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_and_index
