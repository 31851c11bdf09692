"""Next tokens as a task: texts, or prompts with completions, for the causal model in a Hugging Face directory.

from pqk import compress
from pqk.models.decoder import decoder
from pqk.models.language import language_task

teacher = decoder("my_model")
task = language_task(directory="my_model", train="train.jsonl", evaluation="test.jsonl")
compress(teacher, task, out="student")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk.data.checks import check_sizes
from pqk.data.data import Batch, digest_of
from pqk.data.structures import Outputs
from pqk.errors import InputError, Reason
from pqk.models.answer_match import ParsedAnswers, TokenMetric, judged_by
from pqk.models.decoder import FREE, INPUTS, decoder_config, positions
from pqk.models.decoder_files import DecoderFiles, ends_of_texts
from pqk.models.hub import find_directory, load_tokenizer
from pqk.models.rationales import Parse
from pqk.models.text_data import LabelledTokens, Table, TextSource, check_tokens, column_names, padded, read_table
from pqk.models.text_forms import Form, Text, text_form
from pqk.task.classes import IGNORED
from pqk.task.decoder_form import DecoderForm
from pqk.task.directory import ModelDirectory
from pqk.task.kept_tokens import CHOICE
from pqk.task.metrics import Metric
from pqk.task.task import Task


class NextTokens(LabelledTokens):
    """Token sequences whose targets are the next tokens: int64 [B, S], -100 where nothing is learned.

    The mask is 0 for padding and else the number of the text in its row, from 1: of several in one row, none sees
    another. Each is int64 [B, S].
    """

    learned: list[Tensor]
    """for each row, which tokens are learned where the one before is read: int64, 0 or 1"""
    parts: list[Tensor]
    """for each row, the number of each token's text: int64, from 1"""

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        for batch in super().batches(seed, epoch, start, state):
            ids, rows = batch.inputs[0], [] if batch.keys is None else batch.keys.tolist()
            parts, learned = (padded([of_row[i] for i in rows], 0)[0] for of_row in (self.parts, self.learned))
            targets = torch.full_like(ids, IGNORED)
            follows = (learned[:, 1:] > 0) & (parts[:, 1:] == parts[:, :-1])
            targets[:, :-1] = ids[:, 1:].masked_fill(~follows, IGNORED)
            yield Batch((ids, parts), targets, batch.keys)

    def fingerprint(self) -> str:
        return digest_of(super().fingerprint(), (torch.cat(self.learned), torch.cat(self.parts)))


def next_tokens(texts: Sequence[Text], batch_size: int, pad: int, packed: int | None = None) -> NextTokens:
    """Data of texts, one a row, or as many in a row of at most `packed` tokens as fit, in their order.

    Raises `InputError` for a text of which nothing is learned.
    """
    for row, text in enumerate(texts, 1):
        if (reason := _why_not_learned(text)) is not None:
            raise InputError(f"language: row {row} {reason}")
    rows = [[text] for text in texts] if packed is None else _packed(texts, packed)
    made = NextTokens([[token for text in row for token in text.tokens] for row in rows], None, batch_size, pad=pad)
    made.learned = [torch.cat([_learned(text) for text in row]) for row in rows]
    counts = [torch.tensor([len(text.tokens) for text in row]) for row in rows]
    made.parts = [torch.arange(1, len(n) + 1).repeat_interleave(n) for n in counts]
    return made


def _why_not_learned(text: Text) -> Reason | None:
    """Why nothing of a text is learned, else None."""
    if len(text.tokens) > max(text.start, 1):
        return None
    count = f"{len(text.tokens)} token" + "s" * (len(text.tokens) != 1)
    if text.start <= 1:
        return (
            f"has a text of {count}, and each is learned from those before it: two are needed; give longer texts, or "
            "take the row out"
        )
    return (
        f"has {count}, as far as max_length goes, of which none follows its prompt; shorten it, take the row out, or "
        "raise max_length where the model has more positions"
    )


def _learned(text: Text) -> Tensor:
    return (torch.arange(len(text.tokens)) >= max(text.start, 1)).long()


def _packed(texts: Sequence[Text], most: int) -> list[list[Text]]:
    """Rows of texts with at most `most` tokens, each begun where the last has no room."""
    rows: list[list[Text]] = []
    room = 0
    for text in texts:
        if len(text.tokens) > room:
            rows.append([])
            room = most
        rows[-1].append(text)
        room -= len(text.tokens)
    return rows


def choice(outputs: Outputs) -> Tensor:
    """The token with the largest score: int64 [B, S]."""
    picked: Tensor = outputs[CHOICE] if isinstance(outputs, dict) else outputs.argmax(-1)
    return picked


