"""Blockwise local distillation: it learns, layers stay independent, nothing is lost, everything repeats."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CHEAP, byte_tokenizer, pico_teacher, token_blocks

from dtr.arch import FAMILIES, capture_attention, decoder_layers
from dtr.distillation import loop, trainer
from dtr.distillation.bank import load_bank
from dtr.distillation.students import Students, squared_sums
from dtr.distillation.trainer import distill
from dtr.errors import BankError, DeviceError, Interrupted, ModelError, RecipeError
from dtr.mixers import MIXERS, mixer_from_teacher
from dtr.mixers.base import set_backend
from dtr.teacher import as_teacher

BASE = {"num_tokens": 8 * 32 * 30, "batch_size": 8, "learning_rate": 5e-3, "seed": 3}
SETTINGS = BASE | {"options": CHEAP}


@pytest.fixture(scope="module")
def teacher():
    return pico_teacher()


@pytest.fixture(scope="module")
def blocks():
    return token_blocks()


@pytest.fixture(scope="module")
def clean(teacher, blocks):
    """What a run with `SETTINGS` gives that nothing disturbs; only read it."""
    return distill(teacher, blocks, **SETTINGS)


def weights_of(bank):
    return {f"{i}.{n}": p for i, mixer in bank.mixers.items() for n, p in mixer.named_parameters()}


def same_weights(one, other):
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_error_falls_in_every_layer(kind, teacher, blocks):
    # A window that sees all of a block would have nothing to learn, and any starts near its best.
    options, share = ({"window": 4, "sinks": 1}, 1.0) if kind == "sliding_window" else ({}, 0.95)
    if kind == "hedgehog":
        # It starts near attention that looks everywhere alike, as that of a random model does.
        teacher = pico_teacher()
        with torch.no_grad():
            for layer in decoder_layers(teacher.model):
                layer.self_attn.q_proj.weight.mul_(4)
    settings = BASE | {"num_tokens": 8 * 32 * 20}
    bank = distill(teacher, blocks, mixer=kind, options=options, layers=[0, 3], **settings)
    assert bank.layers == [0, 3]
    for layer in bank.layers:
        assert bank.nmse_after[layer] < share * bank.nmse_before[layer]
    assert [point["num_tokens"] for point in bank.curve] == sorted(point["num_tokens"] for point in bank.curve)
    assert bank.curve[-1]["num_tokens"] == settings["num_tokens"]
    assert bank.curve[-1]["mean_nmse"] == pytest.approx(bank.mean_nmse)


def test_a_bank_is_trained_and_read_by_the_backend_that_is_named(teacher, blocks, tmp_path):
    """Two of one process do not touch each other, and what is kept of the first is not what runs in the second."""
    settings = SETTINGS | {"num_tokens": 256}
    with pytest.raises(DeviceError, match="triton needs cuda"):
        distill(teacher, blocks, backend="triton", **settings)
    with pytest.raises(DeviceError, match="Did you mean 'torch'"):
        distill(teacher, blocks, backend="troch", **settings)
    plain, auto = (distill(teacher, blocks, backend=name, **settings) for name in ("torch", "auto"))
    assert {mixer.backend for mixer in plain.in_dtype(torch.float32).values()} == {"torch"}
    assert {mixer.backend for mixer in auto.mixers.values()} == {"auto"}
    set_backend(plain.mixers.values(), "auto")
    assert {mixer.backend for mixer in plain.in_dtype(torch.float32).values()} == {"auto"}
    plain.save(tmp_path)
    read = load_bank(tmp_path, teacher=teacher, backend="torch")
    assert {mixer.backend for mixer in read.mixers.values()} == {"torch"}
    with pytest.raises(DeviceError, match="triton needs cuda"):
        load_bank(tmp_path, teacher=teacher, backend="triton")


def test_the_teacher_is_not_changed(blocks):
    teacher = pico_teacher()
    before = {name: weight.clone() for name, weight in teacher.model.state_dict().items()}
    distill(teacher, blocks, **SETTINGS | {"num_tokens": 1024})
    after = teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(layer.self_attn._forward_hooks for layer in decoder_layers(teacher.model))


def test_a_layer_learns_the_same_alone_or_in_company(teacher, blocks):
    company = distill(teacher, blocks, **SETTINGS | {"num_tokens": 2048})
    alone = distill(teacher, blocks, layers=[2], **SETTINGS | {"num_tokens": 2048})
    for name, weight in alone.mixers[2].named_parameters():
        torch.testing.assert_close(weight, company.mixers[2].get_parameter(name), rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_bank_and_another_does_not(teacher, blocks):
    settings = SETTINGS | {"num_tokens": 2048}
    first = distill(teacher, blocks, **settings)
    assert same_weights(first, distill(teacher, blocks, **settings))
    assert not same_weights(first, distill(teacher, blocks, **settings | {"seed": 4}))


@pytest.mark.parametrize("stop_at", [1, 20, None])
def test_an_interrupted_run_resumes_to_the_same_bits(stop_at, clean, teacher, blocks, tmp_path, monkeypatch):
    # By the clock, where no steps are given.
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "state.safetensors"
    steps = 0

    def batch(step, **options):
        nonlocal steps
        steps += 1
        if steps > (stop_at or 13) + 1:
            raise KeyboardInterrupt
        return blocks.batch(step, **options)

    dying = token_blocks()
    object.__setattr__(dying, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, dying, checkpoint=checkpoint, checkpoint_every_steps=stop_at, **SETTINGS)
    assert checkpoint.exists()
    resumed = distill(teacher, blocks, checkpoint=checkpoint, **SETTINGS)
    assert same_weights(clean, resumed)
    assert resumed.nmse_after == clean.nmse_after
    assert [p["num_tokens"] for p in resumed.curve] == [p["num_tokens"] for p in clean.curve]


def test_ctrl_c_saves_and_says_how_to_go_on(clean, teacher, blocks, tmp_path):
    def press(event):
        if event["event"] == "distill" and event["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted, match=r"after step 1\d of 30.*--resume"):
        distill(teacher, blocks, checkpoint=checkpoint, on_event=press, **SETTINGS)
    assert same_weights(clean, distill(teacher, blocks, checkpoint=checkpoint, **SETTINGS))


def test_a_teacher_without_finite_outputs_is_told_before_training(blocks):
    teacher = pico_teacher()
    teacher.model.model.layers[2].self_attn.o_proj.weight.fill_(1e30)
    with pytest.raises(ModelError, match="attention of layer 2 that gives no finite numbers"):
        distill(teacher, blocks, **SETTINGS)


def test_a_checkpoint_of_other_settings_is_refused(teacher, blocks, tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    settings = SETTINGS | {"num_tokens": 1024}
    distill(teacher, blocks, checkpoint=checkpoint, **settings)
    with pytest.raises(BankError, match=r"learning_rate 0.005.*learning_rate 0.001"):
        distill(teacher, blocks, checkpoint=checkpoint, **settings | {"learning_rate": 1e-3})
    good = checkpoint.read_bytes()
    # In the header, in the facts and among the weights: whatever changes is told.
    for at in [*range(0, 8 * 2000, 1601), *range(8 * 2000, 8 * len(good), len(good))]:
        damaged = bytearray(good)
        damaged[at // 8] ^= 1 << at % 8
        checkpoint.write_bytes(damaged)
        with pytest.raises(BankError, match="checkpoint"):
            distill(teacher, blocks, checkpoint=checkpoint, **settings)
    checkpoint.write_bytes(good[:1000])
    with pytest.raises(BankError, match="checkpoint"):
        distill(teacher, blocks, checkpoint=checkpoint, **settings)


def spoil(blocks, teacher, monkeypatch, damage, at_step):
    """Blocks that call `damage(mixers)` before the batch of a step is drawn."""
    held = {}

    def keep(*args):
        held.update(start(*args))
        return held

    start = trainer.start_mixers
    monkeypatch.setattr(trainer, "start_mixers", keep)
    spoiled = token_blocks()

    def batch(step, **options):
        if step == at_step:
            with torch.no_grad():
                damage(held)
        return blocks.batch(step, **options)

    object.__setattr__(spoiled, "batch", batch)
    return spoiled


def weights_at(teacher, blocks, layer, step):
    """A layer's weights after `step` steps of a run that nothing went wrong in."""
    found = {}

    def batch(number, **options):
        if number == step:
            found.update({n: p.detach().clone() for n, p in held[layer].named_parameters()})
        return blocks.batch(number, **options)

    watched = token_blocks()
    object.__setattr__(watched, "batch", batch)
    start, held = trainer.start_mixers, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "start_mixers", lambda *args: held.update(start(*args)) or held)
        distill(teacher, watched, **SETTINGS)
    return found


