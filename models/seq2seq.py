"""Sequence-to-sequence tasks: pairs of texts for the encoder-decoder model in a Hugging Face directory.

from pqk import compress
from pqk.models.encoder_decoder import encoder_decoder
from pqk.models.seq2seq import seq2seq_task

teacher = encoder_decoder("my_model")
task = seq2seq_task(directory="my_model", train="train.jsonl", evaluation="test.jsonl", validation="dev.jsonl")
compress(teacher, task, out="student")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk.core.onnxruntime_session import TARGET
from pqk.data.checks import check_sizes
from pqk.data.data import Batch, Data, digest_of
from pqk.data.sequences import padded
from pqk.data.structures import Inputs
from pqk.errors import InputError
from pqk.models.answer_match import LIKELIHOOD, ParsedAnswers, TokenMetric, judged_by
from pqk.models.decoder_files import ends_of_texts
from pqk.models.encoder_decoder import AXES, SOURCE, encoder_decoder_config, reads_sounds
from pqk.models.encoder_decoder_files import EncoderDecoderFiles
from pqk.models.hub import find_directory, load_tokenizer
from pqk.models.language import choice
from pqk.models.rationales import Parse
from pqk.models.text_data import (
    LabelledTokens,
    Table,
    TextSource,
    check_tokens,
    column_names,
    filled_strings,
    read_table,
    strings,
)
from pqk.task.classes import IGNORED
from pqk.task.kept_tokens import kept
from pqk.task.metrics import Metric
from pqk.task.task import Task

PROMPTS = ("prompt", "completion")
"""columns that are read where there are no columns `source` and `target`"""


class SequencePairs(LabelledTokens):
    """Sources with their targets, teacher-forced.

    Inputs `input_ids`, `attention_mask` [B, S] and `decoder_input_ids`, `decoder_attention_mask` [B, T]: the target
    behind the token that begins all of them, without its last one. Targets are the target's own tokens [B, T], -100
    where it is padded. All are int64.
    """

    wanted: list[Tensor]
    """for each row, the target's tokens: int64"""
    begin: int
    """the token that targets begin with, in the decoder's inputs"""

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        for batch in super().batches(seed, epoch, start, state):
            rows = [] if batch.keys is None else batch.keys.tolist()
            ids, mask, targets = teacher_forced([self.wanted[i] for i in rows], self.begin, self.pad)
            yield Batch((*batch.inputs, ids, mask), targets, batch.keys)

    def fingerprint(self) -> str:
        lengths = torch.tensor([len(tokens) for tokens in self.wanted])
        return digest_of((super().fingerprint(), self.begin), (torch.cat(self.wanted), lengths))


