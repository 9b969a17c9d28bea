"""Our kernel for CPUs with AMX against the form token by token in float64, how it is built, and where it is taken."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from dtr.errors import DeviceError
from dtr.ops import backend, dispatch, gated_delta
from dtr.ops.backend import GATED_LINEAR, choose_backend
from dtr.ops.cpu import gated_delta_amx, native

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate")


@pytest.fixture
def amx():
    why = gated_delta_amx.refusal()
    if why is not None:
        pytest.skip(why)
    return gated_delta_amx.chunked


def make_inputs(kind: str, num_tokens: int, dim: int = 64) -> list[torch.Tensor]:
    """q, k, v as bfloat16; g, beta and a state as float32."""
    draw = torch.Generator().manual_seed(num_tokens)
    q, k, v = (torch.randn(2, num_tokens, 3, dim, generator=draw) for _ in range(3))
    if kind == "correlated":
        k = torch.randn(2, 1, 3, dim, generator=draw) + 0.3 * k
    g = -0.3 * torch.rand(2, num_tokens, 3, generator=draw)
    if kind == "strong_decay":
        g = torch.where(torch.rand(g.shape, generator=draw) < 0.1, -40.0, g)
    beta = torch.rand(2, num_tokens, 3, generator=draw)
    state = 0.3 * torch.randn(2, 3, dim, dim, generator=draw)
    return [*(x.bfloat16() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)), g, beta, state]


def run(form, inputs: list[torch.Tensor], *, with_state: bool = True) -> dict[str, torch.Tensor]:
    """Output, last state and the gradient of every input, for fixed random gradients of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, state = form(*leaves[:-1], scale=0.7, state_BHKV=leaves[-1] if with_state else None)
    draw = torch.Generator().manual_seed(1)
    weights = (torch.randn(x.shape, generator=draw).bfloat16().to(x.dtype) for x in (o, state))
    loss = sum((x * w).sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x, w in zip((o, state), weights))
    grads = torch.autograd.grad(loss, leaves if with_state else leaves[:-1])
    return dict(zip(NAMES, (o.detach(), state.detach(), *grads)))


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("kind", "num_tokens", "dim"),
    [("random", 130, 64), ("random", 1, 64), ("random", 64, 64), ("random", 70, 128), ("correlated", 130, 64),
     ("strong_decay", 130, 64)],
)  # fmt: skip
def test_output_and_every_gradient(amx, kind, num_tokens, dim):
    inputs = make_inputs(kind, num_tokens, dim)
    exact = run(gated_delta.naive, [x.double() for x in inputs])
    # Three roundings to bfloat16; the decay's gradient is a difference of sums.
    limits = dict.fromkeys(NAMES, 8e-3) | {"dg": 1.5e-2}
    errors = {name: error(x, exact[name]) for name, x in run(amx, inputs).items()}
    assert all(errors[name] < limits[name] for name in NAMES), errors


def test_it_is_no_further_off_than_the_plain_form(amx):
    inputs = make_inputs("correlated", 130)
    exact = run(gated_delta.naive, [x.double() for x in inputs])
    ours, plain = (run(form, inputs) for form in (amx, gated_delta.chunked))
    assert all(error(ours[name], exact[name]) < 1.1 * error(plain[name], exact[name]) for name in NAMES)


def test_layouts_and_a_missing_state_change_nothing(amx):
    inputs = make_inputs("random", 100)
    inputs[-1].zero_()
    expected = run(amx, inputs)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    ours = run(amx, strided, with_state=False)
    assert not strided[0].is_contiguous()
    assert all(torch.equal(x, expected[name]) for name, x in ours.items())


def test_threads_share_the_work_and_give_the_same_bits(amx):
    inputs, before = make_inputs("random", 130), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(amx, inputs)
        torch.set_num_threads(3)
        assert all(torch.equal(x, one[name]) for name, x in run(amx, inputs).items())
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_none(amx):
    q, k, v, g, beta, _ = make_inputs("random", 70)
    g[0, 3, 0] = torch.nan
    o, state = amx(q, k, v, g, beta)
    assert o[0, 3:, 0].isnan().all()
    assert state[0, 0].isnan().all()
    # Another head does not notice.
    assert o[0, :, 1].isfinite().all()


def test_other_libraries_find_the_matrix_units_as_they_left_them(amx):
    x = torch.randn(64, 96).bfloat16()
    before = x @ x.T
    run(amx, make_inputs("random", 64))
    assert torch.equal(x @ x.T, before)


