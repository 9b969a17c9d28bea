"""Code that models write: where it begins and ends, with and without a chat template."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
from docs_pages import ROOT, load_script
from tiny import byte_tokenizer, pico_teacher

from dtr.tasks import load_task
from dtr.tasks.base import Generation
from dtr.tasks.code import STOP, answered, chat_question, continued

PROMPT = 'from math import sqrt\n\n\ndef half(x):\n    return x / 2\n\n\ndef root(x):\n    """Root."""\n'
BODY = "    return sqrt(x)"
OTHER = "```python\nprint(half(4))\n```"


@pytest.mark.parametrize(
    ("prompt", "written", "program"),
    [
        # The model writes the white space that was taken off, all of it, a part, or none.
        (PROMPT, f"\n{BODY}", PROMPT + BODY),
        (PROMPT, f"\n\n{BODY}", f"{PROMPT}\n{BODY}"),
        (PROMPT, BODY, PROMPT + BODY),
        (f"{PROMPT}    ", BODY, PROMPT + BODY),
        (f"{PROMPT}    ", BODY.lstrip(), PROMPT + BODY),
        (f"{PROMPT}    ", f"\n{BODY}", PROMPT + BODY),
        ("x = ", "5", "x = 5"),
        ("x = ", " 5", "x = 5"),
        ("x =", " 5", "x = 5"),
        ("x = ", "", "x = "),
    ],
)
def test_white_space_between_prompt_and_code_stands_once(prompt, written, program):
    assert continued(prompt, written) == program


def runs(program: str) -> bool:
    space: dict = {}
    exec(f"{program}\nassert root(9) == 3", space)
    return True


@pytest.mark.parametrize(
    "written",
    [
        f"```python\n{PROMPT}{BODY}\n```",
        f"Sure:\n\n{OTHER}\nand\n```python\ndef root(x):\n{BODY}\n```\nor\n```python\ndef root(x):\n    return 0\n```",
        f"1. As a list:\n   ```py\n   def root(x):\n   {BODY}\n   ```",
        f"```\ndef root(x):\n{BODY}",
        f"def root(x):\n{BODY}",
        f"```python\n{BODY}\n```",
    ],
    ids=["whole", "several blocks", "indented", "cut off", "no block", "body alone"],
)
def test_an_answer_in_a_chat_is_the_block_that_defines_the_function(written):
    assert runs(answered(PROMPT, written, tests=""))


def test_the_function_asked_for_is_named_or_the_last_or_what_the_tests_call():
    blocks = "```python\ndef half(x):\n    return 0\n```\n```python\ndef root(x):\n    return 3\n```"
    assert "return 3" in answered(PROMPT, blocks, tests="")
    assert "return 0" not in answered(PROMPT, blocks, tests="")
    assert "return 0" in answered(PROMPT, blocks, tests="", entry_point="half")
    in_words = "Write a function for roots."
    assert answered(in_words, blocks, tests="assert root(9) == 3").strip() == "def root(x):\n    return 3"
    assert chat_question(in_words) == in_words
    assert PROMPT.strip() in chat_question(PROMPT)


def write(folder):
    for split in ("validation", "test"):
        row = {"prompt": f"# {split}\n{PROMPT}", "tests": "assert root(9) == 3"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row))
    return folder


def load(folder, *, chat_template: bool = False, **options):
    options = {"allow_code_execution": True, **options}
    return load_task(str(folder), kind="generation", metric="pass_at_1", chat_template=chat_template, options=options)


def test_code_has_limits_of_its_own_and_what_a_recipe_sets_stays(tmp_path):
    (plain,) = load(write(tmp_path)).splits["test"][0].requests
    assert (plain.max_new_tokens, plain.stop) == (512, STOP)
    assert plain.context.endswith('"""Root."""')
    (chat,) = load(tmp_path, chat_template=True).splits["test"][0].requests
    assert (chat.max_new_tokens, chat.stop) == (512, ())
    assert "code block" in chat.context
    (own,) = load(tmp_path, max_new_tokens=9, stop=["\n\n"]).splits["test"][0].requests
    assert (own.max_new_tokens, own.stop) == (9, ("\n\n",))
    # Where the white space is itself a stop string, the model would write nothing.
    (line,) = load(tmp_path, stop=["\n"]).splits["test"][0].requests
    assert line.context.endswith('"""Root."""\n')


@pytest.mark.parametrize("chat_template", [False, True])
def test_both_ways_are_graded_by_running(tmp_path, chat_template):
    task = load(write(tmp_path), chat_template=chat_template)
    item = task.splits["test"][0]
    form = "```python\ndef root(x):\n{}\n```" if chat_template else "\n{}"
    assert [task.grade(item, [Generation(text=form.format(text))]).value for text in (BODY, "    return 0")] == [1, 0]


def test_the_program_converts_problems_and_scores_both_ways(tmp_path, monkeypatch, capsys):
    program = load_script(ROOT / "benchmarks" / "code_scores.py")
    problem = {"prompt": PROMPT, "test": "def check(candidate):\n    assert candidate(9) == 3\n", "entry_point": "root"}
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(problem | {"prompt": f"# {n}\n{PROMPT}"}) + "\n" for n in range(34))
    assert program.convert(tmp_path / "HumanEval.jsonl.gz", tmp_path / "rows") == 34
    item = load(tmp_path / "rows").splits["test"][0]
    assert load(tmp_path / "rows").grade(item, [Generation(text=f"\n{BODY}")]).value == 1.0
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    teacher = dataclasses.replace(pico_teacher(), tokenizer=tokenizer)
    monkeypatch.setattr("dtr.teacher.load_teacher", lambda *_, **__: teacher)
    arguments = [str(tmp_path / "rows"), "--model", "pico", "--tokens", "2", "--allow-code-execution"]
    program.main([*arguments, "--texts", str(tmp_path / "texts.jsonl")])
    found = json.loads(capsys.readouterr().out)
    assert {way: entry["num_items"] for way, entry in found["scores"].items()} == {"plain": 2, "chat": 2}
    assert found["command"].startswith("python benchmarks/code_scores.py ")
    assert {"hardware", "commit"} <= set(found)
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 4
