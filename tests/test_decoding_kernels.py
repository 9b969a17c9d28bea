"""The decoding kernels against their plain forms, and the prefill in segments against the chunked form.

On a GPU the kernels run for real. Elsewhere this file runs as a program in Triton's interpreter, in its own process
because Triton decides at import time whether it interprets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from triton_runs import accept_numpy_2_4, needs_gpu, needs_triton, run_in_the_interpreter

from dtr.ops import decoding, gated_delta
from dtr.ops.projections import DeltaProjection, GatedProjection, HeadNorms, Norm


class Case:
    """Inputs of a pico model with grouped heads, made on the CPU and moved."""

    def __init__(self, *, dim: int, dtype: torch.dtype, device: str, batch: int = 3, slots: int = 300) -> None:
        self.generator = torch.Generator().manual_seed(dim + slots)
        self.dtype, self.device = dtype, device
        self.batch, self.heads, self.groups, self.dim, self.slots = batch, 6, 2, dim, slots
        self.cos, self.sin = (self.randn(batch, dim) for _ in range(2))
        self.norms = HeadNorms(query=self.randn(dim), key=self.randn(dim), eps=1e-5)

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(self.device, dtype or self.dtype)

    def ints(self, *numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)


def check_delta_step(case: Case, norms: HeadNorms | None, tolerance: float, *, quadratic: bool = False) -> None:
    from dtr.ops.gpu import decoding_triton

    width = (6 if quadratic else 4) * case.heads * case.dim + 2 * case.heads
    # As a slice of something wider: rows may be strided.
    rows = case.randn(case.batch, width + 8)[:, :width]
    ours = case.randn(case.batch, case.heads, case.dim, case.dim, dtype=torch.float32)
    plain = ours.cpu().clone()
    out = decoding_triton.delta_step(rows, case.cos, case.sin, ours, norms, quadratic)
    tables = case.cos.cpu(), case.sin.cpu()
    want = decoding.delta_step(rows.cpu(), *tables, plain, on_cpu(norms), quadratic=quadratic)
    close(out, want, tolerance)
    close(ours, plain, 1e-5)


def check_shared_step(case: Case, norms: HeadNorms | None, tolerance: float) -> None:
    """States at slots of a cache with room for more, some of new sequences, whose slots hold what must not be read."""
    from dtr.ops.gpu import decoding_triton

    rows = case.randn(case.batch, 6 * case.heads * case.dim + 2 * case.heads)
    # Slots lie further apart than a state is wide.
    wide = case.randn(9, case.heads + 1, case.dim, case.dim, dtype=torch.float32)
    wide[4] = float("inf")
    tables = case.randn(50, case.dim), case.randn(50, case.dim)
    slots = torch.tensor([7, 4, 2]).to(case.device)
    shared = decoding.SharedStates(
        slot_B=slots, is_new_B=slots == 4, position_B=torch.tensor([3, 49, 0]).to(case.device)
    )
    plain = wide.cpu().clone()
    out = decoding_triton.delta_step(rows, *tables, wide[:, : case.heads], norms, True, shared)
    on_the_cpu = decoding.SharedStates(**{name: x.cpu() for name, x in vars(shared).items()})
    tables = tuple(x.cpu() for x in tables)
    want = decoding.delta_step(
        rows.cpu(), *tables, plain[:, : case.heads], on_cpu(norms), quadratic=True, shared=on_the_cpu
    )
    close(out, want, tolerance)
    close(wide, plain, 1e-5)


def check_plain_step(case: Case, tolerance: float) -> None:
    from dtr.ops.gpu.gated_delta_step_triton import step

    q, k, v = (case.randn(case.batch, case.heads, case.dim) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = (torch.rand(case.batch, case.heads, generator=case.generator).to(case.device) for _ in range(2))
    state = case.randn(case.batch, case.heads, case.dim, case.dim, dtype=torch.float32)
    before = state.clone()
    got = step(q, k, v, -g, beta, state, scale=0.7)
    want = gated_delta.step(q.cpu(), k.cpu(), v.cpu(), -g.cpu(), beta.cpu(), state.cpu(), scale=0.7)
    close(got[0], want[0], tolerance)
    close(got[1], want[1], 1e-4)
    assert torch.equal(state, before)


def check_rotate_and_store(case: Case, norms: HeadNorms | None, tolerance: float) -> None:
    from dtr.ops.gpu import decoding_triton

    rows = case.randn(case.batch, (case.heads + 2 * case.groups) * case.dim)
    shape = (case.batch, case.groups, case.slots, case.dim)
    ours, plain = [case.randn(*shape), case.randn(*shape)], []
    plain = [x.cpu().clone() for x in ours]
    slot = case.ints(7)[0]
    q = decoding_triton.rotate_and_store(rows, case.cos, case.sin, *ours, slot, norms)
    want = decoding.rotate_and_store(rows.cpu(), case.cos.cpu(), case.sin.cpu(), *plain, slot.cpu(), on_cpu(norms))
    for got, expected in zip((q, *ours), (want, *plain)):
        close(got, expected, tolerance)


def check_attend(case: Case, last: int, tolerance: float) -> None:
    from dtr.ops.gpu import attend_triton

    q = case.randn(case.batch, case.heads, case.dim)
    keys, values = (case.randn(case.batch, case.groups, case.slots, case.dim) for _ in range(2))
    # Slots past the current one hold whatever was there before.
    keys[:, :, last + 1 :], values[:, :, last + 1 :] = float("nan"), float("inf")
    first = case.ints(0, last // 2, last)
    out = attend_triton.attend(q, keys, values, first, case.ints(last)[0], scale=0.3)
    want = decoding.attend(q.cpu(), keys.cpu(), values.cpu(), first.cpu(), torch.tensor(last), scale=0.3)
    close(out, want, tolerance)


def check_rotate_heads(case: Case, *, tolerance: float) -> None:
    from dtr.ops.gpu import decoding_triton

    x = case.randn(case.batch, 37, case.heads, case.dim)
    # As a product of heads leaves them.
    mixes = case.randn(case.batch, case.heads, 37, case.dim).transpose(1, 2)
    for num_tables in (1, case.batch):
        cos, sin = (case.randn(num_tables, 37, case.dim) for _ in range(2))
        for weight, unit, mix in ((None, True, None), (case.norms.query, False, None), (case.norms.query, True, mixes)):
            got = decoding_triton.rotate_heads(x, cos, sin, weight, 1e-5, unit, mix)
            weight, mix = (None if given is None else given.cpu() for given in (weight, mix))
            how = {"norm_weight": weight, "eps": 1e-5, "unit_length": unit, "mix_BTHK": mix}
            close(got, decoding.rotate_heads(x.cpu(), cos.cpu(), sin.cpu(), **how), tolerance)


def check_delta_gates(case: Case, tolerance: float) -> None:
    from dtr.ops.gpu import decoding_triton

    rows, mask = case.randn(case.batch, 70, 2 * case.heads), torch.ones(case.batch, 70, dtype=torch.uint8)
    mask[0, :5] = 0
    for given in (None, mask.to(case.device)):
        want = decoding.delta_gates(rows.cpu(), None if given is None else given.cpu())
        for ours, plain in zip(decoding_triton.delta_gates(rows, given), want):
            close(ours, plain, tolerance)


def check_gated_product(case: Case, tolerance: float) -> None:
    from dtr.ops.gpu import decoding_triton

    gate, x = case.randn(5, 2 * 1100).chunk(2, dim=1)
    for activation in ("silu", "identity_gate"):
        got = decoding_triton.gated_product(gate, x, activation)
        close(got, decoding.gated_product(gate.cpu(), x.cpu(), activation=activation), tolerance)


def check_gated_pair(case: Case, tolerance: float) -> None:
    from dtr.ops.gpu import mlp_triton

    x, weight = 3.0 * case.randn(70, 128), 0.1 * case.randn(128, 128)
    norm = Norm(weight=case.randn(128), eps=1e-5)
    tiles = mlp_triton.Tiles(rows=64, columns=32, warps=4)
    got = mlp_triton.gated_pair(x, weight * norm.weight, norm.eps, tiles)
    assert relative_error(got, plain_pair(x, norm, weight)) < tolerance


def plain_pair(x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
    norm = Norm(weight=norm.weight.cpu().float(), eps=norm.eps)
    return decoding.gated_pair(x.cpu().float(), GatedProjection(norm=norm, weight=weight.cpu().float()))


def check_prefill(case: Case, *, num_tokens: int, segments: int, tolerance: float) -> None:
    from dtr.ops.gpu.gated_delta_prefill import prefill

    shape = (case.batch, num_tokens, case.heads)
    # Correlated keys and little decay, so that the state carries over many segments.
    common = case.randn(case.batch, 1, case.heads, case.dim)
    q, k, v = case.randn(*shape, case.dim), common + 0.3 * case.randn(*shape, case.dim), case.randn(*shape, case.dim)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = -0.01 * torch.rand(shape, generator=case.generator).to(case.device)
    beta = torch.rand(shape, generator=case.generator).to(case.device)
    o, state = prefill(q, k, v, g, beta, scale=0.5, segments=segments)
    exact = [x.cpu().double() for x in (q, k, v, g, beta)]
    want, last = gated_delta.chunked(*exact, scale=0.5)
    for got, expected in ((o, want), (state, last)):
        assert float((got.cpu().double() - expected).norm() / expected.norm()) < tolerance


def check_delta_prompt(case: Case, *, num_tokens: int, tolerance: float, **cut: int) -> None:
    """Against the plain form in float32: correlated keys and little decay; padding on the left, norms, every bias."""
    from dtr.ops.gpu.delta_prompt_triton import Tuning, prompt

    hidden_dim = 64
    hidden = 2.0 * case.randn(case.batch, num_tokens, hidden_dim)
    hidden[..., 0] = 8.0
    angles = torch.arange(num_tokens)[:, None] * torch.logspace(-1, -4, case.dim // 2)
    cos, sin = (torch.cat([x, x], dim=-1)[None].to(case.device, case.dtype) for x in (angles.cos(), angles.sin()))
    mask = torch.ones(case.batch, num_tokens, dtype=torch.long, device=case.device)
    mask[0, : num_tokens // 3] = 0
    cases = (None, None, 1, False), (None, None, 1, True), (mask, case.norms, case.batch, True)
    for token_mask, norms, tables, quadratic in cases:
        projection = delta_projection(case, hidden_dim, norms, quadratic=quadratic)
        tables = [x.expand(tables, -1, -1) for x in (cos, sin)]
        got = prompt(hidden, projection, *tables, token_mask_BT=token_mask, tuning=Tuning(**cut))
        token_mask = None if token_mask is None else token_mask.cpu()
        tables = [x.cpu().float() for x in tables]
        want = decoding.delta_prompt_in_parts(
            hidden.cpu().float(), as_float32(projection), *tables, token_mask_BT=token_mask
        )
        real = slice(None) if token_mask is None else token_mask.bool()
        assert relative_error(got[0].cpu()[real], want[0][real]) < tolerance
        assert relative_error(got[1], want[1]) < tolerance


def delta_projection(case: Case, hidden_dim: int, norms: HeadNorms | None, *, quadratic: bool) -> DeltaProjection:
    """Keys that lean to one side and slow decay; with norms there are biases of q, k and v too, as far as none is 0."""
    width = case.heads * case.dim
    wide = (6 if quadratic else 4) * width
    weight = hidden_dim**-0.5 * case.randn(wide + 2 * case.heads + 6, hidden_dim)
    bias = 0.3 * case.randn(len(weight))
    if norms is None:
        bias[: 3 * width] = 0.0
        bias[4 * width : wide] = 0.0
    # The first feature of a hidden state is the same for all tokens.
    weight[width : 2 * width, 0] *= 4.0
    bias[wide : wide + case.heads] -= 5.0
    shape = {"num_heads": case.heads, "head_dim": case.dim, "quadratic": quadratic}
    norm = Norm(weight=case.randn(hidden_dim).abs() + 0.5, eps=1e-5)
    return DeltaProjection(norm=norm, weight=weight, bias=bias, norms=norms, has_head_bias=norms is not None, **shape)


def as_float32(x: Any) -> Any:
    """The same on the CPU in float32."""
    if dataclasses.is_dataclass(x):
        return type(x)(**{field.name: as_float32(getattr(x, field.name)) for field in dataclasses.fields(x)})
    return x.cpu().float() if isinstance(x, torch.Tensor) else x


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().float() - want).norm() / want.norm())


def on_cpu(norms: HeadNorms | None) -> HeadNorms | None:
    return None if norms is None else HeadNorms(query=norms.query.cpu(), key=norms.key.cpu(), eps=norms.eps)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=tolerance, atol=tolerance)


def check_all(case: Case, tolerance: float) -> None:
    for norms in (None, case.norms):
        for quadratic in (False, True):
            check_delta_step(case, norms, tolerance, quadratic=quadratic)
        check_shared_step(case, norms, tolerance)
        check_rotate_and_store(case, norms, tolerance)
    for last in (0, 63, 200, case.slots - 1):
        check_attend(case, last, tolerance)
    check_plain_step(case, tolerance)
    check_rotate_heads(case, tolerance=tolerance)
    check_delta_gates(case, tolerance)
    check_gated_product(case, tolerance)
    check_gated_pair(case, tolerance)


def test_order_of_streamed_rows() -> None:
    projection = GatedProjection(
        norm=Norm(weight=torch.full((2,), 2.0), eps=1e-5), weight=torch.arange(256.0)[:, None].expand(-1, 2)
    )
    rows = projection.streamed_rows[:, 0] / 2
    # A thread's share of a tile of a product: two neighbours of every eight columns.
    threads = rows.view(4, 8, 4, 2).transpose(1, 2).reshape(16, 8, 2)
    gates = torch.arange(128.0).view(16, 8)
    assert torch.equal(threads, torch.stack([gates, gates + 128], dim=-1))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dim", [64, 576])
@pytest.mark.parametrize("num_rows", [1, 1100, 40_000])
def test_streaming_pair_on_the_gpu(num_rows: int, dim: int) -> None:
    """One share of a row tile, several tiles with rows left over, and many tiles per program."""
    from dtr.ops.gpu import mlp_triton

    case = Case(dim=dim, dtype=torch.bfloat16, device="cuda")
    x, weight = 3.0 * case.randn(num_rows, dim), case.randn(512, dim) / dim**0.5
    kernels = mlp_triton.streaming(x, weight)
    if kernels is None:
        pytest.skip("another GPU, or another release of triton")
    norm = Norm(weight=case.randn(dim), eps=1e-5)
    for stages in (None, 3):
        rows = GatedProjection(norm=norm, weight=weight).streamed_rows
        got = kernels.gated_pair(x, rows, norm.eps, stages)
        assert relative_error(got, plain_pair(x, norm, weight)) < 1e-2


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    check_all(Case(dim=dim, dtype=dtype, device="cuda"), tolerance)
    # So many sequences that one program reads all slots, and so many slots that they are read in many parts.
    check_all(Case(dim=dim, dtype=dtype, device="cuda", slots=9000), tolerance)
    many = Case(dim=dim, dtype=dtype, device="cuda", batch=1200)
    check_delta_step(many, None, tolerance)
    q, keys = many.randn(1200, 6, dim), many.randn(1200, 2, 300, dim)
    first, last = torch.zeros(1200, dtype=torch.int32, device="cuda"), many.ints(299)[0]
    got = decoding.attend(q, keys, keys, first, last, scale=0.3)
    want = decoding.attend(q.cpu(), keys.cpu(), keys.cpu(), first.cpu(), last.cpu(), scale=0.3)
    close(got, want, tolerance)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("num_tokens", "segments"), [(130, 1), (3000, None), (3000, 7)])
def test_prefill_in_segments_on_the_gpu(num_tokens: int, segments: int, dim: int, dtype: torch.dtype) -> None:
    # Keys are correlated, see the bounds of test_ops_triton.py.
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-3
    case = Case(dim=dim, dtype=dtype, device="cuda")
    check_prefill(case, num_tokens=num_tokens, segments=segments, tolerance=tolerance)


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("cut", [{}, {"segments": 7}, {"scan_columns": 16}], ids=str)
@pytest.mark.parametrize("num_tokens", [7, 3000])
def test_a_prompt_through_a_layer_on_the_gpu(num_tokens: int, cut: dict[str, int]) -> None:
    case = Case(dim=64, dtype=torch.bfloat16, device="cuda")
    check_delta_prompt(case, num_tokens=num_tokens, tolerance=2e-2, **cut)


@needs_triton
def test_which_prompts_go_through_a_layer_at_once() -> None:
    from dtr.ops.gpu.delta_prompt_triton import supports

    hidden = torch.empty(3, 7, 128, dtype=torch.bfloat16)
    assert supports(hidden, 64)
    assert not any(supports(hidden, dim) for dim in (16, 32, 128))
    assert not any(supports(other, 64) for other in (hidden.float(), hidden.half(), hidden[..., :72]))


@needs_triton
@pytest.mark.timeout(240)
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def run_interpreted() -> None:
    """float32 only, as in `test_ops_triton.py`."""
    accept_numpy_2_4()
    case = Case(dim=16, dtype=torch.float32, device="cpu")
    check_all(case, 1e-5)
    check_prefill(case, num_tokens=330, segments=3, tolerance=1e-5)
    check_prefill(case, num_tokens=70, segments=1, tolerance=1e-5)
    few = Case(dim=16, dtype=torch.float32, device="cpu", batch=2)
    few.heads = 2
    check_delta_prompt(few, num_tokens=150, segments=2, tolerance=1e-5)
    check_delta_prompt(few, num_tokens=40, tolerance=1e-5)
    from test_packed_prompts import check_packed

    check_packed(few, (1, 700, 65), 1e-5)
    check_packed(few, (3, 40), 1e-5)


if __name__ == "__main__":
    run_interpreted()
