"""Compiling the students' step: when it is done, that it learns the same, and what happens where it cannot be."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import pico_teacher, token_blocks

from dtr import arch
from dtr.arch import decoder_layers
from dtr.distillation import compiled
from dtr.distillation.compiled import Compiled, CompiledLayers, pays
from dtr.distillation.students import Students
from dtr.distillation.trainer import distill
from dtr.ops import gated_delta

SETTINGS = {"num_tokens": 8 * 32 * 6, "batch_size": 8, "learning_rate": 5e-3, "seed": 3}


def start_students_of(teacher):
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0, "fast": False}
    return Students(teacher, {}, **settings)


def test_a_cpu_compiles_what_takes_minutes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pays(gpu, num_parameters=1, num_tokens=1)
    # SmolLM2's 30 layers: the demo's 90k tokens, and a smoke test.
    assert pays(cpu, num_parameters=50_000_000, num_tokens=200_000)
    # The demo is over sooner without.
    assert not pays(cpu, num_parameters=50_000_000, num_tokens=90_000)


def test_a_step_whose_teacher_is_not_compiled_is_not_called_compiled(monkeypatch):
    teacher = pico_teacher()
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0}
    students = Students(teacher, {}, **settings, fast=True)
    assert students.is_compiled
    students._layers._forwards[type(decoder_layers(teacher.model)[0].mlp)].refusal = "no compiler"
    assert not students.is_compiled
    assert not Students(teacher, {}, **settings, fast=False).is_compiled


def test_masks_are_made_before_a_step_is_recorded(monkeypatch):
    """While a stream is captured transformers makes a mask where it otherwise passes none."""
    teacher, made = pico_teacher(), []
    make = arch.create_causal_mask
    monkeypatch.setattr(arch, "create_causal_mask", lambda **given: made.append(1) or make(**given))
    students = start_students_of(teacher)
    ids = token_blocks().train
    blocks = [torch.stack([ids[i + j] for j in range(4)]).long() for i in (0, 4)]
    plain = teacher.model.model(input_ids=blocks[1], output_hidden_states=True).hidden_states
    first = students.teacher_forward(blocks[0])
    last = students.teacher_forward(blocks[1])
    assert made == [1], "once for a shape"
    assert torch.equal(teacher.model.model.norm(last), plain[-1])
    assert not torch.equal(first, last)
    students.teacher_forward(blocks[1][:2])
    assert made == [1, 1]


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    calls = []

    def refusing(function, **_):
        def fail(*_):
            calls.append("compiled")
            raise torch._dynamo.exc.BackendCompilerFailed(function, RuntimeError("no C++ compiler"), None)

        return fail

    monkeypatch.setattr(torch, "compile", refusing)
    step = Compiled(lambda x: x + 1)
    with pytest.warns(UserWarning, match=r"not compiled.*no C\+\+ compiler"):
        assert step(1) == 2
    assert step(2) == 3
    assert calls == ["compiled"], "tried once"
    assert "no C++ compiler" in step.refusal


def test_an_error_of_ours_is_not_taken_for_the_compilers():
    step = Compiled(lambda x: x.no_such_method())
    # The compiler of torch 2.11 wraps it in an error of its own.
    with pytest.raises((AttributeError, torch._dynamo.exc.InternalTorchDynamoError), match="no_such_method"):
        step(torch.ones(2))


def test_layers_are_as_they_were_after_running_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = pico_teacher().model
    layers, ids = CompiledLayers(model), torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits
    kept = {name: dict(vars(part)) for name, part in model.named_modules()}

    def stop_inside() -> None:
        with layers.compiled():
            assert torch.equal(model(input_ids=ids).logits, expected)
            assert "forward" in vars(model.model.layers[1].mlp)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_inside()
    assert {name: dict(vars(part)) for name, part in model.named_modules()} == kept


# Few layers and one compilation, as g++ takes most of it; `make slow` compiles a whole model, and twice.
@pytest.mark.parametrize(
    ("num_layers", "num_times"), [(1, 1), pytest.param(4, 2, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_the_compiled_step_learns_the_same(num_layers, num_times, monkeypatch):
    teacher, blocks = pico_teacher(num_layers=num_layers), token_blocks()
    plain = distill(teacher, blocks, **SETTINGS)
    monkeypatch.setattr(compiled, "CPU_PARAMETER_TOKENS", 0)
    ours, *again = (distill(teacher, blocks, **SETTINGS) for _ in range(num_times))
    assert ours.mean_nmse == pytest.approx(plain.mean_nmse, rel=1e-3)
    assert all(bank.fingerprint == ours.fingerprint for bank in again)
    for number, mixer in ours.mixers.items():
        for (name, weight), other in zip(mixer.named_parameters(), plain.mixers[number].parameters()):
            torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_gradients_in_bfloat16_are_those_of_the_eager_rule():
    shape = (1, 128, 2, 16)
    q, k = (torch.nn.functional.normalize(torch.randn(shape), dim=-1).bfloat16() for _ in range(2))
    inputs = q, k, torch.randn(shape).bfloat16(), -torch.rand(shape[:3]), torch.rand(shape[:3])
    inputs = [x.requires_grad_() for x in inputs]

    def loss(*tensors):
        return gated_delta.chunked(*tensors, scale=1.0)[0].float().square().sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, dynamic=False)(*inputs), inputs)
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours.float(), eager.float(), rtol=5e-2, atol=5e-2 * eager.abs().max().item())
