"""The mixer bank: one trained linear mixer per layer, with what is known of it; safetensors on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dtr.arch import HeadGeometry
from dtr.errors import BankError
from dtr.files import write_json, write_tensors
from dtr.mixers import make_mixer
from dtr.mixers.base import Mixer

FORMAT = 1


@dataclass(kw_only=True)
class MixerBank:
    """Distilled mixers of one kind, float32, by layer."""

    kind: str
    options: dict[str, Any]
    mixers: dict[int, Mixer]
    teacher_fingerprint: str
    geometry: HeadGeometry
    identity: dict[str, Any] = field(default_factory=dict)
    """What the bank was made from: text fingerprint, token budget, seed and the rest of the distillation settings."""
    nmse_before: dict[int, float] = field(default_factory=dict)
    """Normalised MSE on held-out text at the start, by layer: sum((o - o')^2) / sum(o^2)."""
    nmse_after: dict[int, float] = field(default_factory=dict)
    """The same after distillation."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Held-out NMSE on the way: {num_tokens, mean_nmse, nmse by layer}."""
    stopped: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Layers that were given up while training, and kept as they last were in order: {num_tokens, why}."""
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def layers(self) -> list[int]:
        return sorted(self.mixers)

    @property
    def mean_nmse(self) -> float:
        return sum(self.nmse_after.values()) / max(len(self.nmse_after), 1)

    def spec(self) -> dict[str, Any]:
        """One layer's entry in a hybrid's `config.mixers`."""
        return {"kind": self.kind, **self.options}

    def in_dtype(self, dtype: torch.dtype) -> dict[int, Mixer]:
        """Frozen copies of all mixers in the teacher's dtype, as hybrids use them."""
        return {i: copy.deepcopy(m).to(dtype).requires_grad_(False).eval() for i, m in self.mixers.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of kind, options and all weights, 16 hex digits."""
        digest = hashlib.sha256(json.dumps([self.kind, self.options], sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write mixers.safetensors and bank.json; the JSON comes last, so a folder without it is not finished."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "mixers.safetensors", self._tensors())
        facts = {key: value for key, value in vars(self).items() if key not in ("mixers", "geometry")} | {
            "geometry": asdict(self.geometry),
            "layers": self.layers,
            "format": FORMAT,
            "fingerprint": self.fingerprint,
        }
        write_json(folder / "bank.json", facts)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"layers.{index}.{name}": tensor
            for index, mixer in self.mixers.items()
            for name, tensor in mixer.state_dict().items()
        }


def load_bank(folder: str | Path, *, teacher: Any = None) -> MixerBank:
    """Read a bank that was saved before.

    Args:
        folder: holds bank.json and mixers.safetensors.
        teacher: if given, the bank must have been made from this Teacher; its mixers go to the teacher's device.

    Raises:
        BankError: missing, damaged, or made from another teacher.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "mixers.safetensors")
        return _assemble(folder, facts, tensors, teacher)
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(
            str(folder),
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            expected="a bank with bank.json and mixers.safetensors",
            hint="Make it again with 'dtr distill'.",
        ) from error


def _assemble(folder: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor], teacher: Any) -> MixerBank:
    if facts["format"] != FORMAT:
        raise BankError(str(folder), got=f"format {facts['format']}", expected=f"format {FORMAT}")
    if teacher is not None and facts["teacher_fingerprint"] != teacher.fingerprint:
        raise BankError(
            str(folder),
            got=f"a bank of teacher {facts['teacher_fingerprint']}",
            expected=f"one of {teacher.source} ({teacher.fingerprint})",
            hint="Give the teacher that the bank was made from, or distil again.",
        )
    geometry = HeadGeometry(**facts["geometry"])
    device = "cpu" if teacher is None else teacher.device
    mixers = {}
    for index in facts["layers"]:
        mixer = make_mixer(facts["kind"], geometry, index, facts["options"])
        prefix = f"layers.{index}."
        mixer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        mixers[index] = mixer.to(device)
    errors = ("nmse_before", "nmse_after")
    by_layer: dict[str, Any] = {key: {int(k): v for k, v in facts[key].items()} for key in errors}
    by_layer["stopped"] = {int(k): v for k, v in facts.get("stopped", {}).items()}
    plain = {key: facts[key] for key in ("identity", "curve", "num_tokens", "num_steps", "seconds")}
    bank = MixerBank(
        kind=facts["kind"],
        options=facts["options"],
        mixers=mixers,
        teacher_fingerprint=facts["teacher_fingerprint"],
        geometry=geometry,
        **by_layer,
        **plain,
    )
    if bank.fingerprint != facts["fingerprint"]:
        raise BankError(
            str(folder),
            got="weights that do not match bank.json",
            expected=f"fingerprint {facts['fingerprint']}",
            hint="The files are damaged or mixed; distil again.",
        )
    return bank
