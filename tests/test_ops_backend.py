"""Which backend is chosen where, and that the dispatch passes each what it expects."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dtr.errors import DeviceError
from dtr.ops import (
    backend,
    channel_delta,
    dispatch,
    gated_delta,
    gated_linear,
    quadratic_features,
    short_convolution,
)
from dtr.ops.backend import CHANNEL_DELTA, CONVOLUTION, FUSED, GATED_DELTA, GATED_LINEAR, QUADRATIC, choose_backend
from dtr.ops.chunking import MIN_LOG_DECAY
from dtr.ops.dispatch import chosen_backend
from dtr.ops.rotary import rotate_to_unit_length


@pytest.fixture(autouse=True)
def _fresh_kernels(monkeypatch):
    monkeypatch.setattr(backend, "_loaded", {})
    dispatch._backend_name.cache_clear()
    yield
    dispatch._backend_name.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A function that says what there is; what is there loads unless told otherwise."""

    def set_up(*, triton=(3, 7, 1), hopper=True, fla=True, tilelang=False, kernel_loads=True, fla_loads=True):
        there = backend._Machine(triton_version=triton, is_hopper=hopper, has_fla=fla, has_tilelang=tilelang)
        monkeypatch.setattr(backend, "_probe", lambda: there)
        if kernel_loads:
            ours = (GATED_DELTA, GATED_LINEAR, CHANNEL_DELTA)
            backend._loaded.update({(op, "triton"): gated_delta.chunked for op in ours})
        if fla_loads:
            backend._loaded.update({(op, "fla"): gated_delta.chunked for op in (GATED_DELTA, GATED_LINEAR)})
        # None makes an import fail, whatever is installed where the test runs.
        for module in ("dtr.ops.gpu.gated_delta_triton", "dtr.ops.gpu.channel_decay_triton", "fla"):
            monkeypatch.setitem(sys.modules, module, None)

    return set_up


@pytest.mark.parametrize(
    ("there", "model", "name", "reason"),
    [
        ({}, {"head_dim": 64}, "triton", "fastest"),
        ({}, {"head_dim": 80}, "fla", "heads of 16, 32, 64, 128, not of 80"),
        ({"fla": False}, {"head_dim": 80}, "torch", "not of 80; fla is not installed"),
        ({"fla": False}, {"head_dim": 64, "dtype": torch.float16}, "torch", "bfloat16 and float32, not float16"),
    ],
)
def test_what_our_kernel_does_not_take_goes_elsewhere(machine, there, model, name, reason):
    machine(**there)
    chosen = choose_backend("auto", "cuda", **model)
    assert chosen.name == name
    assert reason in chosen.reason
    # Asked for by name it is refused, with what can be taken.
    if name != "triton":
        with pytest.raises(DeviceError, match=r"our kernel takes.*Take auto, fla or torch"):
            choose_backend("triton", "cuda", **model)


def test_each_head_size_gets_its_own_kernel(machine):
    machine(fla=False)
    names = [chosen_backend(GATED_DELTA, "auto", "cuda", head_dim, torch.bfloat16) for head_dim in (64, 80, 64)]
    assert names == ["triton", "torch", "triton"]
    assert chosen_backend(GATED_DELTA, "auto", "cuda", 64, torch.float16) == "torch"


def test_what_was_asked_for_runs_what_it_has(machine):
    """fla stays with its gated linear attention; where a backend has nothing, auto takes what does."""
    machine()
    wanted = {"auto": ["triton", "triton"], "triton": ["triton", "triton"], "fla": ["fla", "triton"]}
    wanted |= {"amx": ["triton", "triton"], "torch": ["torch", "torch"]}
    for requested, names in wanted.items():
        where = (requested, "cuda", 64, torch.bfloat16)
        assert [chosen_backend(op, *where) for op in (GATED_LINEAR, CHANNEL_DELTA)] == names
    where = ("auto", "cuda", 80, torch.bfloat16)
    assert [chosen_backend(op, *where) for op in (GATED_LINEAR, CHANNEL_DELTA)] == ["fla", "torch"]
    assert chosen_backend(CHANNEL_DELTA, "auto", "cpu", 64, torch.bfloat16) == "torch"
    assert backend.backend_of(CHANNEL_DELTA, "fla", "cuda").name == "triton"
    plain = backend.backend_of(None, "triton", "cuda")
    assert (plain.name, plain.reason) == ("torch", "this mixer has plain operations alone")


