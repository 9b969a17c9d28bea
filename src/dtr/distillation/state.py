"""The state of a distillation in one file, so that nothing is lost and a resumed run ends in the same bank."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dtr.corpus.mixing import Text
from dtr.distillation.bank import MixerBank
from dtr.distillation.divergence_guard import DivergenceGuard
from dtr.distillation.students import Students
from dtr.distributed import World
from dtr.errors import BankError
from dtr.files import write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT = ("proved", "on_trial")
"""Weights that the divergence guard keeps."""
CHECKSUM = "crc32"


class TrainingState:
    """Students, optimizer moments, what the divergence guard keeps, step, curve and place in the text: one safetensors
    file, written by the first rank.

    Any number of processes may go on with it, whatever the number that wrote it.
    """

    def __init__(
        self,
        bank: MixerBank,
        students: Students,
        text: Text,
        path: Path | None,
        world: World,
    ) -> None:
        self._bank, self._students, self._text, self._path, self._world = bank, students, text, path, world
        self._layers = list(bank.mixers)
        self._named: dict[str, torch.Tensor] = {
            f"{i}.{name}": p for i, mixer in bank.mixers.items() for name, p in mixer.named_parameters()
        }

    def how_to_go_on(self) -> str:
        return "go on with --resume." if self._path else "nothing was saved, as no checkpoint was asked for."

    def save(self, step: int, guard: DivergenceGuard) -> None:
        """Write the state after `step` steps; all ranks call this together."""
        if self._path is None:
            return
        self.share_weights()
        tensors: dict[str, torch.Tensor] = {f"param.{name}": param for name, param in self._named.items()}
        for name, param in self._named.items():
            index, _, weight = name.partition(".")
            if int(index) in self._bank.stopped:
                continue
            moments = self._students.optimizer.state.get(param, {})
            tensors |= {f"{moment}.{name}": self._from_owner(name, moments.get(moment)) for moment in MOMENTS}
            for kept in KEPT:
                mine = getattr(guard, kept).get(int(index), {}).get(weight)
                tensors[f"{kept}.{name}"] = self._from_owner(name, mine)
        facts = {
            "step": step,
            "identity": self._bank.identity,
            "curve": self._bank.curve,
            "nmse_before": self._bank.nmse_before,
            "nmse_after": self._bank.nmse_after,
            "seconds": self._bank.seconds,
            "text": self._text.position(),
            "stopped": self._bank.stopped,
            "guard": {index: counts for part in self._world.collect(guard.counts()) for index, counts in part.items()},
        }
        if self._world.is_first:
            state = json.dumps(facts)
            write_tensors(self._path, tensors, metadata={"state": state, CHECKSUM: _checksum(state, tensors)})
        self._world.wait()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Give every rank the weights of the layers that others have trained."""
        for name, param in self._named.items():
            if (owner := self._owner(name)) is not None:
                self._world.send_from(owner, param)

    def _owner(self, name: str) -> int | None:
        """The one rank that trains this parameter; None where all do."""
        if self._students.splits_batch:
            return None
        return self._world.owner(self._layers.index(int(name.partition(".")[0])))

    def _from_owner(self, name: str, mine: torch.Tensor | None) -> torch.Tensor:
        """What belongs to a parameter, from the rank that trains it."""
        owner = self._owner(name)
        if owner is None:
            assert mine is not None, f"nothing is known of {name}"
            return mine
        tensor = mine if mine is not None else torch.empty_like(self._named[name])
        self._world.send_from(owner, tensor)
        return tensor

    @torch.no_grad()
    def restore(self, guard: DivergenceGuard) -> int:
        """Load the state if there is one, that of the guard too; returns the step to go on with."""
        if self._path is None or not self._path.exists():
            return 0
        try:
            with safe_open(self._path, framework="pt") as file:
                _insist_on_checksum(file)
                facts = json.loads(file.metadata()["state"])
                self._check(facts["identity"])
                self._bank.stopped = {int(k): v for k, v in facts.get("stopped", {}).items()}
                for index in [i for i in self._students.active if i in self._bank.stopped]:
                    self._students.stop(index)
                    guard.drop(index)
                for name, param in self._named.items():
                    param.copy_(file.get_tensor(f"param.{name}"))
                    if int(name.partition(".")[0]) not in self._students.active:
                        continue
                    self._students.optimizer.state[param] = {
                        "step": torch.tensor(float(facts["step"]), device=param.device),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(param.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(param.device),
                    }
                self._restore_guard(guard, facts.get("guard"), file)
        except BankError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BankError(
                str(self._path),
                got=f"{type(error).__name__}: {error}",
                expected="a distillation checkpoint",
                hint="Delete the file to start again.",
            ) from error
        self._bank.curve = facts["curve"]
        self._bank.nmse_before = {int(k): v for k, v in facts["nmse_before"].items()}
        self._bank.nmse_after = {int(k): v for k, v in facts["nmse_after"].items()}
        self._bank.seconds = facts["seconds"]
        self._text.seek(facts.get("text"))
        return facts["step"]

    def _restore_guard(self, guard: DivergenceGuard, counts: dict[str, Any] | None, file: Any) -> None:
        """What was kept of each layer in training; checkpoints of earlier versions hold none of it."""
        for index in self._students.active:
            if counts is None:
                guard.restore(index, None, {}, {})
                continue
            names = [name for name, _ in self._bank.mixers[index].named_parameters()]
            kept = ({name: file.get_tensor(f"{prefix}.{index}.{name}") for name in names} for prefix in KEPT)
            guard.restore(index, counts[str(index)], *kept)

    def _check(self, identity: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(self._bank.identity))
        changed = [key for key in ours if ours[key] != identity.get(key)]
        if changed:
            raise BankError(
                str(self._path),
                got="; ".join(f"{key} {identity.get(key)}" for key in changed),
                expected="; ".join(f"{key} {ours[key]}" for key in changed),
                hint="Go on with the settings it was started with, or use --overwrite.",
            )


def _checksum(state: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the facts and of every tensor's name, type, shape and bytes."""
    total = zlib.crc32(state.encode("utf-8"))
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        # As bytes, since numpy knows no bfloat16.
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(plain.numpy().data, total)
    return f"{total:08x}"


def _insist_on_checksum(file: Any) -> None:
    """Raise ValueError where a checkpoint is not what was written; one of an earlier version has the facts alone."""
    metadata = file.metadata()
    if set(metadata) == {"state"}:
        return
    names = list(file.keys())
    if _checksum(metadata["state"], {name: file.get_tensor(name) for name in names}) != metadata[CHECKSUM]:
        raise ValueError("what it holds does not match its checksum")