def language_task(
    data: str | Path | None = None,
    *,
    directory: str | Path,
    train: TextSource | None,
    evaluation: TextSource,
    validation: TextSource,
    text: str | None = "text",
    prompt: str = "prompt",
    completion: str = "completion",
    rationale: str | None = None,
    messages: str | None = None,
    ends: bool | None = None,
    packed: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
    limit: int | None = None,
    context: int = 64,
    retained: TextSource | None = None,
    retained_evaluation: TextSource | None = None,
    critic: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
    metric: Metric | TokenMetric = "log-likelihood",
    answer: str | Parse | None = None,
    decoder_form: DecoderForm | Mapping[str, Any] | None = None,
) -> Task:
    """Next-token data for the causal model in a Hugging Face directory.

    Args:
        data: the folder that file names are looked up in, beside the current one.
        directory: the model's; its tokenizer is used.
        train, evaluation, validation: .jsonl or .tsv files, `datasets` datasets, or tables of columns or rows, all of
            one form.
        text: the column of texts, of which every token is learned; None, and where there is no such column: prompts and
            completions.
        prompt, completion: columns; what stands in the prompt is not learned. Both are tokenized together, and where a
            token stands across the end of the prompt it is learned whole, which the report counts.
        rationale: the column of worked steps, which are learned before the completion, on lines of their own.
        messages: the column of conversations in the form of chat templates; the last message is learned.
        ends: whether the token that ends texts is learned behind each; by default behind completions, and behind plain
            texts where the tokenizer puts it there.
        packed: several training texts stand in a row of `max_length` tokens, and none sees another.
        batch_size: rows a step, of like length, padded to the longest.
        max_length: tokens of a text, of which longer ones lose the rest.
        limit: use only the first so many texts of train.
        context: tokens that are kept where a token is timed, and of the prompt that is timed, one more.
        retained: texts of what the model must not forget, read as the others are (`Task(retained=…)`).
        retained_evaluation: such texts that this is measured on.
        critic: (prompt, answers) -> a number for each answer, higher is better (`Task(critic=…)`, of texts).
        metric: how the model is judged: "log-likelihood", in nats per token; "agreement", the share of tokens that it
            chooses where those before are given; "exact_match", the share of completions that it writes to the letter,
            or whose `answer` is the data's; or a `Metric` of what is kept of each token (`pqk.task.kept_tokens.kept`).
        answer: how the answer is parsed out of a completion, where that alone has to match: a regular expression, of
            whose last match it is the first group, such as "#### (.+)", or a function, which gives None where there is
            none. The model then writes each evaluation text, which takes a pass over the text for every token.
        decoder_form: how model.onnx is written, such as `{"logits": "last"}`: see `DecoderForm`.

    Raises `InputError` for files, columns and tokenizers that do not fit the model or each other, for numbers that are
    none of tokens, rows or texts, and for texts of which nothing is learned.
    """
    check_sizes("language", batch_size=batch_size, context=context, **({} if limit is None else {"limit": limit}))
    check_sizes("language", 2, max_length=max_length)
    if critic is not None and not callable(critic):
        raise InputError(f"language: critic must be a function of a prompt and answers, not {critic!r:.40}")
    root, form_of_file = None if data is None else Path(data), DecoderForm.of(decoder_form)
    optional = {"training": train, "retained": retained, "retained evaluation": retained_evaluation}
    given = {"evaluation": evaluation, "validation": validation} | {k: v for k, v in optional.items() if v is not None}
    sources = {part: _source(source, root) for part, source in given.items()}
    columns = column_names(sources["evaluation"][1])
    if text == "text" and {prompt, completion} <= columns and text not in columns:
        text = None
    elif text == "text" and text not in columns and messages is None:
        _refuse_unnamed(columns)
    _need_one_form(sources, {messages} if messages else {text} if text else {prompt, completion})
    folder = find_directory(directory, root, "language")
    config = decoder_config(folder)
    again = partial(
        language_task, data, train=train, evaluation=evaluation, validation=validation, text=text, prompt=prompt,
        completion=completion, rationale=rationale, messages=messages, ends=ends, packed=packed, batch_size=batch_size,
        max_length=max_length, limit=limit, context=context, retained=retained, retained_evaluation=retained_evaluation,
        critic=critic, metric=metric, answer=answer, decoder_form=decoder_form,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder, config, "language", least=0.9, needs_padding=False)
    most = min(max_length, positions(config) or max_length)
    form = text_form(tokenizer, text, (prompt, rationale, completion), messages, ends)
    texts = _Texts(form, sources, batch_size, tokenizer.pad_token_id or 0, most, max_length, config.vocab_size)
    parts = (
        None if train is None else texts.read("training", limit, most if packed else None),
        texts.read("evaluation"),
        texts.read("validation"),
    )
    old, old_evaluation = (
        texts.read(part) if part in sources else None for part in ("retained", "retained evaluation")
    )
    example = _example(next(part for part in (parts[0], parts[2]) if part is not None), context + 1)
    judged, keeping = judged_by(metric, answer, tokenizer, ends_of_texts(folder, config))
    if isinstance(keeping, ParsedAnswers):
        keeping.check((("evaluation", parts[1]), ("validation", parts[2])))
    return Task(
        *parts,
        metric=judged,
        decision=choice,
        kept=keeping,
        class_axis=2,
        example=example,
        input_names=INPUTS,
        output_names=("logits",),
        dynamic_axes=FREE,
        timed={f"a prompt of {example[0].shape[1]} tokens": example},
        generates=True,
        decoder_form=form_of_file,
        directory=ModelDirectory(folder, lambda other: again(directory=other), partial(_spelled, tokenizer)),
        extra_files=DecoderFiles(folder, positions(config) or most, form_of_file),
        preprocessing={"tokenizer": "tokenizer.json", "max_length": most, "padding": "behind, to the longest"},
        notes=texts.notes,
        retained=old,
        retained_evaluation=old_evaluation,
        critic=None if critic is None else partial(_criticised, tokenizer, critic),
    )


