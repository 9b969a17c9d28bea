"""The page of a run and the page that compares runs: whole, alone, safe, and saying what is in the report."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from fake_report import fake_report, show, without

from dtr.errors import DataError, OutputError
from dtr.reporting import compare, read_report, render_html, render_model_card, verdict, write_report
from dtr.reporting.comparison import _render
from dtr.reporting.page import layer_cells
from dtr.reporting.plot import Axis, axis_over

VOID = {"meta", "link", "br", "hr", "img", "input"}
OPTIONAL = [
    "hardware.gpu", "hardware.cpu", "commit", "peak_gpu_bytes", "peak_rss_bytes", "m_opt.cache", "m_best.cache",
    "sample", "differences", "search.p_min_value", "distill.curve", "distill.nmse", "m_opt.paired", "m_best.test",
    "teacher.test", "mixer.is_pure_linear", "seconds", "versions", "recipe", "search.stop_reason", "m_best",
    "task.num_test", "text",
]  # fmt: skip


class Checker(HTMLParser):
    """Refuses unbalanced tags, collects what a browser would run or fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        raise AssertionError(f"<{tag}/> is not HTML")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids)), "ids repeat"
    for tag, attributes in checker.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href", "action", "data"}:
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page
    assert "url(" not in page
    return checker


def plain(page: str) -> str:
    return " ".join("".join(check(page).text).split())


def test_page_is_whole_alone_and_complete() -> None:
    page = render_html(fake_report())
    text = plain(page)
    # A key that a template misspells would print as "not measured".
    assert "not measured" not in text
    assert "http://" not in page
    assert "https://" not in page
    assert len(page) < 400_000
    for expected in (
        "27 of 30 layers are linear.", "0.480 \u00b1 0.018", "0.497 \u00b1 0.018", "3.4 % worse",
        "-0.017 (95 %: -0.042 to +0.008)", "11.5 %", "188.7 MB", "21.6 MB", "4,096 tokens", "10,600,000 tokens",
        "1,294 steps", "36,741 tokens/s", "465 candidates", "132 passes", "4.2 GB", "9.9 GB", "0.0981", "8 min 32 s",
        "dtr run recipes/arc-easy.yaml --out run-1", "20260131", "134,515,008 parameters", "8badf00d12345678",
        "cafe0123cafe0123", "feedc0de00112233", "fla is not installed", "torch 2.13.0, transformers 5.23.0, dtr 0.1.0",
        "970c114",
        "source: HuggingFaceTB/SmolLM2-135M-Instruct", "NVIDIA H100", "AMD EPYC 9654, 16 cores, 137.0 GB",
        "250 validation items", "750 test items", "Why is the sky blue?", "Blue light is scattered by air.",
        "carbon dioxide", "every layer is linear", "pure linear attention", "12,345,678 tokens", "P_min 0.410",
        "CandidatesTest", "test points along the curve are for looking only",
    ):  # fmt: skip
        assert expected in text, expected


def test_charts_hold_one_mark_per_measurement_in_both_sizes() -> None:
    report = fake_report()
    tags = check(render_html(report)).tags
    svgs = [a["class"] for tag, a in tags if tag == "svg" and a.get("role") == "img"]
    assert svgs == ["wide", "narrow"] * 5
    classes = [a.get("class", "") for _, a in tags]
    # 30 steps and the teacher in two sizes.
    assert classes.count("line val thin") == 2 * 31
    rejected = 2 * sum(not step["accepted"] for step in report["search"]["steps"])
    assert rejected == 6
    assert classes.count("val hollow") == rejected
    # Layers before distillation, the teacher at three contexts for speed and for memory, and two legends.
    assert classes.count("before") == 2 * (30 + 3 + 3) + 2
    assert classes.count("ring") == 4
    assert classes.count("line stem") == 2 * 30


def test_a_map_of_length_by_depth_is_shaded_by_the_score() -> None:
    text = render_html(fake_report())
    assert text.count("--share:") == 15 + 14
    assert 'style="--share:25%">0.25' in text
    without = fake_report()
    without["length_by_depth"] = None
    assert "By length and depth" not in render_html(without)


def test_layer_map_tells_in_words_what_it_shows_in_colour() -> None:
    report = fake_report()
    cells = layer_cells(report)
    assert [cell["layer"] for cell in cells] == list(range(30))
    first = report["m_opt"]["layers"][0]
    assert cells[first]["text"].startswith(
        f"Layer {first}: linear, replaced as number 1, also linear in M_best; error 0."
    )
    assert sum(cell["place"] is None for cell in cells) == 3
    shades = [cell["shade"] for cell in cells]
    errors = [row["after"] for row in report["distill"]["nmse"]]
    assert min(shades) == 0.15
    assert max(shades) == 1.0
    assert shades.index(1.0) == errors.index(max(errors))
    text = plain(render_html(report))
    assert all(cell["text"] in text for cell in cells)


@pytest.mark.parametrize("path", OPTIONAL)
def test_absences_are_named_and_break_nothing(path: str) -> None:
    bare = without(fake_report(), path)
    null = copy.deepcopy(fake_report())
    *parents, last = path.split(".")
    inner = null
    for key in parents:
        inner = inner[key]
    inner[last] = None
    for report in (bare, null):
        text = plain(render_html(report))
        assert "None" not in text
        if path not in {"hardware.gpu", "sample", "differences", "search.p_min_value", "search.stop_reason"}:
            assert re.search("not measured|not in the report", text), path
        assert "None" not in render_model_card(report)
        assert show(report)
    assert render_html(bare) == render_html(null)


def test_options_are_printed_as_they_are_set() -> None:
    report = fake_report()
    assert "gated_deltanet (chunk=64)" in render_html(report)
    report["mixer"]["options"] = [{"window": 8, "sinks": 2}, {}]
    assert "(window=8, sinks=2; no options)" in render_html(report)


