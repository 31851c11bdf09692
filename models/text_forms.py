"""Texts, prompts with completions, and conversations as the tokens that a causal model learns.

What is learned are tokens of the whole text. A completion that is tokenized apart would have other ones: a tokenizer
that puts a space before every text (SentencePiece) would teach `3+4= 7` for `3+4=` with `7`. So prompt and completion
are tokenized together, and what is read and not learned are the tokens that the prompt has alone, too, from the first
on. Where a token stands across the end of the prompt, as that of ` cat` does behind a prompt that ends with a space, it
is learned whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pqk.data.checks import why_not_text
from pqk.data.tokenizing import open_tokens, shared
from pqk.errors import InputError, Reason, first_line
from pqk.models.text_data import Table, column, filled_strings, strings


@dataclass(frozen=True)
class Text:
    """The tokens of a text, of which the first `start` are read and not learned."""

    tokens: list[int]
    start: int = 1
    merged: bool = False
    """whether the prompt alone ends with other tokens: its last ones are part of what is learned"""


Form = Callable[[Table, str, int | None], list[Text]]
"""(columns, what they are called in errors, how many rows) -> texts"""


def text_form(
    tokenizer: Any,
    text: str | None,
    answered: tuple[str, str | None, str],
    messages: str | None,
    ends: bool | None,
) -> Form:
    """How texts are read.

    Args:
        tokenizer: the model's.
        text: the column of texts; None: prompts with completions.
        answered: the columns of prompts, of worked steps, if there are any, and of completions.
        messages: the column of conversations, which go before all others.
        ends: whether the token that ends texts stands behind each; None: behind completions, and behind texts where the
            tokenizer puts it there.

    Raises `InputError` for a tokenizer without the template or the token that is needed.
    """
    if messages is not None:
        return partial(_conversations, tokenizer, messages)
    if text is not None and ends is None:
        return partial(_as_tokenized, tokenizer, text)
    end = [tokenizer.eos_token_id] if (text is None if ends is None else ends) else []
    if None in end:
        raise InputError("language: the tokenizer has no token that ends texts; say ends=False")
    if text is not None:
        return partial(_plain, tokenizer, text, end)
    return partial(_completions, tokenizer, answered, end)


def _as_tokenized(tokenizer: Any, name: str, table: Table, what: str, rows: int | None) -> list[Text]:
    texts = strings(table, name, what)[:rows]
    return [Text(tokens) for tokens in (tokenizer(texts, verbose=False)["input_ids"] if texts else ())]


def _plain(tokenizer: Any, name: str, end: list[int], table: Table, what: str, rows: int | None) -> list[Text]:
    return [Text(_ended(tokens, end)) for tokens in open_tokens(tokenizer, strings(table, name, what)[:rows])]


def _completions(
    tokenizer: Any, names: tuple[str, str | None, str], end: list[int], table: Table, what: str, rows: int | None
) -> list[Text]:
    prompt, rationale, completion = names
    asked, answered = strings(table, prompt, what)[:rows], filled_strings(table, completion, what, rows)
    steps = None if rationale is None else strings(table, rationale, what)[:rows]
    if steps is not None:
        answered = [f"{step}\n{answer}" for step, answer in zip(steps, answered, strict=True)]
    return _joined(tokenizer, asked, [p + a for p, a in zip(asked, answered, strict=True)], end, what)


def _joined(
    tokenizer: Any, prompts: Sequence[str], wholes: Sequence[str], end: list[int], what: str, special: bool = True
) -> list[Text]:
    """Texts of which the tokens that a prompt has alone, too, are not learned."""
    found = []
    alone, together = (open_tokens(tokenizer, texts, special) for texts in (prompts, wholes))
    for row, (before, tokens) in enumerate(zip(alone, together, strict=True), 1):
        start = shared(before, tokens)
        if before and not start:
            raise InputError(
                f"language: row {row} of {what}: the prompt is one token with what follows it ({prompts[row - 1]!r:.40}"
                "), so nothing stands before what is to be learned; use a longer prompt, or take the row out"
            )
        found.append(Text(_ended(tokens, end), start, start < len(before)))
    return found


def _ended(tokens: list[int], end: list[int]) -> list[int]:
    """Tokens with the one that ends texts behind them, once."""
    return tokens if tokens[-1:] == end else [*tokens, *end]


# ---- conversations


def _conversations(tokenizer: Any, name: str, table: Table, what: str, rows: int | None) -> list[Text]:
    """What stands before the last message of each, with the template's begin of an answer, is not learned."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("language: the tokenizer has no chat template; give prompts and completions")
    prompts, wholes = [], []
    for row, said in enumerate(column(table, name, what)[:rows], 1):
        if (reason := _why_not_conversation(said, name)) is not None:
            raise InputError(f"language: row {row} of {what} {reason}")
        try:
            whole = tokenizer.apply_chat_template(said, tokenize=False)
            before = tokenizer.apply_chat_template(said[:-1], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises, or what it does with a message
            raise InputError(
                f"language: the chat template does not take row {row} of {what}: {first_line(error)}"
            ) from error
        if not whole.startswith(before):
            same = shared(before, whole)
            raise InputError(
                f"language: row {row} of {what}: the chat template changes what was said before when an answer "
                f"follows: {before[same:]!r:.40} becomes {whole[same:]!r:.40}"
            )
        if (number := _as_python(said, whole)) is not None:
            raise InputError(
                f"language: the chat template does not take the parts of message {number} in row {row} of {what}, and "
                "writes them as Python's list; give the content as one text"
            )
        prompts.append(before)
        wholes.append(whole)
    return _joined(tokenizer, prompts, wholes, [], what, special=False)


def _as_python(said: Any, whole: str) -> int | None:
    """The number of a message whose parts stand in the text as their list; None where there is none."""
    lists = (n for n, m in enumerate(said, 1) if isinstance(m["content"], list | tuple) and str(m["content"]) in whole)
    return next(lists, None)


def _why_not_conversation(said: Any, name: str) -> Reason | None:
    """Why a value in the column `name` is no conversation with an answer at its end, else None."""
    fits = isinstance(said, list | tuple) and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in said)
    if not fits or len(said) < 2 or said[-1]["role"] != "assistant":
        return f"must have in {name} at least two messages with role and content, the last of which is the assistant's"
    for number, message in enumerate(said, 1):
        content, calls = message["content"], message.get("tool_calls")
        if isinstance(content, list | tuple) or (content is None and calls):
            continue  # parts of a message, and calls of tools, are what the template makes of them
        if (reason := why_not_text(content)) is not None:
            return f"has in {name} a message {number} whose content is {reason}"
        if number == len(said) and not content.strip() and not calls:
            return f"has in {name} an empty answer, of which nothing can be learned; take it out"
    return None
