"""Tasks of lm-evaluation-harness: our path, its path and our JSONL path agree item by item. Offline, on pico models.

Needs the extra lm-eval, which CI leaves out for its size: `make test-lm-eval` installs it and runs this file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from tiny import byte_tokenizer, pico_model, pico_teacher

from dtr.errors import DataError, RecipeError
from dtr.evaluation.evaluator import Evaluator, evaluate
from dtr.evaluation.score import LOST_NATS
from dtr.tasks import load_task

pytest.importorskip("lm_eval", reason="needs the extra lm-eval: make test-lm-eval")

WORDS = ("red", "green stone", "a blue river", "tree", "the cloud over it", "bird", "fish", "lamp", "door", "road")
ACCURACY = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
SHAPES = {
    "arc_easy": ({"doc_to_text": "Question: {{question}}\nAnswer:"}, {}),
    "piqa": ({"doc_to_text": "Question: {{question}}\nAnswer:"}, {}),
    "hellaswag": ({"doc_to_text": "{{context}}"}, {"prompt": "{context}"}),
}


def rows_of(name: str, split: str, num_rows: int) -> list[dict]:
    num_choices = 2 if name == "piqa" else 4
    return [
        {
            "context": f"About {WORDS[n % 7]}, {split} {n}." if name == "hellaswag" else "",
            "question": f"{split} {n}: which of them is {WORDS[n % 10]}?",
            "choices": [WORDS[(n * 3 + k) % 10] for k in range(num_choices)],
            "answer": n % num_choices,
        }
        for n in range(num_rows)
    ]


def write_yaml(folder: Path, name: str, **config) -> None:
    """A harness task over the JSONL files of `folder`, which it names as the harness does: from where it runs."""
    files = {path.stem: path.name for path in folder.glob("*.jsonl")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def choice_task(folder: Path, name: str, splits=(("validation", 12), ("test", 30)), **config) -> None:
    for split, num_rows in splits:
        rows = rows_of(name, split, num_rows)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "{{answer}}"}
    write_yaml(folder, f"own_{name}", **{**choices, **SHAPES[name][0], "metric_list": ACCURACY, **config})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def harness_samples(folder: Path, name: str, *, model=None, max_length: int = 512, **options) -> list[dict]:
    """What the harness logs of each item (once per filter) with its own model class."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    network, tokenizer = model or (pico_model(), byte_tokenizer())
    batch_size = 4 if model is None else 16
    lm = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size, device="cpu", max_length=max_length)
    before = Path.cwd()
    os.chdir(folder)
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
        )
    finally:
        os.chdir(before)
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def harness_scores(folder: Path, name: str, metric: str, **options) -> list[float]:
    return [sample[metric] for sample in harness_samples(folder, name, **options)]


@pytest.mark.parametrize("name", SHAPES)
def test_three_paths_agree_to_the_last_item(name, tmp_path):
    choice_task(tmp_path, name)
    theirs = load_task(f"lm_eval:own_{name}", path=str(tmp_path))
    ours = load_task(str(tmp_path), **SHAPES[name][1])
    assert theirs.metric == ours.metric == ("acc" if name == "piqa" else "acc_norm")
    teacher = pico_teacher()
    for split in ("validation", "test"):
        assert [item.requests for item in theirs.splits[split]] == [item.requests for item in ours.splits[split]]
        assert evaluate(teacher, theirs, split=split).per_item == evaluate(teacher, ours, split=split).per_item
    found = evaluate(teacher, theirs).per_item
    assert 0 < sum(found) < len(found)
    assert list(found) == harness_scores(tmp_path, f"own_{name}", theirs.metric)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_shared_data_agrees_to_the_last_item(name, tmp_path):
    """DTR_TASK_DATA names a folder with arc_easy/, piqa/ and hellaswag/, DTR_MODEL a model (a pico one else)."""
    data = os.environ.get("DTR_TASK_DATA")
    if not data:
        pytest.skip("set DTR_TASK_DATA to a folder with arc_easy, piqa and hellaswag as JSON Lines")
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes((Path(data, name) / f"{split}.jsonl").read_bytes())
    choices = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "{{answer}}"}
    write_yaml(tmp_path, f"own_{name}", **choices, **SHAPES[name][0], metric_list=ACCURACY)
    theirs = load_task(f"lm_eval:own_{name}", path=str(tmp_path))
    ours = load_task(str(tmp_path), **SHAPES[name][1])
    if os.environ.get("DTR_MODEL"):
        from dtr.teacher import load_teacher

        teacher = load_teacher(os.environ["DTR_MODEL"])
    else:
        teacher = pico_teacher(max_position_embeddings=4096)
    for split in ("validation", "test"):
        assert [item.requests for item in theirs.splits[split]] == [item.requests for item in ours.splits[split]]
    found = evaluate(teacher, ours).per_item
    assert evaluate(teacher, theirs).per_item == found
    model = (teacher.model, teacher.tokenizer)
    assert list(found) == harness_scores(tmp_path, f"own_{name}", ours.metric, model=model, max_length=4096)


