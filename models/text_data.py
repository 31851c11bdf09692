"""Tables of texts, and token sequences in batches of like length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pqk.data.checks import check_sizes, why_not_text
from pqk.data.data import Batch, Data, digest_of
from pqk.data.folders import data_folders
from pqk.data.sequences import padded
from pqk.errors import InputError, nearest
from pqk.models.hub import quietly

Table = Mapping[str, Sequence[Any]]
"""columns by name: a dict of lists, or a `datasets` dataset"""
TextRows = Sequence[Mapping[str, Any]]
"""rows, each with a value by the name of its column"""
TextSource = str | Path | Table | TextRows
POOL = 50
"""batches whose samples are sorted by length together: enough to waste little padding, few enough to stay random"""


# ---- tables


def read_table(source: TextSource, data: Path | None = None) -> Table:
    """The columns of a .tsv or .jsonl file (UTF-8), of a list of rows, or `source` itself where it has columns.

    A TSV file has one line of names and no quoting. Raises `InputError` for what is none of these, with the line or row
    of whatever is wrong.
    """
    if not isinstance(source, str | Path):
        return _of_rows(source, "the table") if isinstance(source, list | tuple) else _checked(source)
    path = next((p for folder in (Path(), *data_folders(data)) if (p := folder / source).is_file()), None)
    if path is None:
        raise InputError(f"text: no file {source}; point --data or PQK_DATA at the folder that has it")
    if path.suffix in (".json", ".csv"):
        raise InputError(
            f"text: {path} is neither .jsonl, of one JSON object a line, nor .tsv, of a header and fields between "
            "tabs; write it as one of them"
        )
    lines = list(_lines(path))
    return _of_rows(_jsonl(path, lines) if path.suffix == ".jsonl" else _tsv(path, lines), str(path))


def is_rows(source: Any) -> bool:
    """Whether a list is the rows of one table, and not several tables, whose columns are lists."""
    return isinstance(source, list | tuple) and all(
        isinstance(row, Mapping) and all(isinstance(value, str | float | int) for value in row.values())
        for row in source
    )


def _of_rows(rows: Sequence[Any], what: str) -> Table:
    """The columns of rows that have the same fields."""
    if not rows:
        raise InputError(f"text: {what} has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(f"text: row {number} of {what} is no dict with a value for each column, but {_kind(row)}")
        if row.keys() != rows[0].keys():
            raise InputError(f"text: row {number} of {what} has the fields {sorted(row)}, the first {sorted(rows[0])}")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _checked(table: Any) -> Table:
    """A table whose columns have one length."""
    if hasattr(table, "column_names") or (hasattr(table, "keys") and not isinstance(table, Mapping)):
        return cast("Table", table)  # of a library, which sees to that
    if not isinstance(table, Mapping):
        raise InputError(
            f"text: a table is a .jsonl or .tsv file, a dict of columns, a `datasets` dataset or a list of rows, and "
            f"not {_kind(table)}"
        )
    for name, values in table.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise InputError(f"text: the column {name} of the table is no list, but {_kind(values)}")
    lengths = {name: len(values) for name, values in table.items()}
    if len({*lengths.values()}) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"text: the columns of the table have different lengths: {said}; each row has a value in each")
    return table


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({value!r:.40})"


def _lines(path: Path) -> Iterator[str]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.replace(b"\r\n", b"\n").split(b"\n"), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"text: line {number} of {path} is not UTF-8 (byte {line[error.start]:#x} at {error.start}): its lines "
                "are of mixed or another encoding; write the whole file as UTF-8 first"
            ) from error


def _tsv(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    names, rows = lines[0].split("\t"), []
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"text: the header of {path} has {', '.join(twice)} more than once; give each column a name")
    for number, line in enumerate(lines[1:], 2):
        if not line and number == len(lines):
            break  # what follows the last newline
        fields = line.split("\t")
        if len(fields) != len(names):
            raise InputError(f"text: line {number} of {path} has {len(fields)} fields and the header {len(names)}")
        rows.append(dict(zip(names, fields, strict=True)))
    return rows


def _jsonl(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter of one that is nested too deeply
            raise InputError(f"text: line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"text: line {number} of {path} is a {type(row).__name__}, not an object with fields")
        rows.append(row)
    return rows


def column(table: Table, name: str, what: str) -> list[Any]:
    """A column as a list. Raises `InputError` naming the nearest known one."""
    try:
        return list(table[name])
    except KeyError as error:
        raise InputError(f'text: {what} has no column "{name}"{nearest(name, sorted(column_names(table)))}') from error


def column_names(table: Table) -> set[str]:
    """The names of a table's columns."""
    return {*map(str, getattr(table, "column_names", None) or list(table))}


