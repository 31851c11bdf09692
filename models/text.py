"""Texts as a task: tables of texts and labels, tokenized, in batches of like length, padded to the longest of each.

from pqk import compress
from pqk.models.encoder import encoder
from pqk.models.text import text_task

teacher = encoder("my_model")  # a Hugging Face directory
task = text_task(directory="my_model", train="train.tsv", evaluation="test.tsv")
compress(teacher, task, out="student")  # a Hugging Face directory, too
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.data.checks import check_sizes
from pqk.data.structures import Outputs, first_tensor, widened
from pqk.errors import InputError, nearest
from pqk.models.encoder import (
    FREE,
    INPUTS,
    KINDS,
    Encoder,
    HubFiles,
    load,
    positions,
)
from pqk.models.hub import find_directory, load_tokenizer
from pqk.models.text_data import (
    Altered,
    TextData,
    TextSource,
    Tokens,
    check_tokens,
    column,
    is_rows,
    padded,
    read_table,
)
from pqk.task.metrics import Metric, argmax, cross_entropy
from pqk.task.task import Task

# ---- metrics


def ranks(x: Tensor) -> Tensor:
    """The ranks of `x` [N], 0 the smallest; equal values share the mean of theirs. float64 [N]."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of `a` and `b` [N], -1 to 1; 0 where one of them is constant."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    norm = float(x.norm() * y.norm())
    return min(1.0, max(-1.0, float(x @ y) / norm)) if norm else 0.0


