"""All layers' students: their losses inside the teacher's pass, their gradients, and one optimizer over them.

Each student sees the input of its attention and learns its output, `MSE / mean(o^2)`; no gradient crosses layers
(blockwise local distillation, arXiv 2601.11667, section 3.1). A student's forward and backward run as soon as its
layer has run, so that only one layer's activations are alive at a time.

Shapes: B batch, T tokens, D hidden dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dtr.arch import capture_attention
from dtr.distillation.replay import Replay
from dtr.mixers.base import LinearMixer
from dtr.teacher import Teacher


def student_loss(
    mixer: nn.Module, hidden_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], target_BTD: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over the mean square of the target: 1 is what an output of zeros would get."""
    out, _ = mixer(hidden_BTD, rotary)
    target = target_BTD.float()
    return (out.float() - target).square().mean() / target.square().mean()


class Students:
    """The mixers under training, with their optimizer.

    On a GPU the step is bound by launching some 10,000 small kernels, so it is compiled, and after a few steps recorded
    once as a CUDA graph and replayed; `fast` turns both on.
    """

    def __init__(
        self,
        teacher: Teacher,
        mixers: Mapping[int, LinearMixer],
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
        fast: bool,
    ) -> None:
        self._teacher, self.mixers = teacher, mixers
        self._max_grad_norm = max_grad_norm
        self._amp = torch.autocast(
            teacher.device.type, torch.bfloat16, enabled=teacher.dtype in (torch.bfloat16, torch.float16)
        )
        # One compiled graph serves all layers: their parameters are its inputs.
        self._loss = torch.compile(student_loss, dynamic=False) if fast else student_loss
        self._replay = Replay(self._step) if fast else None
        self._groups = [[p for p in mixer.parameters() if p.requires_grad] for mixer in mixers.values()]
        self.optimizer = torch.optim.AdamW(
            [p for group in self._groups for p in group],
            # A recorded step reads the rate from device memory.
            lr=torch.tensor(learning_rate, device=teacher.device) if fast else learning_rate,
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            fused=True,
            capturable=fast,
        )

    def train_step(self, input_ids: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """One teacher pass over (B, T) tokens and one update of every student; returns their losses (layers,)."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        input_ids = input_ids.to(self._teacher.device, torch.long)
        return self._step(input_ids) if self._replay is None else self._replay(input_ids)

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        losses: dict[int, torch.Tensor] = {}

        def visit(index: int, hidden: torch.Tensor, rotary: Any, target: torch.Tensor) -> None:
            with torch.enable_grad(), self._amp:
                loss = self._loss(self.mixers[index], hidden, rotary, target)
            loss.backward()
            losses[index] = loss.detach()

        self._teacher_pass(input_ids, visit)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([losses[index] for index in self.mixers])

    @torch.no_grad()
    def held_out_nmse(self, blocks: torch.Tensor, batch_size: int) -> dict[int, float]:
        """Normalised MSE of each layer over held-out blocks (num_blocks, T): sum((o - o')^2) / sum(o^2)."""
        sums = {index: torch.zeros(2, dtype=torch.float64, device=self._teacher.device) for index in self.mixers}

        def visit(index: int, hidden: torch.Tensor, rotary: Any, target: torch.Tensor) -> None:
            with self._amp:
                out, _ = self.mixers[index](hidden, rotary)
            error = (out.float() - target.float()).square().sum(dtype=torch.float64)
            sums[index] += torch.stack([error, target.float().square().sum(dtype=torch.float64)])

        for batch in blocks.split(batch_size):
            self._teacher_pass(batch.to(self._teacher.device, torch.long), visit)
        return {index: (error / power).item() for index, (error, power) in sums.items()}

    @torch.no_grad()
    def _teacher_pass(self, input_ids: torch.Tensor, visit: Any) -> None:
        body = self._teacher.model.model
        with capture_attention(self._teacher.model, list(self.mixers), visit):
            body(input_ids=input_ids, use_cache=False)

    def _clip(self) -> None:
        # Each student on its own, as if it were trained alone.
        for group in self._groups:
            nn.utils.clip_grad_norm_(group, self._max_grad_norm, foreach=True)
