"""All layers' students: their losses inside the teacher's pass, their gradients, and one optimizer over them.

Each student sees the input of its attention and learns its output, `MSE / mean(o^2)`; no gradient crosses layers
(blockwise local distillation, arXiv 2601.11667, section 3.1). A student's forward and backward run as soon as its
layer has run, so that only the activations of one layer, on a GPU of a few (`lanes.py`), are alive at a time.

With several processes either each takes a part of every batch (`data`: gradients are added up) or each trains a part
of the layers (`layers`: nothing is exchanged).

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from dtr.allocation import keep_freed_memory
from dtr.arch import make_runner, run_body
from dtr.distillation.compiled import Compiled, CompiledLayers
from dtr.distillation.exchange import GradientExchange
from dtr.distillation.lanes import Lanes
from dtr.distillation.replay import Replay
from dtr.distillation.targets import capture_targets
from dtr.distributed import World
from dtr.mixers.base import Mixer
from dtr.teacher import Teacher

ParallelKind = Literal["data", "layers"]
Pass = Callable[[torch.Tensor, list[int], Any], None]
"""Runs (B, T) token ids and calls `visit(index, hidden_BTD, (cos, sin), target_BTD)` for each of the named mixers."""


def squared_sums(
    mixer: nn.Module, hidden_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], target_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of squared errors of the mixer's output, and sum of squares of the target; their ratio is the loss.

    Both are sums so that they can be added up over parts of a batch: a ratio of 1 is what an output of zeros gets.
    """
    out, _ = mixer(hidden_BTD, rotary)
    target = target_BTD.float()
    # Each one pass over memory, and one more backward.
    return F.mse_loss(out.float(), target, reduction="sum"), torch.linalg.vector_norm(target).square()


