"""Next tokens as a task: texts, or prompts with completions, for the causal model in a Hugging Face directory.

from pqk import compress
from pqk.models.answer_match import ParsedAnswers, TokenMetric, judged_by
from pqk.models.decoder import decoder
from pqk.models.language import language_task

teacher = decoder("my_model")
task = language_task(directory="my_model", train="train.jsonl", evaluation="test.jsonl")
compress(teacher, task, out="student")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk.data.data import Batch, digest_of
from pqk.data.structures import Outputs
from pqk.errors import InputError
from pqk.models.answer_match import ParsedAnswers, TokenMetric, judged_by
from pqk.models.decoder import FREE, INPUTS, decoder_config
from pqk.models.decoder_files import DecoderFiles, ends_of_texts
from pqk.models.hub import find_directory, load_tokenizer
from pqk.models.rationales import Parse
from pqk.models.text_data import (
    LabelledTokens,
    Table,
    TextSource,
    column,
    column_names,
    filled_strings,
    padded,
    read_table,
    strings,
)  # fmt: skip
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


@dataclass(frozen=True)
class Text:
    """The tokens of a text, of which the first `start` are read and not learned."""

    tokens: list[int]
    start: int = 1


def next_tokens(texts: Sequence[Text], batch_size: int, pad: int, packed: int | None = None) -> NextTokens:
    """Data of texts, one a row, or as many in a row of at most `packed` tokens as fit, in their order.

    Raises `InputError` for a text of which nothing is learned.
    """
    for row, text in enumerate(texts, 1):
        if len(text.tokens) <= max(text.start, 1):
            raise InputError(
                f"language: row {row} has {len(text.tokens)} tokens, as far as max_length goes, of which none follows "
                "its prompt; shorten it, take the row out, or raise max_length where the model has more positions"
            )
    rows = [[text] for text in texts] if packed is None else _packed(texts, packed)
    made = NextTokens([[token for text in row for token in text.tokens] for row in rows], None, batch_size, pad=pad)
    made.learned = [torch.cat([_learned(text) for text in row]) for row in rows]
    counts = [torch.tensor([len(text.tokens) for text in row]) for row in rows]
    made.parts = [torch.arange(1, len(n) + 1).repeat_interleave(n) for n in counts]
    return made


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
        train, evaluation, validation: .jsonl or .tsv files, `datasets` datasets, or tables of columns.
        text: the column of texts, of which every token is learned; None, and where there is no such column: prompts and
            completions.
        prompt, completion: columns; what stands in the prompt is not learned.
        rationale: the column of worked steps, which are learned before the completion, on lines of their own.
        messages: the column of conversations in the form of chat templates; the last message is learned.
        ends: whether the token that ends texts is learned behind each; by default, not behind plain texts.
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

    Raises `InputError` for files, columns and tokenizers that do not fit the model or each other, and for texts of
    which nothing is learned.
    """
    root, form_of_file = None if data is None else Path(data), DecoderForm.of(decoder_form)
    if (limit is not None and limit < 1) or max_length < 2:
        raise InputError(
            f"language: limit={limit} and max_length={max_length} must leave a text of two tokens, at least"
        )
    columns = column_names(read_table(evaluation, root))
    if text == "text" and {prompt, completion} <= columns and text not in columns:
        text = None
    folder = find_directory(directory, root, "language")
    config = decoder_config(folder)
    again = partial(
        language_task, data, train=train, evaluation=evaluation, validation=validation, text=text, prompt=prompt,
        completion=completion, rationale=rationale, messages=messages, ends=ends, packed=packed, batch_size=batch_size,
        max_length=max_length, limit=limit, context=context, retained=retained, retained_evaluation=retained_evaluation,
        critic=critic, metric=metric, answer=answer, decoder_form=decoder_form,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder, config, "language", least=0.9, needs_padding=False)
    most = min(max_length, config.max_position_embeddings)
    form = _form(tokenizer, text, (prompt, rationale, completion), messages, ends)
    texts = _Texts(form, root, batch_size, tokenizer.pad_token_id or 0, most, max_length)
    parts = (
        None if train is None else texts.read("training", train, limit, most if packed else None),
        texts.read("evaluation", evaluation),
        texts.read("validation", validation),
    )
    old, old_evaluation = (
        None if source is None else texts.read(part, source)
        for part, source in (("retained", retained), ("retained evaluation", retained_evaluation))
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
        extra_files=DecoderFiles(folder, config.max_position_embeddings, form_of_file),
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
    asked, *said = tokenizer.batch_decode(
        [t.tolist() for t in (prompt, *answers)], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return critic(asked, said)


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

Form = Callable[[Table, str, int | None], list[Text]]
"""(columns, what they are called in errors, how many rows) -> texts"""


@dataclass
class _Texts:
    """Reads tables of texts, and notes what it cuts off them."""

    form: Form
    root: Path | None
    batch_size: int
    pad: int
    most: int
    """tokens of a text"""
    asked: int
    """`max_length`, which may be more than the model's positions"""
    notes: list[str] = field(default_factory=list)

    def read(self, part: str, source: TextSource, rows: int | None = None, at_once: int | None = None) -> NextTokens:
        """The first `rows` texts of a file or table, several in a row of `at_once` tokens where that is given."""
        what = str(source) if isinstance(source, str | Path) else "the table"
        whole = self.form(read_table(source, self.root), what, rows)
        if long := sum(len(text.tokens) > self.most for text in whole):
            limit = "max_length" if self.most == self.asked else f"the model's positions; max_length={self.asked}"
            self.notes.append(f"{long} of {len(whole)} {part} texts end after {self.most} tokens ({limit})")
        return next_tokens([Text(t.tokens[: self.most], t.start) for t in whole], self.batch_size, self.pad, at_once)


def _form(
    tokenizer: Any,
    text: str | None,
    answered: tuple[str, str | None, str],
    messages: str | None,
    ends: bool | None,
) -> Form:
    """How texts are read. Raises `InputError` for a tokenizer without the template or the token that is needed."""
    if messages is not None:
        return partial(_conversations, tokenizer, messages)
    end = [tokenizer.eos_token_id] if (text is None if ends is None else ends) else []
    if None in end:
        raise InputError("language: the tokenizer has no token that ends texts; say ends=False")
    if text is not None:
        return partial(_plain, tokenizer, text, end)
    return partial(_completions, tokenizer, answered, end)


def _plain(tokenizer: Any, name: str, end: list[int], table: Table, what: str, rows: int | None) -> list[Text]:
    found = tokenizer(strings(table, name, what)[:rows], verbose=False)["input_ids"]
    return [Text([*tokens, *end]) for tokens in found]


def _completions(
    tokenizer: Any, names: tuple[str, str | None, str], end: list[int], table: Table, what: str, rows: int | None
) -> list[Text]:
    prompt, rationale, completion = names
    asked, answered = strings(table, prompt, what)[:rows], filled_strings(table, completion, what, rows)
    steps = None if rationale is None else strings(table, rationale, what)[:rows]
    if steps is not None:
        answered = [f"{step}\n{answer}" for step, answer in zip(steps, answered, strict=True)]
    prompts = tokenizer(asked, verbose=False)["input_ids"]
    answers = tokenizer(answered, add_special_tokens=False, verbose=False)["input_ids"]
    return [Text([*p, *a, *end], len(p)) for p, a in zip(prompts, answers, strict=True)]


def _conversations(tokenizer: Any, name: str, table: Table, what: str, rows: int | None) -> list[Text]:
    """What stands before the last message of each, with the template's begin of an answer, is not learned."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("language: the tokenizer has no chat template; give prompts and completions")
    found = []
    for row, said in enumerate(column(table, name, what)[:rows], 1):
        fits = isinstance(said, list | tuple) and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in said)
        if not fits or len(said) < 2 or said[-1]["role"] != "assistant":
            raise InputError(
                f"language: row {row} of {what} must have in {name} at least two messages with role and content, the "
                "last of which is the assistant's"
            )
        whole = tokenizer.apply_chat_template(said)
        before = tokenizer.apply_chat_template(said[:-1], add_generation_prompt=True)
        if whole[: len(before)] != before:
            raise InputError("language: the chat template changes what was said before when an answer follows")
        found.append(Text(whole, len(before)))
    return found
