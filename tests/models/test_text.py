"""Texts as tasks: tables that are read or refused, batches that are functions of a seed, metrics with known answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.data.structures import concatenate
from pqk.data.synthesis import pseudo_labels
from pqk.errors import InputError
from pqk.models.encoder import encoder
from pqk.models.text import ranks, rows_of, similarities, spearman, text_task
from pqk.models.text_data import Altered, TextData, padded, read_table
from pqk.task.task import Task

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "classifier")


def table(rows: int = 40, **columns: Any) -> dict[str, Any]:
    return {"text": tiny.texts(rows), "label": [i % 3 for i in range(rows)]} | columns


# ---- tables


def test_tables_are_read_the_same_from_every_form(tmp_path: Path) -> None:
    rows, labels = ["a good film", 'a "bad" one', "", "café"], ["1", "0", "2", "1"]
    tsv = tiny.write_tsv(tmp_path / "a.tsv", labels, rows)
    assert read_table(tsv) == {"label": labels, "text": rows}
    (tmp_path / "b.tsv").write_bytes(b"\xef\xbb\xbf" + tsv.read_bytes().replace(b"\n", b"\r\n"))
    assert read_table("b.tsv", tmp_path) == {"label": labels, "text": rows}
    lines = '{"label": 1, "text": "a good film"}\n\n{"text": "café", "label": 2}\n'
    (tmp_path / "c.jsonl").write_text(lines)
    assert read_table(tmp_path / "c.jsonl") == {"label": [1, 2], "text": ["a good film", "café"]}


def test_rows_are_a_table_and_several_tables_are_drawn_from() -> None:
    rows = [{"text": t, "label": i} for i, t in enumerate("abcd")]
    columns = read_table(rows)
    assert columns == {"text": [*"abcd"], "label": [*range(4)]}
    for source in (rows, columns, [columns]):
        assert rows_of(source, None, "text", "label", None) == ([*"abcd"], [*range(4)])
    assert rows_of([rows, columns], None, "text", "label", None)[0] == [*"abcdabcd"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a", "b"], "label": [1]}, "different lengths: text 2, label 1"),
        ({"text": "ab"}, r"the column text of the table is no list, but str \('ab'\)"),
        ([{"text": "a"}, {"label": 1}], "row 2 of the table has the fields"),
        ([{"text": "a"}, "b"], "row 2 of the table is no dict"),
        ([], "the table has no rows"),
        (5, r"a table is a .jsonl or .tsv file, .* and not int \(5\)"),
        (None, "and not NoneType"),
    ],
)
def test_what_is_no_table_is_refused(table: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_table(table)


def test_rows_and_sizes_of_data_are_counted_from_one() -> None:
    with pytest.raises(InputError, match="row 2 has a text without tokens"):
        TextData([[1], []], None)
    with pytest.raises(InputError, match="row 2 has token -3, and tokens are from 0"):
        TextData([[1], [2, -3]], None)
    with pytest.raises(InputError, match="batch_size=0.5 must be a whole number, at least 1"):
        TextData([[1]], None, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"label\ttext\n1\tcaf\xe9\n", r"line 2 of .*a.tsv is not UTF-8 \(byte 0xe9 at 5\).*mixed"),
        ("a.tsv", b"label\ttext\n1\ta\tb\n", "line 2 .* has 3 fields and the header 2"),
        ("a.tsv", b"label\ttext\n", "has no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 of .* is not JSON"),
        ("a.tsv", b"text\ttext\na\tb\n", "header of .*a.tsv has text more than once"),
        ("a.csv", b"text\na\n", "a.csv is neither .jsonl, .* nor .tsv"),
        ("a.json", b'[{"text": "a"}]', "a.json is neither .jsonl, .* nor .tsv"),
        ("a.jsonl", b'["a"]\n', "line 1 .* is a list"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1 of .* is not JSON: .*recursion"),
        ("a.jsonl", b'{"text": "a"}\n{"label": 1}\n', "row 2 of .* has the fields"),
    ],
)
def test_a_broken_table_is_refused_at_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / name)


# ---- batches


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=90), st.integers(1, 8), st.integers(0, 5))
def test_an_epoch_is_every_text_once(lengths: list[int], size: int, seed: int) -> None:
    """In batches that all are full but one, the same for the same seed, and from the middle on the same as before."""
    data = TextData([[7] * n for n in lengths], torch.arange(len(lengths)), size, pad=1)
    batches = list(data.batches(seed))
    rows = torch.cat([b.keys for b in batches if b.keys is not None])
    assert rows.sort().values.tolist() == list(range(len(lengths)))
    assert len(batches) == len(data) and sum(len(b.inputs[0]) < size for b in batches) <= 1
    for b, again in zip(batches[1:], data.batches(seed, start=1), strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip((*b.inputs, b.targets), (*again.inputs, again.targets), strict=True)
        )
    for b in batches:
        ids, mask = b.inputs
        assert mask.sum(1).tolist() == [lengths[i] for i in b.targets]
        assert ids.shape[1] == int(mask.sum(1).max()) and bool(((ids == 7) == (mask == 1)).all())


def test_batches_are_of_like_length_and_epochs_differ() -> None:
    lengths = torch.randint(1, 60, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    data = TextData([[7] * n for n in lengths], None, 20)
    waste = [1 - float(b.inputs[1].float().mean()) for b in data.batches(3)]
    assert sum(waste) / len(waste) < 0.05
    orders = [torch.cat(data.plan(seed)) for seed in (1, 2)]
    assert not torch.equal(*orders)
    firsts = [int(data.lengths[b].max()) for b in data.plan(None)]
    assert firsts != sorted(firsts)  # a prefix is not the shortest texts only


def test_keys_and_fingerprints_follow_the_rows() -> None:
    data = TextData([[7, 8], [7], [7, 9, 9]], torch.tensor([0, 1, 2]), 2)
    part = data.subset(torch.tensor([2, 0]))
    assert (part.samples, part.key_count) == (2, 3)
    assert part.targets is not None and part.targets.tolist() == [2, 0]
    assert sorted(int(k) for b in part.batches(1) for k in b.keys) == [0, 2]
    other = TextData([[7, 8], [7], [7, 9, 8]], torch.tensor([0, 1, 2]), 2)
    assert len({data.fingerprint(), part.fingerprint(), other.fingerprint()}) == 3
    with pytest.raises(InputError, match="row 2 has a text without tokens"):
        TextData([[7], []], None)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 5), st.booleans())
def test_a_view_is_a_part_of_its_text_with_some_tokens_masked(lengths: list[int], views: int, masks: bool) -> None:
    """The same in every epoch that shows it, under a key of its own; the first is the text, as without a seed."""
    data = TextData([[*range(2, n + 2)] for n in lengths], torch.arange(len(lengths)), 4, pad=99)
    several = data.altered_by(Altered(views, 1 if masks else None))
    assert several.key_count == views * len(lengths) and several.fingerprint() != data.fingerprint()
    seen: dict[int, list[int]] = {}
    for epoch in range(2 * views):
        for batch in several.batches(epoch, epoch):
            assert batch.keys is not None
            for ids, mask, key, row in zip(*batch.inputs, batch.keys, batch.targets, strict=True):
                tokens, text = ids[mask == 1].tolist(), [*range(2, lengths[row] + 2)]
                assert seen.setdefault(int(key), tokens) == tokens and divmod(int(key), views) == (row, epoch % views)
                assert (tokens[0], tokens[-1]) == (text[0], text[-1])
                inner = [(t, i) for i, t in enumerate(tokens[1:-1]) if t != 1]
                assert masks or len(inner) == len(tokens[1:-1])
                assert len({t - i for t, i in inner}) <= 1 and all(t in text for t, _ in inner)  # without gaps
                assert epoch % views or tokens == text
    assert len(seen) == several.key_count
    plain = [b.inputs[0].tolist() for b in several.batches()]
    assert plain == [b.inputs[0].tolist() for b in data.batches()]


# ---- metrics


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 9, (200,), generator=g).float(), torch.randn(200, generator=g)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)
    assert ranks(torch.tensor([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]
    assert (spearman(b, b.exp()), spearman(b, -b), spearman(b, torch.ones(200))) == (1.0, -1.0, 0.0)


def test_similarities_are_cosines_of_all_pairs() -> None:
    found = similarities(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5**0.5, 0.5**0.5]))


# ---- tasks


def test_a_classification_task(folder: Path, tmp_path: Path) -> None:
    names = [tiny.LABELS[i % 3] for i in range(20)]
    tiny.write_tsv(tmp_path / "train.tsv", names, tiny.texts(20))
    task = text_task(tmp_path, directory=folder, train="train.tsv", evaluation=table(10), batch_size=4)
    assert task.train is not None and (task.train.samples, task.validation.samples) == (18, 2)
    assert task.axes == (("batch", "sequence"),) * 2 and task.input_names == ("input_ids", "attention_mask")
    task.check(encoder(folder))
    assert 0 <= task.score(encoder(folder), task.evaluation) <= 1
    assert task.example[0].shape[0] == 2 and task.example[0][0, 0] == tiny.WORDS.index("[CLS]")
    fixed = text_task(directory=folder, train=table(), evaluation=table(10), example_length=20)
    assert fixed.example[0].shape == (2, 20) and not bool(fixed.example[1][:, -1].any())


def test_latencies_are_taken_at_other_lengths_too(folder: Path) -> None:
    """On real tokens without padding, as far as the model has positions for them."""
    task = text_task(directory=folder, train=table(), evaluation=table(10), timed_lengths=(5, 24, 10_000))
    assert list(task.timed) == ["5 tokens", "24 tokens"]
    for name, length in (("5 tokens", 5), ("24 tokens", 24)):
        ids, mask = task.sized(3, name)
        assert ids.shape == mask.shape == (3, length) and bool(mask.all())
        assert bool((ids[:, 0] == tiny.WORDS.index("[CLS]")).all()) and not bool((ids[:, 1:-1] < 3).any())
    assert {name: x.shape for name, x in task.feeds(2, "5 tokens").items()} == dict.fromkeys(task.input_names, (2, 5))
    task.check(encoder(folder))


def test_what_is_done_to_texts_is_counted(folder: Path) -> None:
    rows = ["good " * 50, "", "bad", "  ", "a film"]
    judged = {"text": rows, "label": [0, 1, 2, 0, 1]}
    task = text_task(directory=folder, train=table(), evaluation=judged, max_length=100, batch_size=5)
    assert "1 of 5 texts of evaluation were cut to 24 tokens" in task.notes  # the model has no more positions
    assert any(note.startswith("2 texts of evaluation are empty") for note in task.notes)
    (batch,) = task.evaluation.batches()
    assert sorted(batch.inputs[1].sum(1).tolist()) == [2, 2, 3, 4, 24]
    assert bool(encoder(folder)(*batch.inputs).isfinite().all())


def test_an_embedding_task_is_judged_by_the_models_own_similarities(tmp_path: Path) -> None:
    base = tiny.directory(tmp_path / "base", "Model")
    unlabelled = {"text": tiny.texts(30)}
    task = text_task(
        directory=base, train=[unlabelled, table(30)], evaluation=[unlabelled, table(30)], task="embedding",
        limit=40, evaluation_limit=20, batch_size=8,
    )  # fmt: skip
    assert task.train is not None and task.train.samples + task.validation.samples == 40
    assert task.evaluation.samples == 20
    model = encoder(base, "embedding")
    task.check(model)
    assert task.score(model, task.evaluation) == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    assert task.score(model, task.evaluation) < 0.95


def test_a_regression_task(tmp_path: Path) -> None:
    scorer = tiny.directory(tmp_path / "scorer", id2label={0: "score"}, label2id={"score": 0})
    task = text_task(
        directory=scorer, train=table(label=[i / 7 for i in range(40)]), evaluation=table(label=list(range(40))),
        task="regression",
    )  # fmt: skip
    model = encoder(scorer, "regression")
    task.check(model)
    assert -1 <= task.score(model, task.evaluation) <= 1
    batch = next(task.evaluation.batches())
    torch.testing.assert_close(task.loss(batch.targets[:, None] + 2.0, batch.targets), torch.full((32,), 4.0))
    assert not task.decision(model(*batch.inputs)).is_floating_point()


class Columns:
    """What a `datasets` dataset looks like from outside."""

    column_names = ("text", "label")

    def __getitem__(self, name: str) -> list[Any]:
        return {"text": tiny.texts(12), "label": [0, 1, 2] * 4}[name]


def test_a_dataset_is_a_table(folder: Path) -> None:
    task = text_task(directory=folder, train=Columns(), evaluation=Columns(), batch_size=4)  # type: ignore[arg-type]
    assert task.evaluation.samples == 12
    with pytest.raises(InputError, match=r'no column "txt" \(did you mean "text"'):
        text_task(directory=folder, train=Columns(), evaluation=Columns(), text="txt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: {"train": table(label=[*range(3)] * 13 + [3])}, "label of row 40 of train is 3 and the head has 3"),
        (
            lambda: {"train": table(label=["fine"] * 40)},
            'row 1 of train is "fine", which is neither a whole number nor',
        ),
        (lambda: {"train": table(label=[0, 1.7] * 20)}, 'row 2 of train is "1.7", which is neither a whole number nor'),
        (lambda: {"train": table(label=[float("inf")] * 40)}, 'row 1 of train is "inf", which is neither'),
        (lambda: {"train": table(text=[None] * 40)}, "row 1 of train is no text but NoneType"),
        (lambda: {"train": table(text=["a", "b\ud83d"] * 20)}, "row 2 of train is half a character"),
        (lambda: {"train": table(label=[0])}, "different lengths: text 40, label 1"),
        (lambda: {"batch_size": 2.5}, "batch_size=2.5 must be a whole number, at least 1"),
        (lambda: {"max_length": 2}, "max_length=2 must be a whole number, at least 3"),
        (lambda: {"limit": 0}, "limit=0 must be a whole number"),
        (lambda: {"views": 0}, "views=0 must be a whole number, at least 1"),
        (lambda: {"timed_lengths": (64, 1)}, "timed_lengths=1 must be a whole number, at least 2"),
        (lambda: {"train": "nowhere.tsv"}, "no file nowhere.tsv"),
        (lambda: {"train": None}, "neither train nor validation"),
        (lambda: {"task": "sentiment"}, 'unknown task "sentiment"'),
        (lambda: {"task": "regression"}, "has 3 labels, and 1 are wanted"),
        (lambda: {"validation_share": 1.0}, "leaves nothing to train"),
        (lambda: {"evaluation": table(1)}, "1 texts to evaluate"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, arguments: Callable[[], dict[str, Any]], message: str) -> None:
    given = {"train": table(), "evaluation": table(10)} | arguments()
    with pytest.raises(InputError, match=message):
        text_task(directory=folder, **given)


def test_a_teacher_labels_texts_of_several_lengths(folder: Path) -> None:
    teacher = encoder(folder)
    texts = text_task(directory=folder, train=table(), evaluation=table(10), batch_size=8).train
    assert isinstance(texts, TextData)
    found = pseudo_labels(teacher, texts, 0.0).data
    want = {(*map(int, t),): None for t in (texts.tokens[i] for i in texts.ids)}
    for ids, mask, label in zip(*found.inputs, found.targets, strict=True):  # type: ignore[arg-type]
        row = ids[mask.bool()]
        with torch.no_grad():
            assert int(label) == int(teacher(row[None], torch.ones(1, len(row), dtype=torch.int64)).argmax())
        want.pop((*map(int, row),), None)
    assert found.samples == texts.samples and not want


def test_padding_is_to_the_longest_or_to_a_length() -> None:
    ids, mask = padded([torch.tensor([5]), torch.tensor([6, 7])], 9)
    assert ids.tolist() == [[5, 9], [6, 7]] and mask.tolist() == [[1, 0], [1, 1]]
    assert padded([torch.tensor([5])], 9, 3)[0].tolist() == [[5, 9, 9]]


def test_outputs_of_several_lengths_are_joined_with_zeros() -> None:
    parts = [{"a": torch.ones(2, 3, 4), "b": torch.ones(2)}, {"a": torch.ones(1, 5, 4), "b": torch.zeros(1)}]
    whole = concatenate(parts)
    assert whole["a"].shape == (3, 5, 4) and whole["b"].tolist() == [1, 1, 0]
    assert whole["a"].sum((1, 2)).tolist() == [12, 12, 20] and not bool(whole["a"][:2, 3:].any())


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"input_idz": {1: "sequence"}}, 'input "input_idz" .did you mean "input_ids"'),
        ({"input_ids": {0: "texts"}}, 'calls axis 0 of input_ids "texts"; axis 0 is the "batch"'),
        ({"input_ids": {2: "sequence"}}, "input_ids has 2 axes"),
    ],
)
def test_axes_that_are_not_there_are_refused(axes: dict[str, dict[int, str]], message: str) -> None:
    data = TextData([[7, 8], [7], [7, 9, 9]], torch.tensor([0, 1, 2]), 2)
    names = ("input_ids", "attention_mask")
    assert Task(data, data, data, input_names=names).axes == (("batch", None), ("batch", None))
    with pytest.raises(InputError, match=message):
        Task(data, data, data, input_names=names, dynamic_axes=axes)