def test_examples_before_the_question_are_the_harness_own(tmp_path):
    choice_task(tmp_path, "arc_easy", fewshot_split="validation")
    task = load_task("lm_eval:own_arc_easy", path=str(tmp_path), options={"num_fewshot": 2})
    assert task.splits["test"][0].requests[0].context.count("Answer:") == 3
    found = evaluate(pico_teacher(max_position_embeddings=1024), task).per_item
    assert list(found) == harness_scores(tmp_path, "own_arc_easy", "acc_norm", num_fewshot=2)


def generation_task(folder: Path, **config) -> None:
    for split, num_rows in (("validation", 4), ("test", 6)):
        rows = [{"prompt": f"{split} {n}: {WORDS[n]}", "answer": str(n)} for n in range(num_rows)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_yaml(folder, "own_writing", **{**settings, **config})


def test_generated_answers_go_through_the_harness_filters(tmp_path):
    steps = [{"function": "regex", "regex_pattern": "(.)$", "group_select": -1}, {"function": "take_first"}]
    plain = [{"function": "take_first"}]
    generation_task(tmp_path, filter_list=[{"name": "plain", "filter": plain}, {"name": "last", "filter": steps}])
    task = load_task("lm_eval:own_writing", path=str(tmp_path), options={"filter": "last"})
    assert task.metric == "exact_match"
    item = task.splits["test"][3]
    assert (item.requests[0].max_new_tokens, item.requests[0].stop) == (8, ("\n",))
    from dtr.tasks.base import Generation, Likelihood

    reference = Likelihood(log_prob=-2.0, is_greedy=False, num_tokens=1)
    for text, value in ((" it is 3", 1.0), (" 3 it is", 0.0)):
        grade = task.grade(item, [Generation(text=text), reference])
        assert (grade.value, grade.log_likelihood) == (value, -2.0)
    with pytest.raises(RecipeError, match=r"task\.options\.filter: got 'lst'.*'last'"):
        load_task("lm_eval:own_writing", path=str(tmp_path), options={"filter": "lst"})
    texts = [r[0].text for r in Evaluator(pico_model(), byte_tokenizer(), task, "test").respond()]
    samples = [s for s in harness_samples(tmp_path, "own_writing") if s["filter"] == "last"]
    assert texts == [sample["resps"][0][0] for sample in samples]
    assert list(evaluate(pico_teacher(), task).per_item) == [sample["exact_match"] for sample in samples]


def test_prompts_that_end_in_white_space_are_told_and_scored_as_by_the_harness(tmp_path):
    choice_task(tmp_path, "piqa", doc_to_text="Question: {{question}}\nAnswer: ", target_delimiter="")
    with pytest.warns(UserWarning, match="prompts of 12 of 12 validation and 30 of 30 test items.*before the answers"):
        task = load_task("lm_eval:own_piqa", path=str(tmp_path))
    assert task.splits["test"][0].requests[0].context.endswith("\nAnswer:")
    found = Evaluator(pico_model(), byte_tokenizer(), task, "test").respond()
    theirs = [[r[0][0] for r in sample["resps"]] for sample in harness_samples(tmp_path, "own_piqa")]
    assert [[r.log_prob for r in responses] for responses in found] == [pytest.approx(x, abs=1e-4) for x in theirs]
    generation_task(tmp_path, doc_to_text="{{prompt}}\nAnswer:\n")
    with pytest.warns(UserWarning, match="prompts of 4 of 4 validation and 6 of 6 test items.*left there"):
        writing = load_task("lm_eval:own_writing", path=str(tmp_path))
    written, reference = writing.splits["test"][3].requests
    assert written.context.endswith("\nAnswer:\n")
    assert reference.target == "\n3"
    assert "left there" in writing.notes[-1]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_loses(tmp_path, wrong):
    from dtr.tasks.base import Generation, Likelihood

    def likely(log_prob):
        return Likelihood(log_prob=log_prob, is_greedy=True, num_tokens=1)

    choice_task(tmp_path, "piqa")
    choices = load_task("lm_eval:own_piqa", path=str(tmp_path))
    item = next(item for item in choices.splits["test"] if item.row["target"] == 0)
    assert choices.grade(item, [likely(-1.0), likely(-2.0)]).value == 1.0
    # In the right answer's place as well as beside it.
    for responses in ([likely(wrong), likely(-2.0)], [likely(-1.0), likely(wrong)]):
        grade = choices.grade(item, responses)
        assert (grade.value, grade.log_likelihood) == (0.0, -LOST_NATS)
    generation_task(tmp_path)
    writing = load_task("lm_eval:own_writing", path=str(tmp_path))
    right = Generation(text=writing.splits["test"][3].row["answer"])
    assert writing.grade(writing.splits["test"][3], [right, likely(-1.0)]).value == 1.0
    assert writing.grade(writing.splits["test"][3], [right, likely(wrong)]).value == 0.0
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"{split} red green"}) + "\n")
    perplexity_task(tmp_path)
    words = load_task("lm_eval:own_text", path=str(tmp_path))
    grades = [words.grade(words.splits["test"][0], [likely(x)]) for x in (-3000.0, wrong)]
    assert grades[0].value == 1000.0
    assert grades[1].value == LOST_NATS
    assert math.isfinite(words.summarize(grades[1:]).value)


