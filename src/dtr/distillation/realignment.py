"""A second, short distillation of the swapped layers, inside the hybrid that search has found.

In the main distillation every layer sees the teacher's own hidden states; in the hybrid it sees what the swapped layers
below have made of them. Here teacher and hybrid read the same text side by side, and each swapped layer learns to give,
on the hybrid's hidden state, what the teacher's attention of that layer gives on the teacher's. The loss stays local:
no gradient crosses layers. This is no part of "Distill-then-Replace" (arXiv 2601.11667), so it is reported apart.

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtr.arch import capture_attention, make_runner, with_mixer
from dtr.backbone.probe import Call, first_of
from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank
from dtr.distillation.loop import memory_advice, train
from dtr.distillation.start import start_students
from dtr.distillation.state import TrainingState
from dtr.distributed import current_world
from dtr.mixers.base import Mixer
from dtr.mixers.stand_in import StandIn
from dtr.teacher import Teacher

NOT_OF_DISTILLATION = frozenset(
    {"num_tokens", "seq_len_tokens", "learning_rate", "refit_tokens", "layers", "segment_tokens", "short_fraction"}
)
"""Settings of `distill` that `realign` does not take over: it has its own, or none."""


class HybridPass:
    """One pass of teacher and hybrid side by side, layer by layer, so that only one layer's states are alive.

    Args:
        teacher: whole on its device.
        mixers: those of the hybrid, by number; the hybrid is always as their weights are now.
    """

    def __init__(self, teacher: Teacher, mixers: Mapping[int, Mixer]) -> None:
        self._model = teacher.model
        self._runner = make_runner(teacher.model)
        self._number = {mixer.layer_idx: number for number, mixer in mixers.items()}
        amp = torch.autocast(teacher.device.type, torch.bfloat16, enabled=teacher.dtype != torch.float32)
        self._slots = {mixer.layer_idx: _Slot(mixer, amp) for mixer in mixers.values()}
        self._swapped = {index: with_mixer(self._runner.layers[index], slot) for index, slot in self._slots.items()}

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, numbers: list[int], visit: Any) -> None:
        """Run (B, T) token ids and call `visit(number, hidden_BTD, rotary, target_BTD)` for the mixers in `numbers`."""
        if not (len(input_ids) and numbers):
            return
        batch = self._runner.prepare_for_recording(input_ids)
        theirs = ours = batch.hidden_BTD
        targets: dict[int, torch.Tensor] = {}
        last = max(index for index, number in self._number.items() if number in numbers)

        def keep(index: int, _hidden: torch.Tensor, _rotary: Any, target: torch.Tensor) -> None:
            targets[index] = target

        with capture_attention(self._model, list(self._slots), keep):
            for index, layer in enumerate(self._runner.layers[: last + 1]):
                after = self._runner.run_layer(index, layer, theirs, batch)
                if index in self._swapped:
                    ours = self._runner.run_layer(index, self._swapped[index], ours, batch)
                    if self._number[index] in numbers:
                        visit(self._number[index], *self._slots[index].seen, targets.pop(index))
                else:
                    # Below the first swapped layer the two are one.
                    ours = after if ours is theirs else self._runner.run_layer(index, layer, ours, batch)
                theirs = after


class _Slot(nn.Module):
    """Stands where an attention was: remembers what it is given and answers as its mixer does."""

    def __init__(self, mixer: Mixer, amp: Any) -> None:
        super().__init__()
        self._mixer, self._amp = mixer, amp
        self.place = getattr(mixer, "place", "self_attn")
        self.seen: tuple[torch.Tensor, Any] = (torch.empty(0), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._mixer, StandIn):
            call = Call(args, kwargs)
            self.seen = call.hidden, call
            with self._amp:
                out = self._mixer(*args, **kwargs)
            mixed = first_of(out).to(call.hidden.dtype)
            return (mixed, *out[1:]) if isinstance(out, tuple) else mixed
        self.seen = kwargs["hidden_states"], kwargs["position_embeddings"]
        with self._amp:
            out, _ = self._mixer(*self.seen)
        return out.to(self.seen[0].dtype), None


def realign(
    teacher: Teacher,
    bank: MixerBank,
    text: Text,
    numbers: Sequence[int],
    *,
    num_tokens: int,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    warmup_fraction: float = 0.05,
    final_lr_fraction: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every_steps: int | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> MixerBank:
    """Train copies of some of a bank's mixers on the hidden states of the hybrid that they make together.

    Args:
        teacher: what the bank was made from.
        bank: stays as it is.
        text: token blocks; training goes on where that of the bank has ended.
        numbers: the mixers that are swapped in.
        num_tokens: budget.
        learning_rate: peak rate; the other settings are those of `distill`.
        checkpoint: safetensors file for the state; if it is there, training goes on from it.

    Returns:
        a bank of these mixers alone. Its errors are those on the hybrid's hidden states, before and after.

    Raises:
        BankError, DeviceError, Interrupted: as `distill`.
    """
    identity = {
        "bank": bank.fingerprint,
        "text": text.fingerprint,
        "layers": sorted(numbers),
        "num_tokens": num_tokens,
        "seq_len_tokens": text.seq_len_tokens,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_fraction": warmup_fraction,
        "final_lr_fraction": final_lr_fraction,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
    }
    realigned, world = _start_bank(bank, identity), current_world()
    students = start_students(teacher, realigned, world, run_pass=HybridPass(teacher, realigned.mixers))
    state = TrainingState(realigned, students, text, Path(checkpoint) if checkpoint else None, world)
    with memory_advice(batch_size, text.seq_len_tokens):
        train(
            realigned,
            students,
            state,
            text,
            first_step=math.ceil(bank.num_tokens / (batch_size * text.seq_len_tokens)),
            checkpoint_every_steps=checkpoint_every_steps,
            emit=_own_events(on_event),
            world=world,
        )
    return realigned


def _start_bank(bank: MixerBank, identity: dict[str, Any]) -> MixerBank:
    """Copies of a bank's mixers for the layers that the identity of a realignment names, and no record yet."""
    mixers = {number: copy.deepcopy(bank.mixers[number]) for number in identity["layers"]}
    for mixer in mixers.values():
        # Several ranks leave their last gradients behind.
        mixer.zero_grad()
    return replace(
        bank,
        mixers=mixers,
        identity=identity,
        nmse_before={},
        nmse_after={},
        curve=[],
        stopped={},
        num_tokens=identity["num_tokens"],
        num_steps=math.ceil(identity["num_tokens"] / (identity["batch_size"] * identity["seq_len_tokens"])),
        seconds=0.0,
    )


def _own_events(listener: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
    """Events of the loop under names of this stage: distill becomes realign, nmse becomes realign_nmse."""

    def emit(event: dict[str, Any]) -> None:
        if listener is not None:
            name = "realign" if event["event"] == "distill" else f"realign_{event['event']}"
            listener({**event, "event": name})

    return emit