@pytest.fixture(scope="module")
def good(teacher, blocks):
    """Weights of layer 1 after ten steps of a run that nothing disturbs."""
    return weights_at(teacher, blocks, 1, 10)


@pytest.mark.parametrize(
    ("damage", "stopped_after", "why"),
    [
        (lambda mixers: mixers[1].q_proj.weight.fill_(torch.nan), 20, "not a number"),
        (lambda mixers: mixers[1].o_proj.weight.mul_(100), 30, "far behind"),
    ],
    ids=["not a number", "diverged"],
)
def test_a_layer_that_goes_wrong_is_stopped_alone(
    damage, stopped_after, why, clean, good, teacher, blocks, monkeypatch, tmp_path
):
    monkeypatch.setattr("dtr.distillation.divergence_guard.PATIENCE", 2)
    # Losses are looked at after steps 10 and 12; the second proves the weights of the first.
    events, checkpoint = [], tmp_path / "state.safetensors"
    spoiled = spoil(blocks, teacher, monkeypatch, damage, at_step=12)
    bank = distill(
        teacher, spoiled, on_event=events.append, checkpoint=checkpoint, checkpoint_every_steps=7, **SETTINGS
    )
    assert bank.stopped[1]["num_tokens"] <= stopped_after * 8 * 32
    assert list(bank.stopped) == [1]
    assert why in bank.stopped[1]["why"]
    assert [e["layer"] for e in events if e["event"] == "stopped"] == [1]
    assert all(torch.equal(good[name], weight) for name, weight in bank.mixers[1].named_parameters())
    for layer in (0, 2, 3):
        for name, weight in bank.mixers[layer].named_parameters():
            torch.testing.assert_close(weight, clean.mixers[layer].get_parameter(name), rtol=0, atol=1e-6)
    assert all(math.isfinite(value) for value in bank.nmse_after.values())
    bank.save(tmp_path / "bank")
    assert load_bank(tmp_path / "bank").stopped == bank.stopped
    # What was stopped stays stopped in a run that goes on.
    monkeypatch.undo()
    resumed = distill(teacher, blocks, checkpoint=checkpoint, **SETTINGS)
    assert resumed.stopped == bank.stopped
    assert same_weights(resumed, bank)


