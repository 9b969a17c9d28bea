"""Teachers with a classification head: evaluated by it, distilled, searched, saved and loaded with it."""

from __future__ import annotations

import json

import pytest
import torch
from exactness import assert_same_model
from tiny import byte_tokenizer, pico_classifier, pico_teacher, token_blocks
from transformers import AutoModelForSequenceClassification

from dtr.arch import FAMILIES, read_geometry
from dtr.distillation.trainer import distill
from dtr.errors import DataError, ModelError
from dtr.evaluation.evaluator import evaluate
from dtr.export.exporter import export_hybrid
from dtr.hybrid.modeling import make_hybrid
from dtr.mixers import mixer_from_teacher
from dtr.pipeline import run
from dtr.recipe import read_recipe
from dtr.selection.search import search
from dtr.tasks import load_task
from dtr.teacher import as_teacher, load_teacher

TEXTS = [f"{word} {number}" for number in range(5) for word in ("red", "a blue one", "green", "stone")]


@pytest.fixture
def task(tmp_path):
    for split in ("validation", "test"):
        rows = [{"text": f"{split} {t}", "label": n % 3, "label_text": "abc"[n % 3]} for n, t in enumerate(TEXTS)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_task(str(tmp_path), options={"head": True})


@torch.no_grad()
def classes_of(model, texts) -> list[int]:
    """As the library says: the class at the last token, without padding."""
    tokenizer = byte_tokenizer()
    return [int(model(input_ids=tokenizer(t, return_tensors="pt")["input_ids"]).logits.argmax()) for t in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_asked_as_the_library_asks_it(family, task):
    model = pico_classifier(family)
    score = evaluate(model, task, tokenizer=byte_tokenizer())
    found = classes_of(model, [f"test {text}" for text in TEXTS])
    assert score.per_item == tuple(float(c == n % 3) for n, c in enumerate(found))
    assert len(set(found)) > 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_hybrid_keeps_the_head_and_loads_with_its_class(family, tmp_path):
    model = pico_classifier(family)
    geometry = read_geometry(model.config)
    mixer = mixer_from_teacher("gated_deltanet", geometry, 0, model.model.layers[0].self_attn).eval()
    hybrid = make_hybrid(model, {0: mixer}, {0: {"kind": "gated_deltanet"}})
    assert torch.equal(hybrid.score.weight, model.score.weight)
    nothing = make_hybrid(model, {}, {})
    ids = torch.randint(1, 257, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = 0
    options = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(nothing(**options).logits, model(**options).logits)
    assert not torch.equal(hybrid(**options).logits, model(**options).logits)
    torch.testing.assert_close(hybrid(**options).logits[1], hybrid(input_ids=ids[1:, :6]).logits[0])
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(hybrid)
    assert_same_model(again, hybrid, **options)


def test_distil_and_search(task):
    teacher = as_teacher(pico_classifier(), byte_tokenizer())
    bank = distill(teacher, token_blocks(), mixer="gated_deltanet", num_tokens=1280, batch_size=4)
    result = search(teacher, bank, task, p_min=0.5, p_min_confidence=None)
    found = classes_of(result.m_opt, [f"test {text}" for text in TEXTS])
    assert result.m_opt_test.per_item == tuple(float(c == n % 3) for n, c in enumerate(found))


def test_a_whole_run_and_its_card(place, task, tmp_path):
    pico_classifier().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert load_teacher(tmp_path / "model").model.score.out_features == 3
    settings = [f"teacher.source={tmp_path / 'model'}", f"task.source={tmp_path}", "task.options={head: true}"]
    recipe = read_recipe(place / "recipe.yaml", [*settings, "distill.num_tokens=1024", "search.p_min=0.3"])
    record = run(recipe, tmp_path / "run")
    assert record["task"]["kind"] == "classification"
    card = (tmp_path / "run" / "hybrid" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    with pytest.raises(ModelError, match="got a model with a classification head; expected a causal language model"):
        export_hybrid(tmp_path / "run" / "hybrid", tmp_path / "stock")


def test_a_task_and_a_head_that_do_not_go_together(task, tmp_path):
    with pytest.raises(DataError, match=r"a model without a classification head; expected classification head"):
        evaluate(pico_teacher(), task)
    with pytest.raises(DataError, match=r"a model with a classification head; expected no classification head"):
        evaluate(pico_classifier(), load_task("recall"), tokenizer=byte_tokenizer())
    with pytest.raises(DataError, match=r"got the label 2; expected labels from 0 to 1"):
        evaluate(pico_classifier(num_labels=2), task, tokenizer=byte_tokenizer())
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "x", "label": "b", "label_text": "b"}))
    with pytest.raises(DataError, match=r"test\.jsonl:1: got 'b' in 'label'"):
        load_task(str(tmp_path), options={"head": True}, kind="classification")