def perplexity_task(folder: Path) -> None:
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    texts = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_yaml(folder, "own_text", **texts, metric_list=[metric])


def test_perplexity_over_words(tmp_path):
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"{split} red green"}) + "\n")
    perplexity_task(tmp_path)
    task = load_task("lm_eval:own_text", path=str(tmp_path))
    score = evaluate(pico_teacher(), task)
    assert (score.metric, score.higher_is_better) == ("word_perplexity", False)
    ours = load_task("perplexity", path=str(tmp_path))
    # "test red green" is three words and fourteen bytes, which are the tokens here.
    assert math.log(score.value) * 3 == pytest.approx(math.log(evaluate(pico_teacher(), ours).value) * 14)


def test_a_single_split_is_cut_only_with_permission(tmp_path):
    choice_task(tmp_path, "piqa", splits=(("validation", 20),))
    with pytest.raises(DataError, match=r"task\.test: got no test split.*It has: validation\..*cut_validation"):
        load_task("lm_eval:own_piqa", path=str(tmp_path))
    task = load_task("lm_eval:own_piqa", path=str(tmp_path), cut_validation=0.3)
    assert (len(task.splits["validation"]), len(task.splits["test"])) == (6, 14)
    assert not {i.id for i in task.splits["validation"]} & {i.id for i in task.splits["test"]}
    (note,) = task.notes
    assert "6 of the 20 rows of 'validation' were drawn" in note
    rows = load_task("lm_eval:own_piqa", path=str(tmp_path), validation="validation[0:5]", test="validation[5:]")
    assert (len(rows.splits["validation"]), rows.notes) == (5, ())


def test_what_the_harness_cannot_give_is_said(tmp_path, monkeypatch):
    choice_task(tmp_path, "piqa")
    with pytest.raises(RecipeError, match=r"got no task of that name in .*Did you mean 'own_piqa'"):
        load_task("lm_eval:own_pica", path=str(tmp_path))
    with pytest.raises(RecipeError, match=r"task\.metric: got 'f1'.*auto or acc or acc_norm"):
        load_task("lm_eval:own_piqa", path=str(tmp_path), metric="f1")
    with pytest.raises(RecipeError, match=r"task\.prompt"):
        load_task("lm_eval:own_piqa", path=str(tmp_path), prompt="{question}")
    write_yaml(tmp_path, "own_hub", dataset_path="no/such-data", dataset_kwargs={}, output_type="multiple_choice")
    with pytest.raises(DataError, match=r"lm_eval:own_hub: got .*needs the network once"):
        load_task("lm_eval:own_hub", path=str(tmp_path))


def test_a_run_on_a_harness_task(place, tmp_path):
    from dtr.pipeline import run
    from dtr.recipe import read_recipe

    data = tmp_path / "data"
    data.mkdir()
    choice_task(data, "piqa", splits=(("validation", 20),))
    task = {"source": "lm_eval:own_piqa", "path": str(data), "cut_validation": 0.5}
    settings = ["search.test_curve=false", "search.p_min=0.5", "distill.num_tokens=1024"]
    recipe = read_recipe(place / "recipe.yaml", settings)
    recipe = type(recipe).model_validate({**recipe.model_dump(), "task": task})
    record = run(recipe, tmp_path / "run")
    assert record["task"]["kind"] == "lm_eval"
    assert "drawn for validation" in record["task"]["notes"][0]
    assert "drawn for validation" in (tmp_path / "run" / "report.html").read_text()