def similarities(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of rows of [N, D]: [N (N - 1) / 2]."""
    unit = F.normalize(embeddings.double(), dim=-1)
    rows, columns = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[rows, columns].float()


def _score(outputs: Outputs) -> Tensor:
    return widened(first_tensor(outputs)).squeeze(-1)


def _squared_error(outputs: Outputs, targets: Tensor) -> Tensor:
    return (_score(outputs) - targets).square()


def _cosine_distance(outputs: Outputs, targets: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(widened(first_tensor(outputs)), targets, dim=-1)


def _more_alike(outputs: Outputs) -> Tensor:
    """What every ranking is made of: whether text j or the one behind it is more like text i, bool [N, N].

    Not which text is the nearest of all: that is decided among near ties, and the more texts, the nearer they are.
    """
    unit = F.normalize(widened(first_tensor(outputs)), dim=-1)
    similar = unit @ unit.T
    return similar > similar.roll(-1, 1)


SCORES = Metric("spearman", "correlation", lambda outputs, targets: spearman(_score(outputs), targets))
AGREEMENT = Metric(
    "spearman of similarities",
    "correlation",
    lambda outputs, targets: spearman(similarities(first_tensor(outputs)), similarities(targets)),
)
"""between all pairs of texts, the student's similarities against the teacher's"""


# ---- the task


def text_task(
    data: str | Path | None = None,
    *,
    directory: str | Path,
    train: TextSource | Sequence[TextSource] | None,
    evaluation: TextSource | Sequence[TextSource],
    validation: TextSource | Sequence[TextSource] | None = None,
    task: str = "classification",
    text: str = "text",
    label: str = "label",
    batch_size: int = 32,
    max_length: int = 128,
    validation_share: float = 0.1,
    example_length: int | None = None,
    timed_lengths: Sequence[int] = (128,),
    limit: int | None = None,
    evaluation_limit: int | None = None,
    views: int = 1,
) -> Task:
    """Texts for the encoder in a Hugging Face directory.

    Args:
        data: the folder that file names are looked up in, beside the current one.
        directory: the model's; its tokenizer is used and shipped. `package:NAME/FOLDER` is a folder of a package.
        train, evaluation, validation: .tsv or .jsonl files, tables of columns or rows, or several of them, equally
            drawn from.
        task: "classification", "regression", or "embedding", which needs no labels: its metric is the rank correlation
            with the model's own similarities, which are computed here for validation and evaluation.
        text, label: names of columns. Labels are numbers, or the names that the model's configuration lists.
        batch_size: texts a step.
        max_length: tokens of a text; longer ones are cut, which the report counts.
        validation_share: share of train that is held out where there is no `validation`.
        example_length: tokens of the example, at which latency is measured; the median length if None.
        timed_lengths: tokens of further inputs that teacher and student are timed on, as far as the model takes them.
        limit, evaluation_limit: use only so many texts of train, of evaluation, drawn once and for all.
        views: forms in which a text of train is seen, epoch after epoch: as it is, then with tokens masked or as a part
            of itself (`Altered`). The teacher answers each once; its labels, if any, stay those of the whole.

    Raises `InputError` for files, columns, labels and tokenizers that do not fit the model or each other.
    """
    if task not in KINDS:
        raise InputError(f'text: unknown task "{task}"{nearest(task, KINDS)}')
    check_sizes("text", batch_size=batch_size, views=views)
    check_sizes("text", 3, max_length=max_length)
    limits = {"limit": limit, "evaluation_limit": evaluation_limit, "example_length": example_length}
    check_sizes("text", **{name: value for name, value in limits.items() if value is not None})
    for length in timed_lengths:
        check_sizes("text", 2, timed_lengths=length)
    root = None if data is None else Path(data)
    folder = find_directory(directory, root)
    model, config = load(folder, task)
    tokens = Tokens(load_tokenizer(folder, config), min(max_length, positions(config)))
    reader = TextReader(tokens, config, task, root, text, label, batch_size)
    parts = _read_parts(
        reader, train, evaluation, validation, limit=limit, evaluation_limit=evaluation_limit, share=validation_share
    )
    if parts.train is not None and views > 1:
        altered = parts.train.altered_by(Altered(views, tokens.tokenizer.mask_token_id))
        parts = parts._replace(train=altered)
    if task == "embedding":
        parts = _with_embeddings(parts, Encoder(model, task).eval())
    lengths = parts.validation.lengths[parts.validation.ids]
    return Task(
        *parts,
        **_judgement(task, parts.validation),
        example=_example(parts.evaluation, example_length or int(lengths.median())),
        input_names=INPUTS,
        output_names=("sentence_embedding", "last_hidden_state") if task == "embedding" else ("logits",),
        dynamic_axes=FREE,
        timed={f"{n} tokens": _filled(parts.evaluation, n) for n in timed_lengths if n <= tokens.most},
        preprocessing={"tokenizer": "tokenizer.json", "max_length": tokens.most, "padding": "to the longest"},
        extra_files=HubFiles(folder, task),
        notes=tokens.notes,
    )  # fmt: skip


@dataclass(frozen=True)
class TextReader:
    """Reads texts and labels as data for one model, through its tokenizer."""

    tokens: Tokens
    config: Any
    """the model's configuration of `transformers`: its labels and its padding token"""
    task: str = "classification"
    root: Path | None = None
    """the folder that file names are looked up in"""
    text: str = "text"
    label: str = "label"
    batch_size: int = 32

    def read(self, source: TextSource | Sequence[TextSource], what: str, limit: int | None = None) -> TextData:
        """The data of a source, called `what` in messages and notes; `limit` texts of it, drawn once and for all.

        Raises `InputError` for files, columns and labels that do not fit.
        """
        label = None if self.task == "embedding" else self.label
        texts, labels = rows_of(source, self.root, self.text, label, limit)
        targets = None if label is None else targets_of(self.task, self.config)(labels, what)
        tokens = self.tokens(texts, what)
        check_tokens(tokens, self.config.vocab_size, "text", what)
        return TextData(tokens, targets, self.batch_size, pad=self.config.pad_token_id or 0)


class _Parts(NamedTuple):
    """In the order in which a `Task` takes them."""

    train: TextData | None
    evaluation: TextData
    validation: TextData


def _read_parts(
    reader: TextReader, train: Any, evaluation: Any, validation: Any, *, limit: int | None,
    evaluation_limit: int | None, share: float,
) -> _Parts:  # fmt: skip
    """The data of a task; `share` of train is held out where there is no validation data."""
    train_data = None if train is None else reader.read(train, "train", limit)
    evaluation_data = reader.read(evaluation, "evaluation", evaluation_limit)
    if validation is not None:
        return _Parts(train_data, evaluation_data, reader.read(validation, "validation"))
    if train_data is None:
        raise InputError("text: neither train nor validation; calibration needs some texts")
    train_data, validation_data = held_out(train_data, share)
    return _Parts(train_data, evaluation_data, validation_data)


def _with_embeddings(parts: _Parts, model: Encoder) -> _Parts:
    """With the model's own embeddings as the targets of all that is judged."""
    validation, evaluation = (d.subset(d.ids, embeddings(model, d)) for d in (parts.validation, parts.evaluation))
    return _Parts(parts.train, evaluation, validation)


def _judgement(task: str, held: TextData) -> dict[str, Any]:
    """Metric, loss and decision of a task, whose validation data is `held`."""
    if task == "classification":
        return {"metric": "accuracy", "loss": cross_entropy, "decision": argmax}
    if task == "embedding":
        return {"metric": AGREEMENT, "loss": _cosine_distance, "decision": _more_alike}
    assert held.targets is not None
    spread = float(held.targets.std()) or 1.0  # a score is acted on as low or high: in whole standard deviations
    return {
        "metric": SCORES,
        "loss": _squared_error,
        "decision": lambda outputs: (_score(outputs) / spread).round().long(),
    }


def rows_of(
    source: Any, root: Path | None, text: str, label: str | None, most: int | None
) -> tuple[list[Any], list[Any]]:
    """Texts and labels of a source, or of several, which give equal parts of the `most` rows that are drawn."""
    several = isinstance(source, list | tuple) and not is_rows(source)
    texts: list[Any] = []
    labels: list[Any] = []
    for one in source if several else [source]:
        what = str(one) if isinstance(one, str | Path) else "the table"
        table = read_table(one, root)
        all_texts = column(table, text, what)
        rows: Sequence[int] = range(len(all_texts))
        if most is not None:
            share = most // len(source) if several else most
            order = torch.randperm(len(all_texts), generator=torch.Generator().manual_seed(0))
            rows = order[:share].sort().values.tolist()
        texts += [all_texts[i] for i in rows]
        if label is not None:
            all_labels = column(table, label, what)
            if len(all_labels) != len(all_texts):
                raise InputError(f"text: {what} has {len(all_texts)} texts and {len(all_labels)} labels")
            labels += [all_labels[i] for i in rows]
    return texts, labels


def targets_of(task: str, config: Any) -> Callable[[Sequence[Any], str], Tensor]:
    """How labels become targets: int64 classes of the head, or float32 scores."""

    def classes(labels: Sequence[Any], what: str) -> Tensor:
        numbers = []
        for row, value in enumerate(labels, 1):
            by_name = config.label2id.get(value) if isinstance(value, str) else None
            try:
                number = int(value) if by_name is None else by_name
                if by_name is None and not isinstance(value, str) and number != value:
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                raise InputError(
                    f'text: the label of row {row} of {what} is "{value}", which is neither a whole number nor the '
                    f"name of one of the {config.num_labels} labels in config.json"
                ) from None
            if not 0 <= number < config.num_labels:
                raise InputError(
                    f"text: the label of row {row} of {what} is {number} and the head has {config.num_labels} (0 to "
                    f"{config.num_labels - 1}); fine-tune a model with as many"
                )
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.int64)

    def scores(labels: Sequence[Any], what: str) -> Tensor:
        try:
            values = torch.tensor([float(value) for value in labels], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"text: a score of {what} is not a number: {error}") from error
        if not bool(values.isfinite().all()):
            raise InputError(
                f"text: the score of row {int((~values.isfinite()).nonzero()[0]) + 1} of {what} is not finite"
            )
        return values

    return scores if task == "regression" else classes