def test_a_layer_that_was_stopped_stays_so_after_an_interruption(teacher, blocks, monkeypatch, tmp_path):
    damage = lambda mixers: mixers[2].o_proj.weight.fill_(torch.inf)  # noqa: E731
    whole = distill(teacher, spoil(blocks, teacher, monkeypatch, damage, at_step=3), **SETTINGS)

    def press(event):
        if event["event"] == "distill" and event["step"] == 20:
            os.kill(os.getpid(), signal.SIGINT)

    checkpoint = tmp_path / "state.safetensors"
    monkeypatch.undo()
    spoiled = spoil(blocks, teacher, monkeypatch, damage, at_step=3)
    with pytest.raises(Interrupted):
        distill(teacher, spoiled, checkpoint=checkpoint, on_event=press, **SETTINGS)
    monkeypatch.undo()
    resumed = distill(teacher, blocks, checkpoint=checkpoint, **SETTINGS)
    assert list(whole.stopped) == list(resumed.stopped) == [2]
    assert same_weights(whole, resumed)


def test_what_the_guard_has_seen_is_resumed_too(teacher, blocks, monkeypatch, tmp_path):
    """Stopped between a layer's first bad look and the one that gives it up: its best loss, count and weights go on."""
    monkeypatch.setattr("dtr.distillation.divergence_guard.PATIENCE", 2)
    checkpoint = tmp_path / "state.safetensors"
    damage = lambda mixers: mixers[1].o_proj.weight.mul_(100)  # noqa: E731

    def spoiled(last=99):
        text = spoil(blocks, teacher, monkeypatch, damage, at_step=12)
        batch = text.batch

        def until(step, **options):
            if step > last:
                raise KeyboardInterrupt
            return batch(step, **options)

        object.__setattr__(text, "batch", until)
        return text

    whole = distill(teacher, spoiled(), **SETTINGS)
    # Losses are looked at after steps 15 and 18.
    assert whole.stopped[1]["num_tokens"] == 18 * 8 * 32
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, spoiled(last=16), checkpoint=checkpoint, checkpoint_every_steps=16, **SETTINGS)
    saved = checkpoint.read_bytes()
    resumed = distill(teacher, blocks, checkpoint=checkpoint, **SETTINGS)
    assert resumed.stopped == whole.stopped
    assert same_weights(resumed, whole)

    # A checkpoint of an earlier version has nothing of this; what is then kept are the weights in it.
    checkpoint.write_bytes(saved)
    with safe_open(checkpoint, framework="pt") as file:
        facts = json.loads(file.metadata()["state"])
        assert facts.pop("guard")["1"]["num_bad"] == 1
        old = {n: file.get_tensor(n) for n in file.keys() if not n.startswith(("proved.", "on_trial."))}  # noqa: SIM118
    save_file(old, checkpoint, metadata={"state": json.dumps(facts)})
    resumed = distill(teacher, blocks, checkpoint=checkpoint, **SETTINGS)
    assert all(torch.equal(w, whole.mixers[2].get_parameter(n)) for n, w in resumed.mixers[2].named_parameters())