def test_what_only_our_kernels_fuse_is_fused_where_they_take_it(machine):
    machine()
    backend._loaded.update({(op, "triton"): draw for op in FUSED})
    for requested in ("auto", "triton", "fla"):
        cases = [(torch.bfloat16, dim) for dim in (32, 64, 128)] + [(torch.float32, dim) for dim in (32, 64, 128)]
        names = [chosen_backend(QUADRATIC, requested, "cuda", dim, dtype) for dtype, dim in cases]
        assert names == ["torch", "triton", "torch", "triton", "triton", "torch"]
        assert chosen_backend(CONVOLUTION, requested, "cuda", None, torch.bfloat16) == "triton"
        assert chosen_backend(CONVOLUTION, requested, "cuda", None, torch.float16) == "torch"
        assert chosen_backend(CONVOLUTION, requested, "cpu", None, torch.bfloat16) == "torch"
    assert {chosen_backend(op, "torch", "cuda", 64, torch.bfloat16) for op in FUSED} == {"torch"}
    with pytest.raises(DeviceError, match=r"no fla kernel for short convolution.*triton or torch"):
        choose_backend("fla", "cuda", op=CONVOLUTION)


def test_a_layers_fused_parts_get_what_they_take(machine, monkeypatch):
    """The dispatch with plain forms in the kernels' place: each is called for more than one token without a past."""
    calls = []

    def features(x, weight, cos, sin, *, step_size):
        calls.append("features")
        mix = quadratic_features.mix_of_heads(x, weight, step_size=step_size)
        return rotate_to_unit_length(quadratic_features.quadratic_features(x, mix), cos, sin)

    def convolution(x, taps):
        calls.append("convolution")
        return short_convolution.short_convolution(x, taps, None, None)[0]

    x, weight, taps = torch.randn(2, 9, 3, 8), torch.randn(3, 8, 8), torch.randn(24, 4)
    cos, sin = torch.randn(2, 1, 9, 8).unbind(0)
    wanted = dispatch.rotated_quadratic_features(x, weight, cos, sin, step_size=8.0)
    wanted_rows, wanted_past = dispatch.short_convolution(x.flatten(2), taps, None)
    assert not calls
    monkeypatch.setattr(dispatch, "chosen_backend", lambda *_: "triton")
    backend._loaded.update({(QUADRATIC, "triton"): features, (CONVOLUTION, "triton"): convolution})
    assert torch.equal(dispatch.rotated_quadratic_features(x, weight, cos, sin, step_size=8.0), wanted)
    rows, past = dispatch.short_convolution(x.flatten(2), taps, None)
    assert torch.equal(rows, wanted_rows)
    assert torch.equal(past, wanted_past)
    assert calls == ["features", "convolution"]
    dispatch.rotated_quadratic_features(x[:, :1], weight, cos[:, :1], sin[:, :1], step_size=8.0)
    dispatch.short_convolution(x.flatten(2), taps, past)
    dispatch.short_convolution(x.flatten(2)[:, :2], taps, None)
    assert len(calls) == 2