def held_out(data: TextData, share: float) -> tuple[TextData, TextData]:
    """(rest, held-out share), by a fixed permutation."""
    count = max(1, round(data.samples * share))
    if not 0 < share < 1 or count >= data.samples:
        raise InputError(f"text: validation_share={share} of {data.samples} texts leaves nothing to train or choose by")
    order = data.ids[torch.randperm(data.samples, generator=torch.Generator().manual_seed(0))]
    return data.subset(order[count:].sort().values), data.subset(order[:count].sort().values)


def _example(data: TextData, length: int) -> tuple[Tensor, Tensor]:
    """The two texts whose lengths are nearest to `length`, at that length (and three tokens at least)."""
    if data.samples < 2:
        raise InputError(f"text: {data.samples} texts to evaluate; at least 2 are needed")
    length = max(length, 3)
    close = data.ids[(data.lengths[data.ids] - length).abs().sort(stable=True).indices[:2]]
    return padded([data.tokens[i][:length] for i in close], data.pad, length)


def _filled(data: TextData, length: int) -> tuple[Tensor, Tensor]:
    """Two texts of just `length` tokens: what stands between the first and the last token of each, joined."""
    ends = data.tokens[int(data.ids[0])]
    inner = torch.cat([*(data.tokens[i][1:-1] for i in data.ids), ends[:1]])  # not empty where all texts are
    inner = inner.repeat(-(-2 * length // len(inner)))[: 2 * (length - 2)].reshape(2, length - 2)
    ids = torch.cat([ends[:1].expand(2, 1), inner, ends[-1:].expand(2, 1)], 1)
    return ids, torch.ones_like(ids)


@torch.inference_mode()
def embeddings(model: Encoder, data: TextData) -> Tensor:
    """The embedding of every text of `data` by `model`: float32 [rows, D] by row; rows outside `ids` are zero."""
    table: Tensor | None = None
    for batch in data.batches():
        rows = first_tensor(model(*batch.inputs))
        if table is None:
            table = rows.new_zeros(len(data.tokens), rows.shape[1])
        assert batch.keys is not None
        table[batch.keys] = rows
    assert table is not None
    return table