def strings(table: Table, name: str, what: str) -> list[str]:
    """A column of texts. Raises `InputError` for another value, naming its row."""
    values = column(table, name, what)
    for row, value in enumerate(values, 1):
        if (reason := why_not_text(value)) is not None:
            raise InputError(f"text: row {row} of {what} has in {name} {reason}")
    return values


def filled_strings(table: Table, name: str, what: str, rows: int | None = None) -> list[str]:
    """The first `rows` of a column of texts. Raises `InputError` for one that is empty or blank, naming its row."""
    values = strings(table, name, what)[:rows]
    for row, value in enumerate(values, 1):
        if not value.strip():
            raise InputError(f"text: row {row} of {what} has an empty {name}")
    return values


# ---- tokens


@dataclass(frozen=True)
class Altered:
    """Other texts for the teacher to label, made of those that there are (Tang et al. 2019, arXiv:1903.12136, 3.2).

    Each token is masked with probability `mask`, and with probability `cut` only a part of the text is left, as long as
    chance will have it. The first and the last token stay, because most tokenizers put special ones there.
    """

    views: int
    """distinct forms of a text; form 0 is the text as it is"""
    token: int | None
    """the mask token's id; None: the tokenizer has none, and nothing is masked"""
    mask: float = 0.1
    cut: float = 0.5

    def __call__(self, tokens: Tensor, row: int, view: int) -> Tensor:
        """Form `view` of the text [S] in `row`, [S'] with S' from min(S, 3) to S: a function of (row, view) alone."""
        if view == 0 or len(tokens) < 4:
            return tokens
        generator = torch.Generator().manual_seed(row * self.views + view)
        first, inner, last = tokens[:1], tokens[1:-1], tokens[-1:]
        cut, share, place = torch.rand(3, generator=generator).tolist()
        if cut < self.cut:
            size = 1 + int(share * len(inner))
            start = int(place * (len(inner) - size + 1))
            inner = inner[start : start + size]
        if self.token is not None:
            inner = inner.masked_fill(torch.rand(len(inner), generator=generator) < self.mask, self.token)
        return torch.cat([first, inner, last])