def test_no_break_in_a_compiled_graph_and_shapes_as_announced(amx):
    inputs = make_inputs("random", 70)
    compiled = torch.compile(amx, backend="aot_eager", fullgraph=True)
    expected = run(amx, inputs)
    assert all(torch.equal(x, expected[name]) for name, x in run(compiled, inputs).items())
    with torch.no_grad():
        torch.library.opcheck(gated_delta_amx._forward, (*inputs, 0.7), test_utils=("test_schema", "test_faketensor"))


def test_auto_takes_it_where_it_can_run_and_says_why_not_elsewhere(monkeypatch):
    monkeypatch.setattr(backend, "_loaded", {})
    monkeypatch.setattr(gated_delta_amx, "refusal", lambda: None)
    model = {"head_dim": 64, "dtype": torch.bfloat16}
    assert choose_backend("auto", "cpu", **model).name == "amx"
    assert choose_backend("amx", "cpu", **model).reason == "requested"
    cases = [
        ({"dtype": torch.float32}, "takes bfloat16, not float32"),
        ({"head_dim": 80}, "heads of 64 and 128, not of 80"),
        ({"op": GATED_LINEAR}, "no (amx )?kernel for gated linear attention"),
    ]
    for change, reason in cases:
        chosen = choose_backend("auto", "cpu", **model | change)
        assert chosen.name == "torch"
        assert re.search(reason, chosen.reason)
        with pytest.raises(DeviceError, match=f"{reason}.*Take auto or torch"):
            choose_backend("amx", "cpu", **model | change)
    with pytest.raises(DeviceError, match="the device is cuda"):
        choose_backend("amx", "cuda", **model)
    monkeypatch.setattr(gated_delta_amx, "refusal", lambda: "our CPU kernel needs a processor with AMX")
    assert choose_backend("auto", "cpu", **model).reason == "our CPU kernel needs a processor with AMX"


def test_asked_for_by_name_it_leaves_other_recurrences_to_others():
    assert dispatch.chosen_backend(GATED_LINEAR, "amx", "cpu", 64, torch.bfloat16) == "torch"


def test_states_that_are_not_square_take_the_plain_form(monkeypatch):
    monkeypatch.setattr(dispatch, "chosen_backend", lambda op, requested, *_: requested)
    q, k, v, g, beta, _ = make_inputs("random", 20)
    o, state = dispatch.gated_delta_rule(q, k, v[..., :32], g, beta, backend="amx")
    plain, _ = gated_delta.chunked(q, k, v[..., :32], g, beta)
    assert torch.equal(o, plain)
    assert state.shape == (2, 3, 64, 32)


def test_a_step_of_students_learns_the_same_by_it(amx):
    """The mixer as it is trained, under autocast: losses and updates as by the plain form."""
    from dtr.arch import HeadGeometry
    from dtr.mixers.base import set_backend
    from dtr.mixers.gated_deltanet import GatedDeltaNet

    geometry = HeadGeometry(hidden_dim=128, num_heads=2, num_kv_heads=1, head_dim=64)
    hidden, target = torch.randn(2, 2, 80, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    angles = torch.arange(80)[None, :, None] * torch.logspace(0, -3, 32).repeat(2)
    losses: dict[str, list[float]] = {}
    for name in ("torch", "amx"):
        torch.manual_seed(0)
        mixer = GatedDeltaNet(geometry, 0)
        set_backend(mixer, name)
        mixer.reset_gates()
        optimizer = torch.optim.AdamW(mixer.parameters(), lr=3e-3)
        losses[name] = []
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16):
                out, _ = mixer(hidden, (angles.cos(), angles.sin()))
            loss = F.mse_loss(out.float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["torch"][-1] < 0.9 * losses["torch"][0]
    assert losses["amx"] == pytest.approx(losses["torch"], rel=5e-3)


@pytest.mark.parametrize(("compiler", "words"), [("false", "refuses"), (None, "no C\\+\\+ compiler")])
def test_without_a_compiler_it_says_so_and_leaves_nothing(monkeypatch, tmp_path, compiler, words):
    monkeypatch.setenv("DTR_CACHE", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", compiler)
    with pytest.raises(OSError, match=words):
        native.load_library("gated_delta_amx", ("amx_matrices.h",))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
