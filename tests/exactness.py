"""What is promised to the bit, and what up to rounding.

**To the bit**, so compared by `torch.equal` or `==`:

- weights: what is saved, loaded, copied, resumed or left alone. `assert_same_weights` compares names, types and bits;
- tokens, splits, orders, journals: whatever no matrix product had a part in;
- two computations in one process on the *same tensors*: the teacher before and after a swap, a hybrid with no layer
  replaced and its teacher, whose modules it shares, training twice from one seed. What torch allocates starts at
  multiples of 64 bytes, so kernels take the same path both times.

**Up to rounding**, so compared by `assert_same_up_to_rounding`: whatever is computed from equal weights that lie
elsewhere in memory, above all a model that was saved and loaded. Tensors of a safetensors file start where the file has
them, and matrix kernels without AVX2 of Intel's own (MKL on AMD) peel off elements up to the next boundary, which
changes the order of a sum. The same holds for other lengths, batches and compiled code, whose tests state tolerances of
their own.
"""

from __future__ import annotations

import torch

ROUNDING_ULPS = 32
"""Units in the last place of the largest value. Six were the most seen over 150 placements of the weights of five kinds
of hybrid; rounding one weight matrix to bfloat16 makes thousands (`test_exactness.py`)."""


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The same names, types and bits, buffers that are saved included."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype, name
        assert torch.equal(ours[name], weight), name


def rounding_ulps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units in the last place of the largest expected value (float32 only)."""
    assert actual.dtype == expected.dtype == torch.float32, "a coarser type would let a wrong weight through"
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() / (expected.abs().max() * torch.finfo(torch.float32).eps)
    return difference.item()


def assert_same_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Each value within `ROUNDING_ULPS` units in the last place of the largest one; no NaN."""
    assert rounding_ulps(actual, expected) <= ROUNDING_ULPS


def assert_same_model(actual: torch.nn.Module, expected: torch.nn.Module, **inputs: torch.Tensor) -> None:
    """Equal weights, and so logits that differ by rounding alone."""
    assert_same_weights(actual, expected)
    with torch.no_grad():
        assert_same_up_to_rounding(actual(**inputs).logits, expected(**inputs).logits)