def test_nothing_is_made_where_every_layer_fails(teacher, blocks, monkeypatch):
    damage = lambda mixers: [mixer.o_proj.weight.fill_(torch.nan) for mixer in mixers.values()]  # noqa: E731
    with pytest.raises(RecipeError, match=r"learning_rate.*every layer failed"):
        distill(teacher, spoil(blocks, teacher, monkeypatch, damage, at_step=3), **SETTINGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_recorded_step_leaves_out_a_stopped_layer(blocks):
    model = pico_teacher().model.to("cuda", torch.bfloat16)
    teacher = as_teacher(model, byte_tokenizer(), source="pico")
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, attention[i]) for i in range(3)}
    students = Students(teacher, mixers, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, fast=True)
    for step in range(6):
        assert len(students.train_step(blocks.batch(step, batch_size=8, seed=0), 1e-3)) == 3
    students.stop(1)
    before = {i: mixer.o_proj.weight.detach().clone() for i, mixer in mixers.items()}
    for step in range(6, 12):
        losses = students.train_step(blocks.batch(step, batch_size=8, seed=0), 1e-3)
    assert len(losses) == 2
    assert torch.isfinite(losses).all()
    assert [torch.equal(before[i], mixers[i].o_proj.weight) for i in range(3)] == [False, True, False]
    assert students.refusal is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_and_recorded_step_learns_the_same(blocks, family):
    """The teacher's layers are compiled too; a library that makes another mask while recording would break the step."""
    model = pico_teacher(family).model.to("cuda", torch.bfloat16)
    teacher = as_teacher(model, byte_tokenizer(), source="pico")
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]

    def losses_of(fast):
        torch.manual_seed(0)
        mixers = {i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, a) for i, a in enumerate(attention)}
        students = Students(teacher, mixers, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, fast=fast)
        losses = [students.train_step(blocks.batch(i, batch_size=8, seed=0), 1e-3).clone() for i in range(8)]
        assert not fast or (students._layers is not None and students.is_compiled and students.refusal is None)
        return torch.stack(losses)

    torch.testing.assert_close(losses_of(True), losses_of(False), rtol=2e-2, atol=1e-3)


def test_the_loss_is_normalised_and_differentiable(teacher):
    layer = decoder_layers(teacher.model)[1]
    mixer = mixer_from_teacher("gated_deltanet", teacher.geometry, 1, layer.self_attn)
    hidden, rotary = torch.randn(2, 9, 32), teacher.model.model.rotary_emb(torch.randn(2, 9, 32), torch.arange(9)[None])
    target = torch.randn(2, 9, 32)
    torch.nn.init.zeros_(mixer.o_proj.weight)
    error, power = squared_sums(mixer, hidden, rotary, target)
    assert (error / power).item() == pytest.approx(1.0)
    error, _ = squared_sums(mixer, hidden, rotary, 100 * target)
    error.backward()
    assert mixer.o_proj.weight.grad.abs().sum() > 0


def test_held_out_error_is_the_ratio_of_sums(teacher, blocks):
    attention = [layer.self_attn for layer in decoder_layers(teacher.model)]
    mixers = {i: mixer_from_teacher("gated_deltanet", teacher.geometry, i, attention[i]) for i in (0, 3)}
    options = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0, "fast": False}
    students = Students(teacher, mixers, **options)
    whole = students.held_out_nmse(blocks.held_out, 100)
    assert students.held_out_nmse(blocks.held_out, 3) == pytest.approx(whole, rel=1e-5)


def test_layers_out_of_range_are_refused(teacher, blocks):
    with pytest.raises(RecipeError, match="0 to 3"):
        distill(teacher, blocks, layers=[0, 4], **SETTINGS)