class TextData(Data):
    """Token sequences in batches of like length: inputs `input_ids` and `attention_mask` int64 [B, S].

    Each epoch is a permutation; within pools of `POOL` batches samples are sorted by length, and the batches come in a
    random order: all a function of the seed. Without a seed the whole is one pool, in one fixed order. A sample's key
    is its row, and its view where there are several. Raises `InputError` for no samples, an empty sequence or lengths
    that differ.
    """

    altered: Altered | None
    """what makes the views"""

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        targets: Tensor | None,
        batch_size: int = 32,
        *,
        pad: int = 0,
        ids: Tensor | None = None,
    ) -> None:
        if targets is not None and len(targets) != len(tokens):
            raise InputError(f"data: {len(tokens)} texts and {len(targets)} targets")
        check_sizes("data", batch_size=batch_size)
        self.tokens, self.pad, self.batch_size = [torch.tensor(t, dtype=torch.int64) for t in tokens], pad, batch_size
        self.lengths = torch.tensor([len(t) for t in tokens], dtype=torch.int64)
        if len(tokens) and not int(self.lengths.min()):
            empty = int(self.lengths.argmin()) + 1
            raise InputError(f"data: row {empty} has a text without tokens, and its tokenizer adds none; take it out")
        self.ids = torch.arange(len(tokens)) if ids is None else ids
        if not len(self.ids):
            raise InputError("data: no samples")
        if low := [row for row, t in enumerate(self.tokens, 1) if int(t.min()) < 0]:
            raise InputError(
                f"data: row {low[0]} has token {int(self.tokens[low[0] - 1].min())}, and tokens are from 0"
            )
        self._targets, self.samples, self.key_count = targets, len(self.ids), len(tokens)
        self.altered = None

    @property
    def views(self) -> int:
        """In how many forms a text is seen."""
        return 1 if self.altered is None else self.altered.views

    @property
    def targets(self) -> Tensor | None:
        """The targets of all samples, in the order of `ids`; None: unlabelled."""
        return None if self._targets is None else self._targets[self.ids]

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def subset(self, ids: Tensor, targets: Tensor | None = None) -> TextData:
        """The samples with these rows, under the same keys; with other `targets`, by row, where they are given."""
        part = type(self).__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.ids, part.samples = ids, len(ids)
        part._targets = self._targets if targets is None else targets
        return part

    def altered_by(self, altered: Altered) -> TextData:
        """The same samples in several forms: epoch e shows form e mod views, and no seed the texts as they are."""
        other = self.subset(self.ids)
        other.altered, other.key_count = altered, len(self.tokens) * altered.views
        return other

    def plan(self, seed: int | None, lengths: Tensor | None = None) -> list[Tensor]:
        """The rows of each batch of an epoch, whose texts have these `lengths`; by default, those of the texts."""
        lengths = self.lengths if lengths is None else lengths
        generator = torch.Generator().manual_seed(seed or 0)
        order = self.ids[torch.randperm(self.samples, generator=generator)]
        pools = order.split(POOL * self.batch_size if seed is not None else self.samples)
        batches = [b for pool in pools for b in pool[lengths[pool].sort(stable=True).indices].split(self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        if state is not None:
            torch.set_rng_state(state)
        view = 0 if seed is None else epoch % self.views
        tokens, lengths = self.tokens, self.lengths
        if self.altered is not None and view:
            tokens = [self.altered(t, row, view) for row, t in enumerate(tokens)]
            lengths = torch.tensor([len(t) for t in tokens])
        for rows in self.plan(seed, lengths)[start:]:
            inputs = padded([tokens[i] for i in rows], self.pad)
            yield Batch(inputs, None if self._targets is None else self._targets[rows], rows * self.views + view)

    def fingerprint(self) -> str:
        targets = [] if self._targets is None else [self._targets]
        how = (self.batch_size, self.pad, POOL, *([] if self.altered is None else [self.altered]))
        return digest_of(how, (torch.cat(self.tokens), self.lengths, *targets, self.ids))


class LabelledTokens(TextData):
    """Token sequences whose targets are made of tokens, batch by batch, by those who derive from it."""

    @property
    def targets(self) -> Tensor | None:
        """None of its own."""
        return None

    @property
    def labelled(self) -> bool:
        return True


def check_tokens(texts: Sequence[Sequence[int]], words: int, who: str, what: str) -> None:
    """Raises `InputError`, beginning with `who`, for a text of `what` with a token that a model of `words` has not."""
    for row, tokens in enumerate(texts, 1):
        if len(tokens) and max(tokens) >= words:
            raise InputError(
                f"{who}: row {row} of {what} has token {max(tokens)} and the model {words} tokens, from 0; its "
                "tokenizer has more: copy the one that belongs to the model, or take the text out"
            )


@dataclass
class Tokens:
    """Tokenizes texts for one model, and notes what it did to them."""

    tokenizer: Any
    most: int
    """tokens of a text, of which longer ones lose the rest"""
    notes: list[str] = field(default_factory=list)

    def __call__(self, texts: Sequence[Any], what: str) -> list[list[int]]:
        """Token ids, special tokens included. Raises `InputError` naming the first row that is no text."""
        for row, text in enumerate(texts, 1):
            if (reason := why_not_text(text)) is not None:
                raise InputError(f"text: row {row} of {what} is {reason}")
        with quietly():
            whole = self.tokenizer(list(texts), truncation=False)["input_ids"]
            long = [i for i, ids in enumerate(whole) if len(ids) > self.most]
            if long:
                cut = self.tokenizer([texts[i] for i in long], truncation=True, max_length=self.most)["input_ids"]
                for i, ids in zip(long, cut, strict=True):
                    whole[i] = ids
                self.notes.append(f"{len(long)} of {len(texts)} texts of {what} were cut to {self.most} tokens")
        if empty := sum(not text.strip() for text in texts):
            self.notes.append(f"{empty} texts of {what} are empty: special tokens alone stand for them")
        return whole