def teacher_forced(wanted: Sequence[Tensor], begin: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a decoder reads of targets, its mask, and the tokens that it is to predict: int64 [B, T] each.

    Args:
        wanted: the tokens of each target, int64.
        begin: the token that is read first.
        pad: the token behind shorter targets; they are -100 in what is to be predicted.
    """
    first = torch.tensor([begin])
    ids, mask = padded([torch.cat([first, tokens[:-1]]) for tokens in wanted], pad)
    return ids, mask, padded(list(wanted), IGNORED)[0]


def sequence_pairs(
    sources: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], batch_size: int, pad: int, begin: int
) -> SequencePairs:
    """Data of the tokens of sources and of targets. Raises `InputError` for a source or a target without tokens."""
    made = SequencePairs(sources, None, batch_size, pad=pad)
    made.wanted, made.begin = tensors_of(wanted), begin
    return made


def tensors_of(wanted: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tokens of each target, int64. Raises `InputError` for a target without tokens."""
    for row, tokens in enumerate(wanted, 1):
        if not len(tokens):
            raise InputError(f"seq2seq: row {row} has a target without tokens")
    return [torch.tensor(tokens, dtype=torch.int64) for tokens in wanted]


@dataclass(frozen=True)
class SequenceEnds:
    """How a model's sequences begin and end, and how long they may be."""

    begin: int
    """the token that the decoder reads first"""
    end: int
    """the token behind a target"""
    pad: int
    longest: int
    """tokens of a source, and of a target"""

    @classmethod
    def of(cls, folder: Path, config: Any, tokenizer: Any, max_length: int) -> SequenceEnds:
        """Those of a directory. Raises `InputError` where it does not say them."""
        begin, end = config.decoder_start_token_id, tokenizer.eos_token_id
        for name, token in (("decoder_start_token_id", begin), ("eos_token_id", end)):
            if token is None:
                raise InputError(f"seq2seq: {folder} says no {name}, by which targets begin or end")
            if token >= (words := target_words(config)):
                raise InputError(f"seq2seq: {folder} says {name} {token}, and targets have {words} tokens, from 0")
        check_sizes("seq2seq", 2, max_length=max_length)
        positions = [getattr(config, n, None) for n in ("max_position_embeddings", "max_target_positions")]
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(begin, end, pad, min([max_length, *filter(None, positions)]))

    def cut(self, texts: Sequence[Sequence[int]], what: str) -> list[str]:
        """What the report should say of texts that are longer, called `what`."""
        long = sum(len(tokens) > self.longest for tokens in texts)
        return [f"{long} of {len(texts)} {what} end after {self.longest} tokens"] if long else []

    def target(self, tokens: Sequence[int]) -> list[int]:
        """A tokenizer's tokens of a target as the decoder is to predict them: its begin is read alone, its end too."""
        own = list(tokens[1:] if tokens and tokens[0] == self.begin != self.end else tokens)
        return (own if own and own[-1] == self.end else [*own, self.end])[: self.longest]


def target_words(config: Any) -> int:
    """How many tokens of targets a model knows."""
    return int(getattr(config, "decoder_vocab_size", None) or config.vocab_size)


def seq2seq_task(
    data: str | Path | None = None,
    *,
    directory: str | Path,
    train: TextSource | None,
    evaluation: TextSource,
    validation: TextSource,
    source: str = "source",
    target: str = "target",
    prefix: str = "",
    batch_size: int = 16,
    max_length: int = 256,
    limit: int | None = None,
    context: int = 16,
    metric: Metric | TokenMetric = "log-likelihood",
    answer: str | Parse | None = None,
) -> Task:
    """Pairs of texts for the encoder-decoder model in a Hugging Face directory.

    Args:
        data: the folder that file names are looked up in, beside the current one.
        directory: the model's; its tokenizer is used.
        train, evaluation, validation: .jsonl or .tsv files, `datasets` datasets, or tables of columns or rows.
        source, target: columns: what is read, and what is generated; where there are none of these names, "prompt" and
            "completion".
        prefix: put before every source, such as "translate English to German: ".
        batch_size: pairs a step, of like length, padded to the longest.
        max_length: tokens of a source and of a target, of which longer ones lose the rest.
        limit: use only the first so many pairs of train.
        context: tokens of a target that are kept where one more is timed.
        metric, answer: how the model is judged, as of `pqk.models.language.language_task`.

    Raises `InputError` for files, columns and tokenizers that do not fit the model or each other, for empty targets,
    and for a model that reads sounds, which `pqk.models.transcription` has a task for.
    """
    root = None if data is None else Path(data)
    check_sizes("seq2seq", batch_size=batch_size, context=context, **({} if limit is None else {"limit": limit}))
    folder = find_directory(directory, root, "seq2seq")
    config = encoder_decoder_config(folder)
    if reads_sounds(config):
        raise InputError(
            f"seq2seq: {folder} is a {config.model_type}, which reads sounds and no texts; "
            "pqk.models.transcription.transcription_task takes it"
        )
    tokenizer = load_tokenizer(folder, config, "seq2seq", least=0.9, needs_padding=False)
    ends = SequenceEnds.of(folder, config, tokenizer, max_length)

    pairs = _Pairs(tokenizer, root, (source, target), prefix, batch_size, ends, config)
    parts = (
        None if train is None else pairs.read("training", train, limit),
        pairs.read("evaluation", evaluation),
        pairs.read("validation", validation),
    )
    example = _example(next(part for part in (parts[0], parts[2]) if part is not None), context + 1)
    spoken = f"a source of {example[0].shape[1]} tokens"
    judged = judged_by(metric, answer, tokenizer, ends_of_texts(folder, config))
    if isinstance(judged[1], ParsedAnswers):
        judged[1].check((("evaluation", parts[1]), ("validation", parts[2])))
    return task_of(parts, example, (*SOURCE, *TARGET), spoken, folder, ends, pairs.notes, judged, prefix=prefix)


@dataclass
class _Pairs:
    """Reads tables of pairs, and notes what it cuts off them."""

    tokenizer: Any
    root: Path | None
    names: tuple[str, str]
    prefix: str
    batch_size: int
    ends: SequenceEnds
    config: Any
    """the model's configuration"""
    notes: list[str] = field(default_factory=list)

    def read(self, part: str, given: TextSource, rows: int | None = None) -> SequencePairs:
        """The first `rows` pairs of a file or table."""
        what = str(given) if isinstance(given, str | Path) else "the table"
        table, ends = read_table(given, self.root), self.ends
        source, target = pair_columns(table, *self.names)
        asked, wanted = strings(table, source, what)[:rows], filled_strings(table, target, what, rows)
        prompts = [self.prefix + text for text in asked]
        whole = self.tokenizer(prompts, verbose=False)["input_ids"]
        sources = self.tokenizer(prompts, truncation=True, max_length=ends.longest, verbose=False)["input_ids"]
        targets = self.tokenizer(text_target=wanted, verbose=False)["input_ids"]
        check_tokens(whole, self.config.vocab_size, "seq2seq", what)
        check_tokens(targets, target_words(self.config), "seq2seq", what)
        self.notes += [*ends.cut(whole, f"{part} sources"), *ends.cut(targets, f"{part} targets")]
        return sequence_pairs(sources, [*map(ends.target, targets)], self.batch_size, ends.pad, ends.begin)


def task_of(
    parts: tuple[Data | None, Data | None, Data | None],
    example: Inputs,
    names: tuple[str, ...],
    source: str,
    folder: Path,
    ends: SequenceEnds,
    notes: Sequence[str] = (),
    judged: tuple[Metric, Any] = (LIKELIHOOD, kept),
    **preprocessing: str,
) -> Task:
    """The task of an encoder-decoder: teacher-forced targets, judged by their likelihood.

    Args:
        parts: data for training (None: there is none), evaluation and validation.
        example: inputs of two samples: of the source, then ids and mask int64 [2, T] of the target.
        names: of the inputs.
        source: how rows of times call the source, such as "a source of 9 tokens".
        folder: the model's directory.
        ends: how its sequences begin and end.
        notes: what the report should say of the data.
        judged: the metric, and what is kept of each token's scores.
        preprocessing: what else the artifact says of how inputs are made.
    """
    first = (*example[:-2], *(t[:, :1] for t in example[-2:]))
    said = {"tokenizer": "tokenizer.json", "max_length": ends.longest, "padding": "behind, to the longest"}
    return Task(
        *parts,
        metric=judged[0],
        decision=choice,
        kept=judged[1],
        class_axis=2,
        example=example,
        input_names=names,
        output_names=("logits",),
        dynamic_axes={name: AXES[name] for name in names},
        timed={f"{source} and the first of its target": first},
        seq2seq=True,
        extra_files=EncoderDecoderFiles(folder),
        preprocessing={**said, **preprocessing},
        notes=notes,
    )


def pair_columns(table: Table, source: str, target: str) -> tuple[str, str]:
    """The columns of sources and targets: those of these names, or prompts and completions where neither is there."""
    names = column_names(table)
    return PROMPTS if not {source, target} & names and {*PROMPTS} <= names else (source, target)


def _example(data: SequencePairs, length: int) -> Inputs:
    """Two sources of the usual length, at least 2, and `length` tokens of two targets; shorter ones are repeated."""
    usual = int(data.lengths.median())
    rows = (data.lengths >= usual).nonzero().flatten()[:2].tolist()
    rows = rows if len(rows) == 2 else rows * 2
    usual = max(usual, 2)  # a tracer takes a size of 1 for one that never changes; so single tokens stand twice
    ids = torch.stack([data.tokens[row].repeat(2)[:usual] for row in rows])
    return ids, torch.ones_like(ids), *target_example([data.wanted[row] for row in rows], data.begin, length)


def target_example(wanted: Sequence[Tensor], begin: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, `length`], of targets that are repeated where they have fewer tokens."""
    first = torch.tensor([begin])
    ids = torch.stack([torch.cat([first, *[tokens] * length])[:length] for tokens in wanted])
    return ids, torch.ones_like(ids)
