"""Text to tokens: an answer as it stands in running text, for tokenizers that add something at either end of a text."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import byte_tokenizer, pico_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dtr.errors import DataError
from dtr.evaluation.encoding import Encoder
from dtr.evaluation.evaluator import Evaluator
from dtr.evaluation.generation import generate_texts
from dtr.tasks import load_task
from dtr.tasks.base import GenerationRequest

TEXT = "the capital of france is paris not london (b) a city is\n\nbig and\ta river runs through it 12 345 times: end"
SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen divide a text into words."""


def sentencepiece(metaspace: bool) -> PreTrainedTokenizerFast:
    """In the manner of Llama 2 and Mistral: each text begins with a space of its own, with a bos and an eos token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=500, special_tokens=tokens))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=None, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """In the manner of Llama 3, Qwen and SmolLM2: a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(alphabet), special_tokens=["<eos>"])
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("tokenizer", [sentencepiece(True), sentencepiece(False)], ids=["metaspace", "prepend"])
def test_an_answer_has_the_tokens_that_it_has_in_running_text(tokenizer):
    encoder, context = Encoder(tokenizer, chat_template=False), "the capital of france is"
    for answer in (" paris", " london", " a city", " 12"):
        pair = encoder.pair(context, answer)
        # Neither a second space before the answer, nor the eos token that this tokenizer ends each text with.
        whole = tokenizer(context + answer)["input_ids"]
        assert [*pair.context, *pair.target, tokenizer.eos_token_id] == whole, answer
        assert tokenizer.decode(pair.target).strip() == answer.strip()
        assert pair.context == encoder.prompt(context)
    assert tokenizer.convert_ids_to_tokens(encoder.pair(context, " paris").target)[0].startswith("▁p")
    assert encoder.pair("", "paris").context == (1,)
    # A classification head has been trained on the text as the tokenizer ends it.
    assert encoder.whole(context)[-1] == tokenizer.eos_token_id


def test_byte_level_answers_are_what_they_were_apart():
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, chat_template=False)
    context, answers = "the capital of france is", (" paris", " not london", "\n\nbig", " (b)", ": 12", "\ta river")
    for answer in answers:
        pair = encoder.pair(context, answer, beside=answers)
        assert list(pair.context) == tokenizer(context)["input_ids"]
        assert list(pair.target) == tokenizer(answer)["input_ids"]


def test_a_token_over_the_border_belongs_to_the_answer_of_all_choices():
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, chat_template=False)
    pairs = [encoder.pair("the r", choice, beside=("iver", "x")) for choice in ("iver", "x")]
    assert [list(p.context + p.target) for p in pairs] == [tokenizer(t)["input_ids"] for t in ("the river", "the rx")]
    assert pairs[0].context == pairs[1].context == tuple(tokenizer("the")["input_ids"])
    # With nothing left before the border, a start token takes the place of a context.
    assert encoder.pair("t", "he").context == (tokenizer.eos_token_id,)
    # An answer that adds no text has no tokens, whatever the others share with the context.
    assert encoder.pair("the r", "", beside=("iver",)).target == ()


def test_prompts_do_not_end_in_eos_and_text_keeps_its_first_space():
    """Of four tokens that a model writes, the first begins with a space, which decoders drop where a text begins."""
    tokenizer, model = sentencepiece(False), pico_model(vocab_size=500, eos_token_id=None)
    request = GenerationRequest(context="the capital of france is", max_new_tokens=4)
    prompt = Encoder(tokenizer, chat_template=False).prompt(request.context)
    assert list(prompt) == tokenizer(request.context)["input_ids"][:-1]
    written = tokenizer(" a big river paris", add_special_tokens=False)["input_ids"][-4:]
    asked = []

    def generate(input_ids, **_):
        asked.append(input_ids.tolist())
        return torch.cat([input_ids, torch.tensor([written])], dim=1)

    model.generate = generate
    (text,) = generate_texts(model, tokenizer, [request], chat_template=False, batch_tokens=100)
    assert asked == [[list(prompt)]]
    assert tokenizer.decode(list(prompt) + written, skip_special_tokens=True) == request.context + text
    assert text.startswith(" ")


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_written_is_greedy_whatever_the_model_says_of_generation(fast):
    model, tokenizer = pico_model(), byte_tokenizer()
    tokenizer.batch_decode = lambda rows, **_: [json.dumps(row.tolist()) for row in rows]
    requests = [GenerationRequest(context=text, max_new_tokens=6) for text in ("river river", "stone", "a tree")]
    options = {"chat_template": False, "batch_tokens": 48, "fast": fast}
    own = model.generation_config
    plain = generate_texts(model, tokenizer, requests, **options)
    settings = {"repetition_penalty": 1.7, "return_dict_in_generate": True, "num_return_sequences": 2, "num_beams": 2}
    settings |= {"do_sample": True, "temperature": 3.0, "no_repeat_ngram_size": 1, "max_length": 5, "min_length": 99}
    for name, value in settings.items():
        setattr(own, name, value)
    assert generate_texts(model, tokenizer, requests, **options) == plain
    assert model.generation_config is own
    # Where a text ends is the model's to say.
    first = json.loads(plain[0])[0]
    own.eos_token_id = [first]
    assert json.loads(generate_texts(model, tokenizer, requests[:1], **options)[0]) == [first]


def test_one_decoder_serves_batches_of_its_size(monkeypatch):
    from dtr.evaluation import generation

    made = []

    class Counted(generation.Decoder):
        def __init__(self, *given, **options):
            made.append(options["batch_size"])
            super().__init__(*given, **options)

    monkeypatch.setattr(generation, "Decoder", Counted)
    model, tokenizer = pico_model(), byte_tokenizer()
    requests = [GenerationRequest(context="x" * (30 - n), max_new_tokens=4) for n in range(14)]
    options = {"chat_template": False, "batch_tokens": 140}
    assert generate_texts(model, tokenizer, requests, **options, fast=True) == generate_texts(
        model, tokenizer, requests, **options, fast=False
    )
    assert made == [4]


def test_a_prompt_that_leaves_no_room_is_told_before_any_work(tmp_path):
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"prompt": "{split} {"x" * 440}", "answer": "y"}}')
    task = load_task(str(tmp_path), options={"max_new_tokens": 100})
    with pytest.raises(DataError, match=r"451 tokens and 100 more to write.*at most the model's 512 positions"):
        Evaluator(pico_model(), byte_tokenizer(), task, "validation")


def test_chat_without_a_template_is_told():
    with pytest.raises(DataError, match="no chat template"):
        Encoder(byte_tokenizer(), chat_template=True).prompt("x")