def test_the_choice_is_no_break_in_a_compiled_graph():
    q, k, v = torch.randn(3, 1, 20, 2, 80).unbind(0)
    g, beta = -torch.rand(1, 20, 2), torch.rand(1, 20, 2)
    compiled = torch.compile(dispatch.gated_delta_rule, backend="eager", fullgraph=True)
    for ours, plain in zip(compiled(q, k, v, g, beta), dispatch.gated_delta_rule(q, k, v, g, beta)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("there", "op", "name", "reason"),
    [
        ({}, GATED_DELTA, "triton", "fastest"),
        ({"kernel_loads": False}, GATED_DELTA, "fla", "does not load"),
        ({"kernel_loads": False, "triton": (3, 6, 0)}, GATED_DELTA, "torch", "on Hopper with triton 3.6.0"),
        ({"kernel_loads": False, "triton": (3, 7, 0)}, GATED_DELTA, "torch", "on Hopper with triton 3.7.0"),
        ({"kernel_loads": False, "triton": (3, 3, 1)}, GATED_DELTA, "fla", "does not load"),
        ({"kernel_loads": False, "triton": (3, 6, 0), "tilelang": True}, GATED_DELTA, "fla", "does not load"),
        ({"kernel_loads": False, "triton": (3, 6, 0), "hopper": False}, GATED_DELTA, "fla", "does not load"),
        ({"kernel_loads": False, "fla": False}, GATED_DELTA, "torch", "fla is not installed"),
        ({"kernel_loads": False, "fla_loads": False}, GATED_DELTA, "torch", "fla does not load (ModuleNotFoundError"),
        ({"triton": None}, GATED_DELTA, "torch", "triton is not installed"),
        ({}, GATED_LINEAR, "triton", "fastest"),
        ({"kernel_loads": False, "triton": (3, 6, 0)}, GATED_LINEAR, "fla", "does not load"),
        ({"kernel_loads": False, "fla": False}, GATED_LINEAR, "torch", "fla is not installed"),
        ({}, CHANNEL_DELTA, "triton", "fastest"),
        ({"kernel_loads": False}, CHANNEL_DELTA, "torch", "does not load"),
    ],
)
def test_auto_takes_the_first_usable(machine, there, op, name, reason):
    machine(**there)
    chosen = choose_backend("auto", "cuda", op=op)
    assert chosen.name == name
    assert reason in chosen.reason


@pytest.mark.parametrize("compiled", [False, True])
def test_two_mixers_in_one_process_each_run_by_their_own_backend(compiled, monkeypatch):
    """In plain and in compiled code, which keeps no choice of another mixer; copies keep their own."""
    from dtr.arch import HeadGeometry
    from dtr.mixers import make_mixer
    from dtr.mixers.base import set_backend
    from dtr.ops.cpu import gated_delta_amx

    def silent(q, k, v, g, beta, *, scale, state_BHKV):
        return torch.zeros_like(v), v.new_zeros(*v.shape[:1], *v.shape[2:], v.shape[-1])

    monkeypatch.setattr(gated_delta_amx, "refusal", lambda: None)
    backend._loaded[GATED_DELTA, "amx"] = silent
    geometry = HeadGeometry(hidden_dim=64, num_heads=1, num_kv_heads=1, head_dim=64)
    mixers = [make_mixer("gated_deltanet", geometry, 0) for _ in range(2)]
    for mixer, name in zip(mixers, ("amx", "torch")):
        torch.nn.init.normal_(mixer.decay_proj.bias)
        set_backend(mixer.bfloat16(), name)
    recur = lambda mixer, hidden, heads: mixer.recur(hidden, *heads, None, None)[0]  # noqa: E731
    if compiled:
        recur = torch.compile(recur, backend="eager", fullgraph=True)
    hidden, heads = torch.randn(1, 5, 64).bfloat16(), torch.randn(3, 1, 5, 1, 64).bfloat16()
    both = [*mixers, copy.deepcopy(mixers[0]), copy.deepcopy(mixers[1])]
    assert [bool(recur(mixer, hidden, heads).any()) for mixer in both] == [False, True, False, True]
    set_backend(mixers, "torch")
    assert recur(mixers[0], hidden, heads).any()
    with pytest.raises(DeviceError, match="needs cuda and the device is cpu"):
        set_backend(mixers, "triton")