def cut_in_segments(
    num_tokens: int, hidden_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], target_BTD: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Input, angles and output of attention with each segment of so many tokens as a row of its own.

    Each keeps the angles of its place in the whole sequence, which relative positions do not notice.
    """

    def cut(x: torch.Tensor) -> torch.Tensor:
        # Angles of one length for all rows as well: the same shapes for short and long sequences, compiled once.
        whole = x.expand(hidden_BTD.shape[0], -1, -1)
        return whole.reshape(-1, num_tokens, x.shape[-1])

    cos, sin = rotary
    return cut(hidden_BTD), (cut(cos), cut(sin)), cut(target_BTD)


class Students:
    """The mixers under training, with their optimizer.

    On a GPU the step is bound by launching some 10,000 small kernels, so it is compiled, and after a few steps recorded
    once as a CUDA graph and replayed; `fast` turns both on. What is compiled are students and the teacher's layers.
    """

    def __init__(
        self,
        teacher: Teacher,
        mixers: Mapping[int, Mixer],
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
        fast: bool,
        world: World | None = None,
        parallel: ParallelKind = "data",
        run_pass: Pass | None = None,
        segment_tokens: int | None = None,
    ) -> None:
        """`run_pass` takes the place of the teacher's own pass as what shows the mixers inputs and targets.

        With `segment_tokens` they learn on segments of that length of whatever sequences the teacher reads.
        """
        if teacher.device.type == "cpu":
            keep_freed_memory()
        self._teacher, self.mixers = teacher, mixers
        self._max_grad_norm, self._segment_tokens = max_grad_norm, segment_tokens
        self._run_pass = run_pass or self._teacher_pass
        self._runner = None if teacher.is_sharded else make_runner(teacher.model)
        # A sharded teacher gathers its weights from Python, layer by layer.
        compiles_layers = fast and run_pass is None and not teacher.is_sharded
        self._layers = CompiledLayers(teacher.model) if compiles_layers else None
        self._world = world or World()
        self.splits_batch = parallel == "data"
        """Whether all processes train all layers, each on its part of a batch."""
        self.own = list(mixers) if self.splits_batch else self._world.share(list(mixers))
        """Mixers that this process holds, by number: one for each layer, or several where a bank has several kinds."""
        self.active = list(self.own)
        """Those of them that are still in training."""
        self._amp = torch.autocast(
            teacher.device.type, torch.bfloat16, enabled=teacher.dtype in (torch.bfloat16, torch.float16)
        )
        # One compiled graph serves all layers: their parameters are its inputs.
        self._sums = Compiled(squared_sums) if fast else squared_sums
        can_record = fast and teacher.device.type == "cuda"
        self._lanes = Lanes(teacher.device)
        self._can_replay = can_record and not teacher.is_sharded
        self._replays: dict[torch.Size, Replay] = {}
        self._groups = [self._trained(index) for index in self.active]
        self._exchange = self._make_exchange()
        self.optimizer = torch.optim.AdamW(
            [p for group in self._groups for p in group] or [torch.zeros(1)],
            # A recorded step reads the rate from device memory.
            lr=torch.tensor(learning_rate, device=teacher.device) if can_record else learning_rate,
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            fused=True,
            capturable=can_record,
        )

    def stop(self, index: int) -> None:
        """Leave a layer out of training from now on; its weights stay as they are."""
        self.active.remove(index)
        self._groups = [self._trained(i) for i in self.active]
        for param in self._trained(index):
            self.optimizer.state.pop(param, None)
            param.grad = None
        self.optimizer.param_groups[0]["params"] = [p for group in self._groups for p in group]
        self._exchange = self._make_exchange()
        # What was recorded trains the layer still.
        self._replays.clear()

    def _make_exchange(self) -> GradientExchange | None:
        return GradientExchange(self._world, self._groups) if self.splits_batch and self._world.size > 1 else None

    def _trained(self, index: int) -> list[nn.Parameter]:
        return [param for param in self.mixers[index].parameters() if param.requires_grad]

    def train_step(self, input_ids: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """One teacher pass over the global batch (B, T) and one update; returns the losses of `active` layers."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if self.splits_batch:
            input_ids = input_ids[self._world.rank :: self._world.size]
        input_ids = input_ids.to(self._teacher.device, torch.long)
        if not self._can_replay:
            return self._step(input_ids)
        if input_ids.shape not in self._replays:
            # One for long and one for short steps, where there are both.
            self._replays[input_ids.shape] = Replay(self._step)
        return self._replays[input_ids.shape](input_ids)

    @property
    def refusal(self) -> str | None:
        """Why the step is not replayed as a CUDA graph; None where it is, or will be."""
        if not self._can_replay:
            return "not asked for"
        return next((replay.refusal for replay in self._replays.values() if replay.refusal), None)

    @property
    def is_compiled(self) -> bool:
        """Whether forward and backward run compiled, as far as is known by now."""
        whole = self._layers is None or self._layers.refusal is None
        return isinstance(self._sums, Compiled) and self._sums.refusal is None and whole

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        sums = self.accumulate(input_ids)
        self.update(sums)
        if self._exchange is None:
            self.optimizer.zero_grad(set_to_none=True)
        errors, powers = sums.unbind(1)
        return errors / powers

    def accumulate(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Gradients of the squared errors of all `active` layers over (B, T) tokens, added up over ranks.

        Returns (num_active, 2): each layer's sum of squared errors and of squares of its target.
        """
        sums = torch.zeros(len(self.active), 2, device=self._teacher.device)
        position_of = {index: position for position, index in enumerate(self.active)}
        if self._exchange is not None:
            self._exchange.begin()

        def visit(index: int, hidden: torch.Tensor, rotary: Any, target: torch.Tensor) -> None:
            if self._segment_tokens is not None:
                hidden, rotary, target = cut_in_segments(self._segment_tokens, hidden, rotary, target)
            with self._lanes.next(hidden, rotary, target):
                with torch.enable_grad(), self._amp:
                    error, power = self._sums(self.mixers[index], hidden, rotary, target)
                error.backward()
                sums[position_of[index]] = torch.stack([error.detach(), power])
            if self._exchange is not None:
                self._exchange.layer_done(position_of[index], before_sending=self._lanes.join)

        # Only here, as batches of other shapes would each be compiled anew.
        with self._fast_layers(), self._lanes.joined():
            self._run_pass(input_ids, self.active, visit)
        if self._exchange is not None:
            self._exchange.finish()
            self._world.add_up([sums])
        return sums

    def update(self, sums: torch.Tensor) -> None:
        """One step of the optimizer from the gradients that are there; `sums` as `accumulate` gives them."""
        self._normalise_and_clip(sums[:, 1])
        self.optimizer.step()

    @torch.no_grad()
    def held_out_nmse(self, blocks: torch.Tensor, batch_size: int) -> dict[int, float]:
        """Normalised MSE of each layer over held-out blocks (num_blocks, T): sum((o - o')^2) / sum(o^2)."""
        sums = {index: torch.zeros(2, dtype=torch.float64, device=self._teacher.device) for index in self.own}

        def visit(index: int, hidden: torch.Tensor, rotary: Any, target: torch.Tensor) -> None:
            with self._amp:
                out, _ = self.mixers[index](hidden, rotary)
            error = (out.float() - target.float()).square().sum(dtype=torch.float64)
            sums[index] += torch.stack([error, target.float().square().sum(dtype=torch.float64)])

        batches = list(blocks.split(batch_size))
        # As many passes on every rank, some with nothing to measure.
        batches += [blocks[:0]] * (-len(batches) % self._world.size)
        for batch in self._world.share(batches) if self.splits_batch else batches:
            self._run_pass(batch.to(self._teacher.device, torch.long), self.own, visit)
        if self.splits_batch:
            self._world.add_up(sums.values())
        parts = self._world.collect({index: (error / power).item() for index, (error, power) in sums.items()})
        merged = {index: value for part in parts for index, value in part.items()}
        return {index: merged[index] for index in self.mixers}

    def _fast_layers(self) -> AbstractContextManager[None]:
        return nullcontext() if self._layers is None else self._layers.compiled()

    @torch.no_grad()
    def teacher_forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The teacher's pass over (B, T) as a training step runs it, with nothing trained: what the last layer gives,
        normalised where the teacher is sharded."""
        with self._fast_layers():
            return self._run_teacher(input_ids)

    @torch.no_grad()
    def _teacher_pass(self, input_ids: torch.Tensor, numbers: list[int], visit: Any) -> None:
        if len(input_ids) and numbers:
            with capture_targets(self._teacher.model, {i: self.mixers[i] for i in numbers}, visit):
                self._run_teacher(input_ids)
        elif self._teacher.is_sharded:
            # With more processes than sequences some have nothing to do but to bring their part of the weights.
            self._run_teacher(torch.zeros(1, 1, dtype=torch.long, device=self._teacher.device))

    def _run_teacher(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._runner is None:
            return run_body(self._teacher.model, input_ids).last_hidden_state
        batch = self._runner.prepare_for_recording(input_ids)
        hidden = batch.hidden_BTD
        for index, layer in enumerate(self._runner.layers):
            hidden = self._runner.run_layer(index, layer, hidden, batch)
        return hidden

    @torch.no_grad()
    def _normalise_and_clip(self, powers: torch.Tensor) -> None:
        """Divide each student's gradient by its target's power and limit its norm, as if it were trained alone."""
        for group, power in zip(self._groups, powers.unbind(0)):
            gradients = [param.grad for param in group if param.grad is not None]
            norm = nn.utils.get_total_norm(gradients, foreach=True) / power
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / power
            torch._foreach_mul_(gradients, factor)
