"""What the report room gives beside the page: verdict, model card, summary table and files."""

from __future__ import annotations

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_report import fake_report, score, show, without

from dtr.errors import DataError, OutputError
from dtr.reporting import (
    read_report,
    render_html,
    render_model_card,
    verdict,
    write_report,
)


def page_text(report: dict) -> str:
    """The page with its characters as they are, no-break spaces as plain ones."""
    return html.unescape(render_html(report)).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("options", "status", "held", "words"),
    [
        ({"test": 0.495, "paired_stderr": 0.004}, "held", True, "so that held on test"),
        ({"test": 0.42, "paired_stderr": 0.010}, "not held", False, "so that did not hold on test"),
        ({"test": 0.48, "paired_stderr": 0.013}, "within noise", None, "within noise: more items would tell"),
        ({"num_replaced": 0, "test": 0.497, "paired_stderr": 0.0}, "nothing replaced", True, "is the teacher itself"),
        ({"metric": "perplexity", "test": 19.6, "paired_stderr": 0.002}, "held", True, "(lower is better)"),
        ({"metric": "perplexity", "test": 22.0, "paired_stderr": 0.010}, "not held", False, "did not hold"),
        ({"metric": "perplexity", "test": 20.5, "paired_stderr": 0.010}, "within noise", None, "within noise"),
    ],
)
def test_verdict(options: dict, status: str, held: bool | None, words: str) -> None:
    report = fake_report(**options)
    answer = verdict(report)
    assert (answer.status, answer.held) == (status, held)
    assert words in answer.sentence
    assert answer.sentence.isascii()
    text = page_text(report)
    assert answer.sentence in text
    assert ("Nothing replaced" if status == "nothing replaced" else f"Promise on test: {status}") in text


def test_verdict_interval_uses_the_covariance_of_paired_scores() -> None:
    report = fake_report(test=0.48, paired_stderr=0.013)
    t, h = report["teacher"]["test"], report["m_opt"]["test"]
    cov = (t["stderr"] ** 2 + h["stderr"] ** 2 - 0.013**2) / 2
    expected = 1.96 * math.sqrt(h["stderr"] ** 2 + 0.95**2 * t["stderr"] ** 2 - 2 * 0.95 * cov) / t["value"]
    kept = verdict(report).kept
    assert kept is not None
    assert (kept.high - kept.low) / 2 == pytest.approx(expected, rel=1e-9)
    assert kept.measured == pytest.approx(0.48 / 0.497)
    # Without pairs the two count as independent, which is wider.
    unpaired = verdict(without(report, "m_opt.paired"))
    assert unpaired.kept is not None
    assert unpaired.kept.high - unpaired.kept.low > 1.3 * (kept.high - kept.low)
    assert "the paired interval was not measured" in unpaired.sentence


def test_no_difference_on_few_items_is_not_certainty() -> None:
    def perfect(num_test: int) -> str:
        report = fake_report(num_test=num_test, paired_stderr=0.0, test=1.0)
        report["teacher"]["test"] = report["m_opt"]["test"] = score(1.0, num_test)
        return verdict(report).status

    assert perfect(20) == "within noise"
    assert perfect(200) == "held"


@pytest.mark.parametrize(
    ("metric", "limit", "test", "stderr", "status"),
    [
        ("acc_norm", 0.45, 0.48, 0.01, "held"),
        ("acc_norm", 0.45, 0.40, 0.01, "not held"),
        ("acc_norm", 0.45, 0.46, 0.01, "within noise"),
        ("perplexity", 22.0, 20.0, 0.5, "held"),
        ("perplexity", 22.0, 25.0, 0.5, "not held"),
    ],
)
def test_absolute_limits(metric: str, limit: float, test: float, stderr: float, status: str) -> None:
    report = fake_report(metric=metric)
    report["search"] |= {"p_min": limit, "p_min_kind": "absolute", "p_min_value": limit}
    report["m_opt"]["test"] = score(test, 750, metric=metric, stderr=stderr)
    answer = verdict(report)
    assert answer.status == status
    assert f"{metric} of at {'most' if metric == 'perplexity' else 'least'} {limit:.2f}" in answer.sentence
    assert answer.sentence in page_text(report)


def test_perplexity_is_worded_as_lower_is_better() -> None:
    report = fake_report(metric="perplexity", test=20.5, paired_stderr=0.01)
    report["task"]["kind"] = "perplexity"
    text = page_text(report)
    assert "perplexity 20.50 against the teacher's 19.50 (lower is better), 4.9 % worse" in text
    assert "perplexity of at most 1.053 times the teacher's" in text
    assert "perplexity (lower is better)" in text
    kept = verdict(report).kept
    assert kept is not None
    assert kept.limit == pytest.approx(1 / 0.95)
    assert kept.measured == pytest.approx(20.5 / 19.5)
    assert kept.high == pytest.approx(20.5 / 19.5 * math.exp(0.0196))
    assert "measured is 1.051 times (95 % interval 1.031 times to 1.072 times)" in text


