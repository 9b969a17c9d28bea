"""The mixer bank: trained linear mixers, one per layer and kind, with what is known of them; safetensors on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dtr.anatomy import some
from dtr.arch import BackboneGeometry, HeadGeometry, attention_of
from dtr.errors import BankError, DeviceError, RecipeError
from dtr.files import read_json, write_json, write_tensors
from dtr.identity import is_earlier
from dtr.mixers import make_mixer, mixer_from_teacher, options_of_new
from dtr.mixers.base import Mixer, set_backend

FORMATS = {"one kind": 1, "several kinds": 2}
"""A bank of one kind is still written as it always was."""
Spec = dict[str, Any]
"""{"kind": ..., options}, as a hybrid's `config.mixers` has it for a layer."""


def read_specs(mixer: str | Sequence[str | dict[str, Any]], options: dict[str, Any] | None = None) -> list[Spec]:
    """The kinds of a bank from `mixer.kind` and `mixer.options` of a recipe: a name, or a list of {kind, options}.

    What an entry says of `layers` is not part of its kind; see `read_numbers`.
    """
    if isinstance(mixer, str):
        mixer = [{"kind": mixer, "options": options or {}}]
    named: list[dict[str, Any]] = [{"kind": one} if isinstance(one, str) else one for one in mixer]
    specs = [{"kind": one["kind"], **options_of_new(one["kind"], one.get("options"))} for one in named]
    for at, spec in enumerate(specs):
        if spec in specs[:at]:
            raise RecipeError("mixer.kind", got=f"{spec['kind']} twice", expected="kinds or options that differ")
    return specs


def read_numbers(
    mixer: str | Sequence[str | dict[str, Any]], layers: Sequence[int], num_model_layers: int
) -> list[int]:
    """Numbers of the mixers that a bank holds: each kind for all of `layers`, or for those that its entry names.

    Raises:
        RecipeError: an entry names layers that are not there, or none.
    """
    numbers = []
    for at, one in enumerate([mixer] if isinstance(mixer, str) else mixer):
        wanted = None if isinstance(one, str) else one.get("layers")
        if wanted is not None and not (wanted and set(wanted) <= set(layers)):
            raise RecipeError(
                "mixer.kind",
                got=f"layers {wanted} for a mixer",
                expected=f"some of the layers to distil, {list(layers)}",
            )
        numbers += [at * num_model_layers + index for index in layers if wanted is None or index in wanted]
    return numbers