def test_the_table_names_functions_that_are_there():
    for (op, name), kernel in backend.KERNELS.items():
        module, function = kernel.function
        if module.startswith("."):
            path = Path(backend.__file__).parent / f"{module[1:].replace('.', '/')}.py"
            assert f"def {function}(" in path.read_text(), (op, name)


def test_auto_on_a_cpu_looks_at_no_library_for_gpus(monkeypatch):
    monkeypatch.setattr(backend, "_probe", None)
    chosen = choose_backend("auto", "cpu", dtype=torch.float32)
    assert (chosen.name, chosen.reason) == ("torch", "our CPU kernel takes bfloat16, not float32")
    assert choose_backend("torch", "cuda").name == "torch"


@pytest.mark.parametrize(
    ("requested", "device", "there", "op", "words"),
    [
        ("fla", "cpu", {}, GATED_DELTA, ["the device is cpu", "Take auto or torch"]),
        ("triton", "cpu", {}, GATED_DELTA, ["the device is cpu"]),
        ("fla", "cuda", {"fla": False}, GATED_DELTA, ["fla is not installed", "Install fla-core"]),
        ("fla", "cuda", {"triton": (3, 6, 0)}, GATED_DELTA, ["Hopper", "Install tilelang"]),
        ("triton", "cuda", {"kernel_loads": False}, GATED_LINEAR, ["does not load"]),
        ("fla", "cuda", {}, CHANNEL_DELTA, ["no fla kernel for channel delta rule", "triton or torch"]),
        ("triton", "cuda", {"kernel_loads": False}, GATED_DELTA, ["does not load"]),
        ("tritn", "cuda", {}, GATED_DELTA, ["Did you mean 'triton'?"]),
    ],
)
def test_a_request_that_cannot_run_is_refused_with_the_remedy(machine, requested, device, there, op, words):
    machine(**there)
    with pytest.raises(DeviceError) as error:
        choose_backend(requested, device, op=op)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_request_that_can_run_is_granted(machine):
    machine()
    assert [choose_backend(name, "cuda").name for name in ("torch", "fla", "triton")] == ["torch", "fla", "triton"]


def test_this_machine_is_probed_without_error():
    there = backend._probe()
    assert there.is_hopper in (True, False)
    assert there.triton_version is None or len(there.triton_version) == 3


def draw(*shape):
    return torch.randn(2, *shape)


def delta_inputs(num_tokens):
    q, k = draw(num_tokens, 3, 8), torch.nn.functional.normalize(draw(num_tokens, 3, 8), dim=-1)
    return [q, k, draw(num_tokens, 3, 4), -draw(num_tokens, 3).abs(), draw(num_tokens, 3).sigmoid()]


def linear_inputs(num_tokens):
    return [*delta_inputs(num_tokens)[:3], -draw(num_tokens, 3, 8).abs()]