@pytest.mark.parametrize("which", ["m_opt", "m_best"])
def test_model_card(which: Any) -> None:
    report = fake_report()
    report["teacher"]["license"] = "apache-2.0"
    card = render_model_card(report, which=which)
    _, front, body = card.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert meta["library_name"] == "transformers"
    assert meta["license"] == "apache-2.0"
    assert {"hybrid", "linear-attention", "gated_deltanet"} <= set(meta["tags"])
    metric = meta["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "acc_norm", "value": report[which]["test"]["value"]}
    assert f"| linear layers | 0 of 30 | {27 if which == 'm_opt' else 18} of 30 |" in body
    assert "import dtr" in body
    assert "trust_remote_code=True" in body
    assert verdict(report, which).sentence in body
    assert "not measured\n" not in body
    assert "&" not in body
    assert "license" not in yaml.safe_load(render_model_card(fake_report()).split("---\n")[1])


@pytest.mark.parametrize("source", ["/models/SmolLM2", "./a/b", "owner/model.Q8_0.gguf", "smollm2-demo"])
def test_local_teachers_are_no_base_model(source: str) -> None:
    report = fake_report()
    report["teacher"]["source"] = source
    assert "base_model" not in yaml.safe_load(render_model_card(report).split("---\n")[1])


def test_a_model_card_tells_no_paths_and_shows_markup_as_text() -> None:
    report = fake_report()
    report["teacher"]["source"] = report["recipe"]["teacher"]["source"] = "/home/ada/secret project/../models/SmolLM2"
    report["command"] = "dtr run /home/ada/secret/recipe.yaml --set text.source=~/mail/inbox.txt"
    report["task"]["notes"] = [
        "read from /home/ada/secret/task.jsonl",
        "<script>alert(1)</script>",
        "[x](http://y)",
        "a|b",
    ]
    report["task"]["name"] = "`<img src=x onerror=alert(1)>`\n# A heading"
    report["recipe"]["text"] = {"source": ["C:\\Users\\ada\\text.txt", "<b>"]}
    card = render_model_card(report)
    assert not [word for word in ("/home", "ada", "secret", "mail", "Users") if word in card]
    _, _, body = card.split("---\n", 2)
    prose = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in prose
    assert r"\[x\](http://y)" in prose
    assert r"a\|b" in prose
    assert "\n# A heading" not in prose
    assert "<" not in re.sub(r"`[^`\n]*`", "", prose)
    assert "task.jsonl" in prose


@pytest.mark.parametrize("width", [80, 100, 200])
def test_summary_fits_one_screen(width: int) -> None:
    text = show(fake_report(), width)
    lines = text.rstrip().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= (30 if width < 100 else 26)
    if width < 100:
        return
    flat = " ".join(re.sub("[^ -~]", " ", text).split())
    for expected in ("27 of 30", "18 of 30", "0.480 +/- 0.018", "within noise", "10,600,000 tokens", "465 candidates"):
        assert expected in flat, expected


def test_write_and_read_back(tmp_path: Path) -> None:
    report = fake_report()
    page = write_report(tmp_path, report)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8") == render_html(report)
    assert read_report(tmp_path) == report
    assert read_report(tmp_path / "report.json") == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, fake_report())
    before = (tmp_path / "report.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(tmp_path, fake_report(test=0.1))
    assert (tmp_path / "report.json").read_text() == before
    with pytest.raises(OutputError, match="can be written"):
        write_report(tmp_path / "missing", fake_report())


def test_reading_what_is_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder of a finished run"):
        read_report(tmp_path)
    file = tmp_path / "report.json"
    for content, message in (
        ("{", "expected the report as it was written"),
        ("[1]", "another kind of JSON"),
        ('{"format": 1}', "another kind"),
        (json.dumps({"format": 2, "dtr_version": "9.0"}), "format 2 of dtr 9.0"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_report(tmp_path)


def test_reporting_needs_no_torch() -> None:
    code = "import sys, dtr.reporting; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_verdict_is_the_test_of_the_record() -> None:
    """Not the interval by standard errors, which is narrower with one lost item than with none."""
    report = fake_report(num_replaced=20)
    report["m_opt"]["promise"] = {
        "measured": 0.97, "low": 0.951, "high": 0.99, "limit": 0.95, "is_share": True, "higher_is_better": True,
        "held": None,
    }  # fmt: skip
    assert (verdict(report).status, verdict(report).kept.low) == ("within noise", 0.951)
    report["m_opt"]["promise"]["held"] = True
    assert verdict(report).status == "held"


def test_what_is_not_certified_says_so_and_a_spent_budget_too() -> None:
    report = fake_report(num_replaced=20)
    report["search"]["certificate"] = {"is_certified": True, "text": "Certified."}
    report["search"]["stop_reason"] = "Search budget exhausted after 25.0 passes; more layers may go."
    assert "The certificate is of M_opt, not of this hybrid." in verdict(report, "m_best").sentence
    assert "certificate" not in verdict(report).sentence
    assert verdict(report).headline.endswith("search budget exhausted, more layers may go")
    report["m_opt"]["num_replaced"] = 0
    assert "Nothing could be certified" in verdict(report).sentence
