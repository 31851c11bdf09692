"""The benchmark on models that no recipe knows: its models, what it concludes, and one whole run of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pqk import Contract
from pqk.cli.app import run
from pqk.errors import InputError
from pqk.files import read_json
from pqk.models.strangers import INTENTS, SENTIMENT, STRANGERS, TABULAR, stranger
from pqk.models.strangers.stranger import Samples, Stranger
from pqk.models.strangers.words import word_samples
from pqk.strangers.bench import Bench, BenchConditions
from pqk.strangers.contest import Contest, Standing
from pqk.strangers.peers import PEERS, Case, Peer, TorchPruning, fine_tune
from pqk.strangers.rows import TEACHER, Row, summary
from pqk.strangers.table import beside_peers, markdown
from pqk.task.state import frozen_copy

TINY = BenchConditions(budget="20s", samples=200, epochs=1, evaluation="quick", rounds=5)
SHAPES = {"spoken": (1, 8000), "sentiment": (40,), "intents": (24,), "tabular": (37,)}


def standing(metric: float, ratio: float, name: str = "pqk", width: float = 0.05) -> Standing:
    return Standing(name, metric, ratio, ratio - width, ratio + width)


def row(student: Standing | None = None, *untrained: Standing, **changes: Any) -> Row:
    made = Row(
        name="made", what="a net", teacher=0.8, end="kept", words=None, chosen="width 2x", trained=True,
        student=student, post_training=untrained, teacher_seconds=1.0, seconds=2.0,
    )  # fmt: skip
    return replace(made, **changes)


# The models


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which nn.TransformerEncoder makes
@pytest.mark.parametrize("each", STRANGERS, ids=lambda s: s.name)
def test_every_stranger_is_an_ordinary_network(each: Stranger) -> None:
    shape = SHAPES.get(each.name, (3, 32, 32))
    ids = each in (SENTIMENT, INTENTS)
    inputs = torch.randint(1, 1000, (3, *shape)) if ids else torch.rand(3, *shape)
    model = each.network().eval()
    with torch.no_grad():
        outputs = model(inputs)
    assert outputs.shape[0] == 3 and outputs.dim() == 2 and bool(outputs.isfinite().all())
    assert torch.equal(outputs[:1].argmax(1), model(inputs[:1]).argmax(1)), "an answer depends on the batch"


def test_the_strangers_have_names_of_their_own() -> None:
    assert len({s.name for s in STRANGERS}) == len(STRANGERS) >= 8
    with pytest.raises(InputError, match='none named "nobody"; there are plain_cnn, '):
        stranger.named("nobody", STRANGERS)


def test_a_teacher_is_a_function_of_samples_and_seed() -> None:
    short = replace(TABULAR, epochs=1)
    samples = short.samples(None).first(1000)
    one, same, other = (short.teacher(samples, seed).state_dict()["net.0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_training_labels_are_there_or_not() -> None:
    samples = TABULAR.samples(None).first(400)
    assert TABULAR.task(samples).validation.labelled
    task = replace(TABULAR, labelled=False).task(samples)
    assert not task.validation.labelled and task.evaluation.labelled


def test_the_words_of_a_task_are_its_most_frequent_ones(tmp_path: Path) -> None:
    (tmp_path / "made_train.tsv").write_text("label\ttext\n1\tgood good film!\n0\tBad film, bad.\n0\tbad\n")
    (tmp_path / "made_test.tsv").write_text("label\ttext\n1\tthe good film\n")
    samples = word_samples("made", tmp_path, 5, 4)
    (test, labels) = samples.test
    assert test.tolist() == [[1, 3, 4, 0]] and labels.tolist() == [1]  # bad is 2; three words are known, and no more
    rows = {tuple(ids): label for ids, label in zip(*(t.tolist() for t in samples.train), strict=True)}
    assert rows == {(3, 3, 4, 1): 1, (2, 4, 1, 2): 0, (2, 0, 0, 0): 0}


# What follows from a row


def test_the_best_form_without_training_keeps_the_contract() -> None:
    fast, kept, slow = standing(0.7, 3.0, "fast"), standing(0.795, 1.5, "kept"), standing(0.8, 1.2, "slow")
    missing = Standing("missing", reason="no such operator")
    made = row(standing(0.792, 3.0), missing, slow, fast, kept)
    assert made.best_untrained is kept and made.gain == 2.0 and made.held and not made.dominating
    assert row(standing(0.8, 1.4), standing(0.8, 0.9)).best_untrained is TEACHER
    assert row(standing(0.8, 1.4), kept, trained=False).gain is None


def test_a_promise_is_held_or_refused() -> None:
    assert row(standing(0.79, 2.0)).held and not row(standing(0.789, 2.0)).held
    refused = row(None, end="refused", words="too few samples", chosen=None, trained=None)
    assert refused.held and refused.gain is None
    assert not row(None, end="failed", words="KeyError: x").held
    assert not row(None).held


def test_a_form_without_training_dominates_beyond_both_intervals() -> None:
    better, unsure, worse = standing(0.8, 2.2, "better"), standing(0.8, 2.08, "unsure"), standing(0.798, 4.0, "worse")
    assert [s.name for s in row(standing(0.799, 2.0), better, unsure, worse).dominating] == ["better"]


def test_the_summary_counts() -> None:
    rows = [
        row(standing(0.8, 4.0), standing(0.8, 2.0)),
        row(standing(0.7, 4.0), standing(0.8, 0.5)),
        row(standing(0.8, 1.0), standing(0.8, 2.0), trained=False),
        row(None, end="refused", words="no", trained=None),
    ]
    found = summary(rows)
    assert found == {
        "strangers": 4, "held_or_refused": 3, "kept": 2, "dominated": 1, "trained": 2,
        "gain": pytest.approx(8**0.5),
    }  # fmt: skip
    assert summary(rows[3:])["gain"] is None


def document(*rows: Row) -> dict[str, Any]:
    versions = {"onnxruntime": "1.0", "torch": "2.0"}
    machine = {"cores": 2, "cpu": "a CPU", "target": "x86-avx2", "versions": versions}
    conditions = {"budget": "10m", "threads": 2, "machine": machine, "peers": {"other": "3.4"}}
    return {"conditions": conditions, "strangers": [r.document() for r in rows]}


def test_the_table_says_what_became_of_each() -> None:
    untrained = standing(0.8, 2.0, "static")
    refused = row(None, name="second", end="refused", words="contract: | too few", chosen=None, trained=None)
    text = markdown(document(row(standing(0.785, 1.5), untrained), refused))
    assert "2 strangers: the promise holds on evaluation data or is refused in words in 1 of them" in text
    assert re.search(r"\| `made` .* kept \| width 2x \|.* \+1\.50 \| \*\*no\*\* \| 1\.50x \(1\.45 to 1\.55\)", text)
    assert "static: 80.00 %, 2.00x | static | yes |" in text
    assert "- `second`, refused: contract: / too few" in text


def test_the_table_of_peers_says_what_is_lost() -> None:
    faster, slower = standing(0.795, 3.0, "other"), standing(0.8, 1.0, "other")
    broken = standing(0.5, 9.0, "other")
    nothing = Standing("other", reason="ValueError: no such operator")
    rows = [row(standing(0.8, 2.0), peers=(peer,)) for peer in (faster, slower, broken, nothing)]
    rows.append(row(None, end="refused", words="no", trained=None, peers=(faster,)))
    text = beside_peers(document(*rows))
    assert "pqk loses 2 of 5 cells" in text and text.count("**79.50 %, 3.00x**") == 2
    assert "- `made`, other: ValueError: no such operator" in text and "other 3.4" in text


# Running it


def test_what_cannot_be_run_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert run(["strangers", "--out", str(tmp_path / "out"), *arguments]) == 2
        return capsys.readouterr().err

    assert 'none named "nobody"' in said("--only", "nobody")
    assert '"soon" is neither a time nor a number of epochs' in said("--budget", "soon")
    assert '"3 epochs" is in epochs' in said("--budget", "3 epochs", "--peers")
    assert "there is no such folder" in said("--data", str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


class Breaking(Peer):
    """A tool that takes nothing."""

    name, package = "breaking", "torch"

    def write(self, case: Case, path: Path) -> None:
        raise KeyError("aten.unknown")


class Absent(Breaking):
    """A tool that is not there."""

    name, package = "absent", "no-such-distribution"


def case(tmp_path: Path, seconds: float = 0.0) -> Case:
    samples: Samples = TABULAR.samples(None).first(600)
    task = TABULAR.task(samples)
    teacher = frozen_copy(TABULAR.network(), task.example)
    contest = Contest(teacher, task, Contract(), tmp_path, rounds=5)
    return Case(TABULAR, samples, teacher, contest, seconds)


@pytest.mark.slow
def test_a_peer_that_breaks_says_how(tmp_path: Path) -> None:
    assert Breaking().standing(case(tmp_path)) == Standing("breaking", reason="KeyError: 'aten.unknown'")
    assert Absent().why_not_here() == "no-such-distribution is not installed"
    assert len({p.name for p in PEERS}) == len(PEERS)


@pytest.mark.slow
def test_a_peer_trains_for_its_time(tmp_path: Path) -> None:
    model = TABULAR.network()
    before = model.state_dict()["net.0.weight"].clone()
    assert torch.equal(fine_tune(model, case(tmp_path, 1e-9)).state_dict()["net.0.weight"], before)
    assert not torch.equal(fine_tune(model, case(tmp_path, 0.5)).state_dict()["net.0.weight"], before)


@pytest.mark.slow
def test_torch_pruning_halves_a_stranger(tmp_path: Path) -> None:
    found = TorchPruning().standing(case(tmp_path, 0.5))
    assert found.reason is None and found.metric is not None and found.ratio is not None


@pytest.mark.full
@pytest.mark.slow
def test_a_refused_stranger_has_its_words_and_what_needs_no_training(tmp_path: Path) -> None:
    """Of 200 rows a hundred decide, and the 20 that are split off training: a point needs 300."""
    bench = Bench(tmp_path, None, TINY, peers=(Breaking(), Absent()))
    found = bench.run([TABULAR])
    assert found == read_json(tmp_path / "strangers.json")
    (values,) = found["strangers"]
    row = Row.read(values)
    assert row.end == "refused" and row.held and "validation samples" in (row.words or "")
    assert row.student is None and row.chosen is None and row.trained is None
    assert {s.name for s in row.post_training} >= {"ONNX Runtime, static", "ONNX Runtime, dynamic", "pqk, static"}
    assert [(p.name, p.reason) for p in row.peers] == [
        ("breaking", "KeyError: 'aten.unknown'"),
        ("absent", "no-such-distribution is not installed"),
    ]
    kept = read_json(tmp_path / "tabular" / "row.json")["row"]["peers"]
    assert [p["name"] for p in kept] == ["breaking"], "what is absent may be there the next time"
    gone = replace(TABULAR, samples=unreadable)
    assert bench.run([gone]) == found, "a finished row is made again"
    with pytest.raises(InputError, match="no such file"):  # a row of other conditions is not taken for one of these
        Bench(tmp_path, None, replace(TINY, samples=201)).run([gone])


def unreadable(data: Path | None) -> Samples:
    raise InputError("no such file")


class Small(nn.Sequential):
    """Rows [B, 37] -> logits [B, 4]."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(37, 24), nn.ReLU(), nn.Linear(24, 4))


@pytest.mark.full
def test_one_stranger_is_compiled(tmp_path: Path) -> None:
    whole = replace(TINY, samples=1000, budget="1 epochs")
    small = replace(TABULAR, name="small", network=Small)
    found = Bench(tmp_path, None, whole).run([small])
    row = Row.read(found["strangers"][0])
    assert row.end in ("kept", "refused") and (row.words is None) == (row.end == "kept")
    assert row.student is not None and row.student.ratio is not None and row.chosen
    assert row.name in markdown(found) and (tmp_path / "small" / "compile" / "report.json").exists()
    with pytest.raises(InputError, match='"1 epochs" is in epochs'):
        Bench(tmp_path, None, whole, peers=PEERS).run([small])