OPS = [
    (dispatch.gated_delta_rule, gated_delta, delta_inputs, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    (dispatch.gated_linear_attention, gated_linear, linear_inputs, "fla.ops.gla", "chunk_gla"),
]


@pytest.mark.parametrize(("rule", "op", "make", "module", "function"), OPS, ids=["delta", "linear"])
def test_fla_is_called_with_its_own_names(monkeypatch, rule, op, make, module, function):
    calls = []

    def theirs(*inputs, scale, initial_state, output_final_state):
        calls.append(initial_state.dtype)
        assert output_final_state
        assert all(x.dtype == torch.bfloat16 for x in inputs[:3])
        assert inputs[3].dtype == torch.float32
        return op.chunked(*inputs, scale=scale, state_BHKV=initial_state)

    fake = ModuleType(module)
    setattr(fake, function, theirs)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(dispatch, "chosen_backend", lambda op, requested, *_: requested)
    inputs = [x.bfloat16() for x in make(20)]
    # The mixer may have normalised its keys in float32.
    inputs[1] = inputs[1].float()
    o, last = rule(*inputs, scale=0.5, state_BHKV=draw(3, 8, 4).bfloat16(), backend="fla")
    assert calls == [torch.float32]
    assert o.dtype == torch.bfloat16
    assert last.shape == (2, 3, 8, 4)


@pytest.mark.parametrize(("rule", "op", "make", "module", "function"), OPS, ids=["delta", "linear"])
def test_torch_is_the_chunked_form_and_a_single_token_a_step(monkeypatch, rule, op, make, module, function):
    inputs, state = make(21), draw(3, 8, 4)
    expected, expected_last = op.chunked(*inputs, state_BHKV=state, scale=0.7)
    o, middle = rule(*(x[:, :20] for x in inputs), state_BHKV=state, scale=0.7, backend="torch")
    monkeypatch.setattr(dispatch, "chosen_backend", lambda op, requested, *_: requested)
    # No fla is needed for one token.
    last_o, last = rule(*(x[:, 20:] for x in inputs), state_BHKV=middle, scale=0.7, backend="fla")
    torch.testing.assert_close(torch.cat([o, last_o], dim=1), expected)
    torch.testing.assert_close(last, expected_last)


@pytest.mark.parametrize("op", [GATED_LINEAR, CHANNEL_DELTA])
def test_our_kernel_of_decays_per_channel_gets_one_type_and_the_scale(monkeypatch, op):
    """With the plain forms in its place. A single token with a state takes a step, without a kernel."""
    calls = []

    def ours(q, k, v, g, beta, *, scale, state_BHKV):
        calls.append((q.dtype, k.dtype, v.dtype, g.dtype, scale))
        if beta is None:
            return gated_linear.chunked(q, k, v, g, scale=scale, state_BHKV=state_BHKV)
        return channel_delta.chunked(q, k, v, g, beta, state_BHKV=state_BHKV)

    backend._loaded[op, "triton"] = ours
    monkeypatch.setattr(dispatch, "chosen_backend", lambda op, requested, *_: requested)
    inputs, state = linear_inputs(21), draw(3, 8, 4)
    inputs[2] = inputs[2].bfloat16()
    if op == GATED_LINEAR:
        rule, options = dispatch.gated_linear_attention, {"scale": 0.7}
    else:
        rule, options = dispatch.channel_delta_rule, {}
        inputs.append(draw(21, 3).sigmoid())
    expected, expected_last = rule(*inputs, state_BHKV=state, backend="torch", **options)
    o, middle = rule(*(x[:, :20] for x in inputs), state_BHKV=state, backend="triton", **options)
    last_o, last = rule(*(x[:, 20:] for x in inputs), state_BHKV=middle, backend="triton", **options)
    assert calls == [(torch.bfloat16,) * 3 + (torch.float32, options.get("scale", 1.0))]
    torch.testing.assert_close(torch.cat([o, last_o], dim=1), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(last, expected_last, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["gated_linear_attention", "kimi_delta_attention"])
def test_mixers_bound_their_decay_where_kernels_do(kind, monkeypatch):
    """Every gate shut: each mixer's log decay is the bound, whatever its formula gives."""
    from dtr.arch import HeadGeometry
    from dtr.mixers import gated_linear_attention, kimi_delta_attention, make_mixer

    seen = []

    def spy(q, k, v, g, *rest, state_BHKV, **options):
        seen.append(g)
        return v, state_BHKV

    monkeypatch.setattr(gated_linear_attention, "gated_linear_attention", spy)
    monkeypatch.setattr(kimi_delta_attention, "channel_delta_rule", spy)
    mixer = make_mixer(kind, HeadGeometry(hidden_dim=16, num_heads=2, num_kv_heads=1, head_dim=8), 0)
    torch.nn.init.constant_(mixer.decay_up_proj.bias, 1e3 if kind == "kimi_delta_attention" else -1e3)
    torch.nn.init.zeros_(mixer.decay_up_proj.weight)
    heads = torch.randn(3, 1, 5, 2, 8)
    mixer.recur(torch.randn(1, 5, 16), *heads, None, None)
    assert (seen[0] == MIN_LOG_DECAY).all()
