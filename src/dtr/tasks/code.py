"""Code that a model wrote, and the program that is run to grade it: after a prompt, or as an answer in a chat.

A prompt often ends in white space, as HumanEval's end in the newline after the docstring (Chen et al. 2021,
arXiv 2107.03374). Tokenizers write that white space and the indentation behind it as one token, so a model that is
shown the first half rarely goes on as it would. Hence it is left to the model, and put in again where it wrote none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""Where a function that is being completed is over: the stop sequences of HumanEval, and the end of a code block."""
MAX_NEW_TOKENS = 512
CHAT_PROMPT = (
    "Complete the following Python function. Answer with the whole function, imports included, in one code block."
    "\n\n```python\n{prompt}\n```"
)
"""What a chat model is asked where the row's prompt is the beginning of a function."""
_BLOCK = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_DEFINED = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)
_CALLED = re.compile(r"(\w+)[ \t]*\(")


def open_end(text: str, stop: Sequence[str]) -> str:
    """The prompt without the white space at its end, which stays where a stop string would end the text in it."""
    kept = text.rstrip()
    return text if any(s in text[len(kept) :] for s in stop) else kept


def chat_question(prompt: str) -> str:
    """The user turn that asks for a prompt's code; a prompt that begins no function is the question itself."""
    return CHAT_PROMPT.format(prompt=prompt.strip("\n")) if _DEFINED.search(prompt) else prompt


def continued(prompt: str, written: str) -> str:
    """Prompt and what was written after it, with the white space between them once.

    >>> continued("def f():\\n", "\\n    return 1")
    'def f():\\n    return 1'
    >>> continued("def f():\\n    ", "return 1")
    'def f():\\n    return 1'
    """
    kept = prompt.rstrip()
    space = prompt[len(kept) :]
    begun = next(at for at in range(len(space) + 1) if written.startswith(space[at:]))
    return kept + space[:begun] + written


def answered(prompt: str, written: str, *, tests: str, entry_point: str | None = None) -> str:
    """The program of an answer in a chat: the first code block that defines the function asked for.

    Without such a block the first, and without any the whole text. Before it stands what the prompt has, as imports
    and functions that the answer need not repeat. A block that defines nothing goes on where the prompt stops.

    Args:
        prompt: of the row: the beginning of a program, or a question in words.
        tests: that are run behind it.
        entry_point: name of the function; when left out the last one that the prompt begins, else any that the tests
            call.
    """
    begun = _DEFINED.findall(prompt)
    wanted = {entry_point} if entry_point else set(begun[-1:] or _CALLED.findall(tests))
    # In a list a block is indented as a whole.
    found = _BLOCK.findall(written)
    blocks = [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found] or [written]
    code = next((block for block in blocks if wanted & set(_DEFINED.findall(block))), blocks[0])
    if begun and not _DEFINED.search(code):
        # A body alone, whose indentation is that of the function.
        return continued(prompt, code)
    return f"{_whole(prompt)}\n{code}"


def _whole(prompt: str) -> str:
    """The prompt as a program of its own, so that what follows may define its function anew; empty if it is none."""
    for body in ("", "\n pass"):
        try:
            ast.parse(prompt + body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return prompt + body
    return ""
