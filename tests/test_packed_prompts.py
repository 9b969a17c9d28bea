"""Sequences of any lengths in one row: their layout, and a layer over them, with states that go on.

The kernels run in the interpreter beside those of `test_decoding_kernels.py`, on a GPU here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_decoding_kernels import Case, as_float32, delta_projection, relative_error
from torch.nn import functional as F
from triton_runs import needs_gpu

from dtr.ops.chunk_layout import CHUNK_TOKENS, lay_out
from dtr.ops.decoding import delta_prompt_in_parts
from dtr.ops.packed_prompts import delta_sequences
from dtr.ops.projections import Norm

LENGTHS = (1, 700, 64, 65, 130)


def starts_of(lengths: tuple[int, ...], first: int = 0) -> np.ndarray:
    return first + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@pytest.mark.parametrize("lengths", [(1,), (64,), (2000, 1), LENGTHS])
@pytest.mark.parametrize("num_heads", [1, 1000])
def test_a_layout_puts_every_token_into_a_chunk_of_its_own_sequence(lengths: tuple[int, ...], num_heads: int) -> None:
    layout = lay_out(starts_of(lengths, first=5), "cpu", num_heads=num_heads)
    expected = []
    for start, length in zip(starts_of(lengths), lengths):
        padding = -length % CHUNK_TOKENS
        expected += [*range(start, start + length), *[None] * padding]
    is_text = layout.is_text[0].bool()
    assert [int(t) if text else None for t, text in zip(layout.token, is_text)] == expected
    assert layout.token[layout.place].tolist() == list(range(sum(lengths)))
    assert layout.first_token.tolist() == starts_of(lengths)[:-1].tolist()

    pieces, firsts = layout.piece_chunks.tolist(), layout.sequence_pieces.tolist()
    chunks = [-(-n // CHUNK_TOKENS) for n in lengths]
    assert [pieces[i] for i in firsts] == starts_of(tuple(chunks)).tolist()
    assert layout.is_first_piece.nonzero()[:, 0].tolist() == firsts[:-1]
    assert len(pieces) == layout.num_pieces + 1
    assert (np.diff(pieces) > 0).all()
    # Few heads: long sequences are cut, as a GPU has room for their pieces side by side.
    assert (layout.num_pieces > len(lengths)) == (num_heads == 1 and max(lengths) > 8 * CHUNK_TOKENS)


def packed(case: Case, lengths: tuple[int, ...], quadratic: bool, norms: bool):
    """Inputs of a layer after its norm, and what its plain form makes of each sequence by itself."""
    hidden = 2.0 * case.randn(sum(lengths), 64)
    hidden[:, 0] = 4.0
    projection = delta_projection(case, 64, case.norms if norms else None, quadratic=quadratic)
    angles = torch.arange(sum(lengths))[:, None] * torch.logspace(-1, -4, case.dim // 2)
    cos, sin = (torch.cat([x, x], dim=-1).to(case.device, case.dtype) for x in (angles.cos(), angles.sin()))
    initial = case.randn(len(lengths), case.heads, case.dim, case.dim, dtype=torch.float32)
    return hidden, projection, cos, sin, initial


def check_packed(case: Case, lengths: tuple[int, ...], tolerance: float, *, num_heads: int = 1) -> None:
    """Kernels against the plain form, with states that go on."""
    from dtr.ops.gpu import delta_prompt_triton, packed_prompts_triton

    layout, on_cpu = (lay_out(starts_of(lengths), device, num_heads=num_heads) for device in (case.device, "cpu"))
    for quadratic, norms in ((False, False), (True, True)):
        inputs = packed(case, lengths, quadratic, norms)
        hidden, projection, cos, sin, initial = (as_float32(x) for x in inputs)
        want = delta_sequences(hidden, projection, cos, sin, on_cpu, initial)
        for is_fused in {False, case.device == "cpu" or delta_prompt_triton.supports(hidden[None], case.dim)}:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(packed_prompts_triton, "supports", lambda *_, way=is_fused: way)
                got = packed_prompts_triton.run(*inputs[:-1], layout, inputs[-1])
            assert relative_error(got[0], want[0]) < tolerance
            assert relative_error(got[1], want[1]) < tolerance


def test_the_plain_form_reads_each_sequence_from_its_own_state() -> None:
    case = Case(dim=16, dtype=torch.float32, device="cpu")
    lengths = (3, 70, 1)
    hidden, projection, cos, sin, initial = packed(case, lengths, True, True)
    layout = lay_out(starts_of(lengths), "cpu")
    whole, _ = delta_sequences(hidden, projection, cos, sin, layout, torch.zeros_like(initial))
    # The layer's own form, which has the norm inside: one that does nothing to hidden states of unit size.
    unit = F.rms_norm(hidden, hidden.shape[-1:])
    plain = type(projection)(**(vars(projection) | {"norm": Norm(weight=torch.ones(64), eps=0.0)}))
    start = 0
    whole, last = delta_sequences(unit, projection, cos, sin, layout, torch.zeros_like(initial))
    for i, length in enumerate(lengths):
        rows = slice(start, start + length)
        want, state = delta_prompt_in_parts(unit[None, rows], plain, cos[None, rows], sin[None, rows])
        torch.testing.assert_close(whole[rows], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[i], state[0], rtol=1e-4, atol=1e-5)
        start += length
    # Cut in two, the second part goes on from the state of the first.
    half = lay_out(starts_of((40,)), "cpu"), lay_out(starts_of((30,)), "cpu")
    rows = slice(3, 43), slice(43, 73)
    state = torch.zeros_like(initial[:1])
    for one, part in zip(half, rows):
        out, state = delta_sequences(unit[part], projection, cos[part], sin[part], one, state)
        torch.testing.assert_close(out, whole[part], rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), LENGTHS, (5000,), (64,) * 40], ids=str)
def test_packed_on_the_gpu(dim: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-3
    check_packed(Case(dim=dim, dtype=dtype, device="cuda"), lengths, tolerance)