@dataclass(kw_only=True)
class MixerBank:
    """Distilled mixers, float32, by number.

    A mixer's number is the index of its layer, plus `num_model_layers` for each kind that stands before its own in
    `specs`; with one kind it is the layer. Whatever else is known by number has the same keys.
    """

    specs: list[Spec]
    mixers: dict[int, Mixer]
    num_model_layers: int
    teacher_fingerprint: str
    geometry: HeadGeometry
    identity: dict[str, Any] = field(default_factory=dict)
    """What the bank was made from: text fingerprint, token budget, seed and the rest of the distillation settings."""
    nmse_before: dict[int, float] = field(default_factory=dict)
    """Normalised MSE on held-out text at the start, by number: sum((o - o')^2) / sum(o^2)."""
    nmse_after: dict[int, float] = field(default_factory=dict)
    """The same after distillation."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Held-out NMSE on the way: {num_tokens, mean_nmse, nmse of every mixer}."""
    stopped: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Mixers that were given up while training, and kept as they last were in order: {num_tokens, why}."""
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    _frozen: dict[Any, dict[int, Mixer]] = field(default_factory=dict, repr=False, compare=False)
    """What `in_dtype` gave, by type, state of the weights and backends."""

    @property
    def layers(self) -> list[int]:
        """Layers that have a mixer."""
        return sorted({mixer.layer_idx for mixer in self.mixers.values()})

    @property
    def layer_of(self) -> dict[int, int]:
        """The layer that each mixer stands in for, by number."""
        return {number: mixer.layer_idx for number, mixer in self.mixers.items()}

    @property
    def kinds(self) -> list[str]:
        """A name for each of `specs`: its kind, with the options where another has the same kind."""
        kinds = [spec["kind"] for spec in self.specs]
        return [
            spec["kind"] if kinds.count(spec["kind"]) == 1 else " ".join([spec["kind"], *_option_words(spec)])
            for spec in self.specs
        ]

    @property
    def mean_nmse(self) -> float:
        """Over all mixers; `mean_nmse_by_kind` tells kinds apart."""
        return sum(self.nmse_after.values()) / max(len(self.nmse_after), 1)

    @property
    def mean_nmse_by_kind(self) -> dict[str, float]:
        by_kind: dict[str, list[float]] = {}
        for number, value in self.nmse_after.items():
            by_kind.setdefault(self.kind_of(number), []).append(value)
        return {kind: sum(values) / len(values) for kind, values in by_kind.items()}

    def kind_of(self, number: int) -> str:
        """One of `kinds`."""
        return self.kinds[number // self.num_model_layers]

    def named(self, number: int) -> dict[str, Any]:
        """Layer of a mixer, and its kind where there are several, for events and records."""
        kind = {"kind": self.kind_of(number)} if len(self.specs) > 1 else {}
        return {"layer": self.mixers[number].layer_idx, **kind}

    @property
    def num_parameters(self) -> int:
        """Parameters that are trained, of all mixers."""
        return sum(p.numel() for mixer in self.mixers.values() for p in mixer.parameters() if p.requires_grad)

    def spec(self, number: int) -> Spec:
        """A mixer's entry in a hybrid's `config.mixers`."""
        return self.specs[number // self.num_model_layers]

    def in_dtype(self, dtype: torch.dtype) -> dict[int, Mixer]:
        """Frozen copies of all mixers in the teacher's dtype, as evaluation uses them; all who ask share one set.

        Whoever gives one away, or changes it, copies it first.
        """
        # Torch counts what happens to a tensor in place, so a bank that trains on gives copies of what it is now.
        tensors = [t for m in self.mixers.values() for t in (*m.parameters(), *m.buffers())]
        key = (dtype, tuple((id(t), t._version) for t in tensors), tuple(m.backend for m in self.mixers.values()))
        if key not in self._frozen:
            self._frozen = {
                key: {i: copy.deepcopy(m).to(dtype).requires_grad_(False).eval() for i, m in self.mixers.items()}
            }
        return dict(self._frozen[key])

    @property
    def fingerprint(self) -> str:
        """Hash of kinds, options and all weights, 16 hex digits."""
        plain = [part for spec in self.specs for part in (spec["kind"], _options(spec))]
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write mixers.safetensors and bank.json; the JSON comes last, so a folder without it is not finished."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "mixers.safetensors", self._tensors())
        facts = {key: value for key, value in vars(self).items() if key not in ("mixers", "geometry", "_frozen")} | {
            "geometry": asdict(self.geometry),
            "layers": self.layers,
            "fingerprint": self.fingerprint,
        }
        if len(self.specs) == 1:
            facts |= {"format": FORMATS["one kind"], "kind": self.specs[0]["kind"], "options": _options(self.specs[0])}
        else:
            facts |= {"format": FORMATS["several kinds"], "numbers": list(self.mixers)}
        write_json(folder / "bank.json", facts, sealed=True)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"layers.{index}.{name}": tensor
            for index, mixer in self.mixers.items()
            for name, tensor in mixer.state_dict().items()
        }


def load_bank(folder: str | Path, *, teacher: Any = None, backend: str = "auto") -> MixerBank:
    """Read a bank that was saved before.

    Args:
        folder: holds bank.json and mixers.safetensors.
        teacher: if given, the bank must have been made from this Teacher; its mixers go to the teacher's device.
        backend: what computes the mixers' recurrences, as in `distill`.

    Raises:
        BankError: missing, damaged, or made from another teacher.
        DeviceError: the backend is unknown or cannot run here.
    """
    folder = find_bank(folder)
    try:
        facts = read_json(folder / "bank.json")
        tensors = load_file(folder / "mixers.safetensors")
        bank = _assemble(folder, facts, tensors, teacher)
        set_backend(bank.mixers.values(), backend)
        return bank
    except (BankError, DeviceError):
        raise
    except (OSError, ValueError, SafetensorError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise BankError(
            str(folder),
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            expected="a bank with bank.json and mixers.safetensors",
            hint="Make it again with 'dtr distill'.",
        ) from error


def find_bank(folder: str | Path) -> Path:
    """The folder, if it holds a bank; raises BankError."""
    folder = Path(folder)
    if not (folder / "bank.json").is_file():
        inside = folder / "bank"
        raise BankError(
            str(folder),
            got="no bank.json" if folder.is_dir() else "no such folder",
            expected="a bank with bank.json and mixers.safetensors",
            hint=f"Did you mean '{inside}'?" if (inside / "bank.json").is_file() else "Make one with 'dtr distill'.",
        )
    return folder


def _assemble(folder: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor], teacher: Any) -> MixerBank:
    if facts["format"] not in FORMATS.values():
        raise BankError(str(folder), got=f"format {facts['format']}", expected=f"one of {list(FORMATS.values())}")
    if teacher is not None:
        check_same_teacher(facts["teacher_fingerprint"], teacher, where=str(folder))
    is_probed = "value_dim" in facts["geometry"]
    geometry = (BackboneGeometry if is_probed else HeadGeometry)(**facts["geometry"])
    if is_probed and teacher is None:
        raise BankError(
            str(folder),
            got="mixers that are made of their teacher's own attention modules",
            expected="the teacher beside them",
            hint="Pass teacher=load_teacher(...).",
        )
    device = "cpu" if teacher is None else teacher.device
    numbers = facts.get("numbers", facts["layers"])
    specs = facts.get("specs") or [{"kind": facts["kind"], **facts["options"]}]
    num_model_layers = facts.get("num_model_layers", max(numbers) + 1)
    mixers = {}
    for number in numbers:
        spec = specs[number // num_model_layers]
        index = number % num_model_layers
        if isinstance(geometry, BackboneGeometry):
            attention = attention_of(teacher.model, index)
            mixers[number] = mixer_from_teacher(
                spec["kind"], geometry, index, attention, _options(spec), place=teacher.place(index)
            )
        else:
            mixers[number] = make_mixer(spec["kind"], geometry, index, _options(spec))
    _check_weights(folder, mixers, tensors)
    for number, mixer in mixers.items():
        prefix = f"layers.{number}."
        mixer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        mixer.to(device)
    errors = ("nmse_before", "nmse_after")
    by_layer: dict[str, Any] = {key: {int(k): float(v) for k, v in facts[key].items()} for key in errors}
    by_layer["stopped"] = {int(k): v for k, v in facts.get("stopped", {}).items()}
    plain = {key: facts[key] for key in ("identity", "curve", "num_tokens", "num_steps", "seconds")}
    bank = MixerBank(
        specs=specs,
        mixers=mixers,
        num_model_layers=num_model_layers,
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


def check_same_teacher(fingerprint: str, teacher: Any, *, where: str) -> None:
    """Raise BankError unless `teacher` is the one of that fingerprint."""
    if teacher.is_one_of(fingerprint):
        return
    is_old = is_earlier(fingerprint)
    raise BankError(
        where,
        got=f"one of teacher {fingerprint}" + (", as earlier releases put it," if is_old else ""),
        expected=f"one of {teacher.source} ({teacher.fingerprint})",
        hint="Give the teacher that the bank was made from, or distil again."
        + (
            " Earlier releases also refuse a bank after an upgrade of transformers: use the one before."
            if is_old
            else ""
        ),
    )


def _check_weights(folder: Path, mixers: dict[int, Mixer], tensors: dict[str, torch.Tensor]) -> None:
    """The file holds the weights of these mixers, all of them, no others, and all of them numbers."""
    expected = {f"layers.{i}.{name}": t.shape for i, mixer in mixers.items() for name, t in mixer.state_dict().items()}
    problems = {
        "lacks {}": [name for name in expected if name not in tensors],
        "has {} besides": [name for name in tensors if name not in expected],
        "has another shape in {}": [n for n, t in tensors.items() if n in expected and t.shape != expected[n]],
        "has NaN or infinity in {}": [n for n, t in tensors.items() if not t.isfinite().all()],
    }
    found = [text.format(some(sorted(names))) for text, names in problems.items() if names]
    if found:
        raise BankError(
            str(folder),
            got=f"a mixers.safetensors that {', '.join(found)}",
            expected="the weights of the mixers that bank.json names",
            hint="The files are damaged or mixed; distil again.",
        )


def _options(spec: Spec) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "kind"}


def _option_words(spec: Spec) -> list[str]:
    usual = options_of_new(spec["kind"])
    return [f"{key}={value}" for key, value in _options(spec).items() if usual.get(key) != value]
