"""From text to token ids: the prompt that a model reads, and an answer as it stands in running text behind it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dtr.errors import DataError
from dtr.evaluation.batches import TokenPair


class Encoder:
    """A tokenizer as evaluation uses it.

    Context and answer are tokenized as one text and divided where the answer's tokens begin, as lm-evaluation-harness
    does. Apart they would be other tokens: tokenizers in the manner of SentencePiece begin each text with a space of
    their own. A token that holds the end of the context and the start of an answer belongs to the answer. The harness
    would drop it; here the border moves in front of it, for all answers of a question alike, so that they are compared
    from the same place.

    Args:
        tokenizer: the model's.
        chat_template: whether contexts are user turns; the template then brings every special token.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool) -> None:
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._before = () if chat_template else _special_tokens_before(tokenizer)
        # The answers of a question share its context.
        self._ids = lru_cache(maxsize=64)(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a context; never none, so that what follows has something to follow.

        Without a token that ends texts, which some tokenizers add: nothing would follow it.
        """
        ids = self._ids(self._shown(text))
        return (*(self._before or (() if ids else (self._start(),))), *ids)

    def whole(self, text: str) -> tuple[int, ...]:
        """Ids of a finished text with all special tokens that the tokenizer adds, as a classification head reads it."""
        ids = self._tokenizer(self._shown(text), add_special_tokens=not self._chat_template)["input_ids"]
        return tuple(ids) or (self._start(),)

    def pair(self, context: str, answer: str, *, beside: Sequence[str] = ()) -> TokenPair:
        """Ids of a context and of the answer to it; the answer has none where its text adds none.

        Args:
            beside: the question's other answers.
        """
        shown = self._shown(context)
        alone = self._ids(shown) if shown else ()
        borders = [_common(alone, self._ids(shown + text)) for text in (answer, *beside)]
        border, ids = min(borders), self._ids(shown + answer)
        if len(ids) <= borders[0]:
            border = borders[0]
        before = self._before or (() if border else (self._start(),))
        return TokenPair(context=(*before, *ids[:border]), target=ids[border:])

    def _shown(self, text: str) -> str:
        return render_turn(self._tokenizer, text) if self._chat_template else text

    def _start(self) -> int:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        start = bos if bos is not None else eos
        if start is None:
            raise DataError(
                "tokenizer",
                got="an empty prompt, and neither a bos nor an eos token to begin with",
                expected="something that an answer can follow",
                hint="Give each item a context, or set tokenizer.bos_token.",
            )
        return start


def render_turn(tokenizer: Any, text: str) -> str:
    """The text as a user turn in the tokenizer's chat template, up to where the model answers.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "task.chat_template",
            got="true, but this tokenizer has no chat template",
            expected="the tokenizer of a chat model",
            hint="Leave task.chat_template out, or set tokenizer.chat_template.",
        )
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def check_room(tokens: int, new_tokens: int, num_positions: int | None, *, task: str, text: str) -> None:
    """Refuse an item that needs more positions than the model has.

    Args:
        tokens: of the prompt, and of the answer where one is given.
        new_tokens: that may be written.
        num_positions: None where the model's config names no limit.

    Raises:
        DataError: says how many are needed and how the item begins.
    """
    if not num_positions or tokens + new_tokens <= num_positions:
        return
    room = f" and {new_tokens} more to write" if new_tokens else ""
    raise DataError(
        f"task {task}",
        got=f"an item of {tokens} tokens{room}, starting {text[:60]!r}",
        expected=f"at most the model's {num_positions} positions",
        hint=f"Shorten the context, {'lower max_new_tokens, ' if new_tokens else ''}or leave such rows out.",
    )


def check_ids(ids: Sequence[int], model: Any, *, where: str, text: str = "") -> None:
    """Refuse tokens that the model has no embedding for, which would end in an error far from its cause.

    Raises:
        DataError: names the token.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= num_rows:
        raise DataError(
            where,
            got=f"token {max(ids)} of the tokenizer" + (f" in {text[:60]!r}" if text else ""),
            expected=f"tokens below {num_rows}, the size of the model's vocabulary",
            hint="Give the tokenizer that belongs to the model, or resize the model's embeddings for it.",
        )


def padding_id(tokenizer: Any, model: Any) -> int:
    """A token to pad with. Padding is masked: where the tokenizer has none that the model knows, any does."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    wanted = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in wanted if token is not None and token < num_rows), 0)


def _special_tokens_before(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text, as a bos token; what it puts after one is left out."""
    plain, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    if not plain:
        # A vocabulary without this letter: the two ends cannot be told apart but by their name.
        return tuple(full[:1]) if full[:1] == [tokenizer.bos_token_id] else ()
    starts = (at for at in range(len(full)) if full[at : at + len(plain)] == plain)
    return tuple(full[: next(starts, 0)])


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many ids both begin with."""
    if second[: len(first)] == first:
        return len(first)
    return next(at for at, (a, b) in enumerate(zip((*first, -1), (*second, -2))) if a != b)