class TestBank:
    @pytest.fixture(scope="class")
    def bank(self, teacher, blocks):
        return distill(teacher, blocks, **SETTINGS | {"num_tokens": 512})

    def test_saved_and_loaded_is_the_same(self, bank, teacher, tmp_path):
        bank.save(tmp_path)
        loaded = load_bank(tmp_path, teacher=teacher)
        assert same_weights(bank, loaded)
        assert loaded.fingerprint == bank.fingerprint
        assert (loaded.nmse_after, loaded.curve, loaded.identity) == (bank.nmse_after, bank.curve, bank.identity)

    def test_damage_is_told(self, bank, teacher, tmp_path):
        with pytest.raises(BankError, match=r"bank\.json"):
            load_bank(tmp_path / "nothing")
        bank.save(tmp_path)
        tensors = tmp_path / "mixers.safetensors"
        good = tensors.read_bytes()
        tensors.write_bytes(good[:-1000])
        with pytest.raises(BankError, match="dtr distill"):
            load_bank(tmp_path)
        tensors.write_bytes(good[:-4] + b"\1\2\3\4")
        with pytest.raises(BankError, match="do not match"):
            load_bank(tmp_path)
        tensors.write_bytes(good)
        good = (tmp_path / "bank.json").read_text()
        (tmp_path / "bank.json").write_text(good.replace('"num_tokens": 512', '"num_tokens": 513', 1))
        with pytest.raises(BankError, match="does not match the checksum"):
            load_bank(tmp_path)
        # As an earlier version wrote it, or a later one.
        facts = {key: value for key, value in json.loads(good).items() if key not in ("sealed", "crc32")}
        (tmp_path / "bank.json").write_text(json.dumps(facts))
        assert load_bank(tmp_path).identity == bank.identity
        (tmp_path / "bank.json").write_text(json.dumps(facts | {"format": 99}))
        with pytest.raises(BankError, match="format 99"):
            load_bank(tmp_path)

    def test_another_teacher_is_refused(self, bank, tmp_path):
        bank.save(tmp_path)
        with pytest.raises(BankError, match="one of pico-llama"):
            load_bank(tmp_path, teacher=pico_teacher(seed=1))


def test_the_golden_curve(teacher, blocks):
    """A change of this curve is a change of the method: it needs a reason in the commit, and `golden/` a new file."""
    golden = json.loads((Path(__file__).parent / "golden" / "distil_curve.json").read_text())
    for kind, expected in golden.items():
        bank = distill(teacher, blocks, mixer=kind, options=CHEAP, **BASE)
        curve = [point["mean_nmse"] for point in bank.curve]
        assert curve == pytest.approx(expected, rel=1e-3), kind


def test_a_refit_is_the_ridge_solution_and_never_hurts_where_it_is_chosen(blocks):
    teacher = pico_teacher()
    plain = distill(teacher, blocks, **SETTINGS)
    refit = distill(teacher, blocks, refit_tokens=8 * 32 * 20, **SETTINGS)
    students = Students(teacher, plain.mixers, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, fast=False)
    again = Students(teacher, refit.mixers, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, fast=False)
    chosen_on = blocks.held_out[::2]
    before, after = students.held_out_nmse(chosen_on, 8), again.held_out_nmse(chosen_on, 8)
    assert all(after[i] <= before[i] + 1e-6 for i in range(4))
    assert any(refit.identity["ridges"].values())
    # Against torch's own least squares, on the same rows with the ridge as further rows.
    layer = next(i for i, ridge in refit.identity["ridges"].items() if ridge)
    ridge, mixer = refit.identity["ridges"][layer], plain.mixers[layer]
    features, targets = [], []
    # The first token of a block does not come out of the projection.
    hook = mixer.o_proj.register_forward_pre_hook(lambda _, args: features.append(args[0][:, 1:].flatten(0, 1)))

    def visit(_index, hidden, rotary, target):
        mixer(hidden, rotary)
        targets.append(target[:, 1:].flatten(0, 1))

    with torch.no_grad(), capture_attention(teacher.model, [layer], visit):
        for step in range(plain.num_steps, plain.num_steps + 20):
            teacher.model.model(blocks.batch(step, batch_size=8, seed=SETTINGS["seed"]))
    hook.remove()
    f, y, w = torch.cat(features).double(), torch.cat(targets).double(), mixer.o_proj.weight.detach().double()
    weight = (ridge * f.square().sum(0).mean()).sqrt()
    rows = torch.cat([f, weight * torch.eye(f.shape[1], dtype=torch.float64)]), torch.cat([y, weight * w.T])
    expected = torch.linalg.lstsq(*rows).solution.T
    torch.testing.assert_close(refit.mixers[layer].o_proj.weight.double(), expected, rtol=1e-3, atol=1e-4)