def _criticised(
    tokenizer: Any, critic: Callable[[str, Sequence[str]], Sequence[float]], prompt: Tensor, answers: Sequence[Tensor]
) -> Sequence[float]:
    """What a function of texts says of answers to a prompt, in tokens."""
    rows = [prompt.tolist(), *([*prompt.tolist(), *answer.tolist()] for answer in answers)]
    asked, *wholes = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return critic(asked, [whole[len(asked) :] for whole in wholes])  # alone, an answer may lose the space before it


def _spelled(tokenizer: Any, data: Any) -> tuple[int, int]:
    """How many tokens of `NextTokens` are learned, and how many characters they spell."""
    rows = [data.tokens[i][data.learned[i] > 0].tolist() for i in data.ids.tolist()]
    spelled = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(map(len, rows)), sum(map(len, spelled))


def _example(data: NextTokens, length: int) -> tuple[Tensor, Tensor]:
    """Two texts of `length` tokens, or of as many as the second longest has: ids and mask, int64 [2, S]."""
    rows = sorted((len(row) for row in data.tokens), reverse=True)[:2]
    length = min(length, rows[-1])
    whole = [torch.as_tensor(row[:length]) for row in data.tokens if len(row) >= length][:2]
    ids = torch.stack(whole if len(whole) == 2 else whole * 2)
    return ids, torch.ones_like(ids)


# ---- texts of tables

_Source = tuple[str, Table]
"""what data is called in errors, and its columns"""


def _source(given: TextSource, root: Path | None) -> _Source:
    return str(given) if isinstance(given, str | Path) else "the table", read_table(given, root)


@dataclass
class _Texts:
    """Reads tables of texts, and notes what it does to them."""

    form: Form
    sources: dict[str, _Source]
    batch_size: int
    pad: int
    most: int
    """tokens of a text"""
    asked: int
    """`max_length`, which may be more than the model's positions"""
    words: int
    """tokens that the model knows"""
    notes: list[str] = field(default_factory=list)

    def read(self, part: str, rows: int | None = None, at_once: int | None = None) -> NextTokens:
        """The first `rows` texts of a part, several in a row of `at_once` tokens where that is given."""
        what, table = self.sources[part]
        whole = self.form(table, what, rows)
        check_tokens([text.tokens for text in whole], self.words, "language", what)
        if long := sum(len(text.tokens) > self.most for text in whole):
            limit = "max_length" if self.most == self.asked else f"the model's positions; max_length={self.asked}"
            self.notes.append(f"{long} of {len(whole)} {part} texts end after {self.most} tokens ({limit})")
        if merged := sum(text.merged for text in whole):
            self.notes.append(
                f"in {merged} of {len(whole)} {part} texts a token stands across the end of the prompt, and is learned "
                "whole; a prompt that does not end with a space has its own tokens"
            )
        cut = [replace(text, tokens=text.tokens[: self.most]) for text in whole]
        return next_tokens(cut, self.batch_size, self.pad, at_once)


def _refuse_unnamed(columns: set[str]) -> None:
    """Raises `InputError` where no column of texts is there, but one that seems to hold conversations."""
    if "messages" in columns:
        raise InputError(
            'language: evaluation data has a column "messages" and none of texts; where it holds conversations, say '
            'messages = "messages"'
        )


def _need_one_form(sources: dict[str, _Source], needed: set[str]) -> None:
    """Raises `InputError` where data for another purpose than evaluation has none of its columns."""
    if not needed <= column_names(sources["evaluation"][1]):
        return  # what is missing there is said where it is read
    for part, (what, table) in sources.items():
        if not needed & (names := column_names(table)):
            raise InputError(
                f"language: the {part} data ({what}) has the columns {', '.join(sorted(names))}, and the evaluation "
                f"data {', '.join(sorted(needed))}: all need one form, texts, prompts with completions, or messages"
            )