def test_an_almost_empty_report_still_makes_a_page() -> None:
    report = {"format": 1, "dtr_version": "0.1.0"}
    text = plain(render_html(report))
    assert "an unknown number of an unknown number layers are linear" in text
    assert verdict(report).status == "not measured"
    assert yaml.safe_load(render_model_card(report).split("---")[1])["library_name"] == "transformers"


def test_a_diverged_loss_does_not_look_unmeasured() -> None:
    report = fake_report()
    report["distill"]["nmse"][3]["after"] = float("nan")
    report["distill"]["mean_nmse"] = float("inf")
    text = plain(render_html(report))
    assert "not finite" in text
    assert "error not finite" in text


def test_layers_that_were_given_up_are_named() -> None:
    report = fake_report()
    report["distill"]["stopped"] = [{"layer": 7, "num_tokens": 40_960, "why": "its loss is not a number"}]
    assert "Layer 7 was given up after 40,960 tokens" in plain(render_html(report))
    assert "Layer 7 failed to train and was stopped after 40,960 tokens." in render_model_card(report)


def test_infinities_survive_strict_json(tmp_path: Path) -> None:
    report = fake_report()
    report["distill"]["mean_nmse"], report["distill"]["curve"][2]["mean_nmse"] = float("nan"), float("inf")
    write_report(tmp_path, report)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    back = read_report(tmp_path)
    assert back["distill"]["mean_nmse"] == "nan"
    assert "Mean after distillation: not finite" in plain(render_html(back))
    assert render_html(back) == render_html(report)


def test_text_of_models_and_users_cannot_run() -> None:
    attack = '</pre><script>alert(1)</script><img src="https://evil.test/x" onerror="alert(1)">\'"&'
    report = fake_report()
    report["sample"] = {"prompt": attack, "teacher": attack, "hybrid": attack}
    report["differences"] = [{"prompt": attack, "answer": attack, "teacher": attack, "hybrid": attack}]
    report["task"]["metric"] = report["task"]["name"] = report["teacher"]["source"] = attack
    report["command"] = report["mixer"]["kind"] = report["search"]["stop_reason"] = attack
    report["recipe"] = {"x": attack}
    page = render_html(report)
    assert "<script" not in page
    assert "<img" not in page
    assert "alert(1)" in plain(page)
    assert "<script" not in compare_of(report)


def compare_of(*reports: dict) -> str:
    return _render([(f"run <b>{i}", report) for i, report in enumerate(reports)])


def test_window_mixers_are_told_apart() -> None:
    report = fake_report()
    assert "window of full attention" not in render_model_card(report)
    report["mixer"]["is_pure_linear"] = False
    assert "These mixers hold a window of full attention" in plain(render_html(report))
    assert "The mixers hold a window of full attention" in render_model_card(report)


def test_compare_overlays_runs(tmp_path: Path) -> None:
    first, second = fake_report(), fake_report(num_layers=12, num_replaced=5, run_to_end=False)
    for name, report in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report)
    page = compare([tmp_path / "a", tmp_path / "b"])
    text = plain(page)
    assert "2 runs side by side" in text
    assert "27 of 30" in text
    assert "5 of 12" in text
    # Different depths: the axis is a share of the layers.
    assert "layers replaced (%)" in text
    assert page.count('class="rundot0"') == 2 * 31
    assert page.count('class="rundot1"') == 2 * 7
    assert "layers replaced (%)" not in compare([tmp_path / "a"])
    with pytest.raises(DataError, match="no run folder"):
        compare([])
    with pytest.raises(OutputError):
        compare([tmp_path / "a", tmp_path / "c"])


@pytest.mark.parametrize(
    ("axis", "most", "expected"),
    [
        (Axis(label="", low=0, high=30, whole=True), 6, [0, 5, 10, 15, 20, 25, 30]),
        (Axis(label="", low=0, high=3, whole=True), 12, [0, 1, 2, 3]),
        (Axis(label="", low=0.38, high=0.51), 6, [0.4, 0.45, 0.5]),
        (Axis(label="", low=0.02, high=3, log=True), 6, [0.03, 0.1, 0.3, 1, 3]),
    ],
)
def test_ticks(axis: Axis, most: int, expected: list[float]) -> None:
    assert axis.ticks(most) == pytest.approx(expected)


def test_axes_survive_constant_and_missing_values() -> None:
    for values in ([], [None], [0.5, 0.5], [0.0], [float("nan"), 1.0]):
        for log in (False, True):
            axis = axis_over("x", values, log=log)
            assert axis.low < axis.high
            assert axis.ticks(6)
            assert 0 <= axis.place(0.5) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser_does_not_scroll_sideways(tmp_path: Path, scheme: str) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    report = fake_report()
    report["sample"]["teacher"] = "unbroken" * 60
    page = write_report(tmp_path, report)
    # A probe page measures the report in a frame of phone width; its own script is not part of the report.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="f" src="{page.name}" width="360" height="800"></iframe><script>onload = () => {{'
        'const d = document.getElementById("f").contentDocument.documentElement;'
        'const top = d.querySelector("header").firstElementChild.getBoundingClientRect().top;'
        'const color = getComputedStyle(d.querySelector("body")).backgroundColor;'
        "document.title = `${d.scrollWidth} ${top} ${color}`; }</script>"
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    width, top, background = re.search(r"<title>(\d+) ([\d.]+) (rgb\([^<]*\))</title>", out).groups()  # type: ignore[union-attr]
    assert int(width) <= 360
    assert float(top) > 20
    assert background == ("rgb(15, 18, 23)" if scheme == "dark" else "rgb(255, 255, 255)")
