"""What a contract promises, how sure of it one is on so many samples, and which student ships."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk import Contract, InputError, Metric, Recipe, Task
from pqk.data.data import ArrayData
from pqk.report.cascade import CascadeResult
from pqk.report.html.verdict import promise as section
from pqk.report.markdown import promise_section
from pqk.report.promise import Clause, Promise, TriedStudent
from pqk.report.schema import AttributionRow, Report
from pqk.search.candidates import Candidate
from pqk.search.judge import NONE_OF, Judge, Worth
from pqk.search.on_evaluation import broken_in_words, dominating, on_evaluation
from pqk.search.verdict import Terms, Tried, obstacle, promise_of
from tests.support.reports import a_promise


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def judge(outputs: Tensor, labels: Tensor, folder: Path = Path(), metric: Metric | None = None) -> Judge:
    data = ArrayData(outputs, labels, 64)
    options: dict[str, Any] = {} if metric is None else {"metric": metric}
    return Judge(Identity(), Task(None, data, validation=data, **options), data, folder, timed=False, seed=0)


def right(count: int, samples: int) -> Tensor:
    """Logits of two classes [samples, 2] of which the first `count` are for class 0."""
    chosen = (torch.arange(samples) >= count).long()
    return nn.functional.one_hot(chosen, 2).float()


def worth(**numbers: Any) -> Worth:
    given = {
        "metric": 0.9, "drop": 0.0, "drop_high": 0.005, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1,
        "milliseconds_high": 1.0, "size_bytes": 1000, "macs": 1000,
    }  # fmt: skip
    return Worth(**{**given, **numbers})


def tried(name: str, **numbers: Any) -> Tried:
    return Tried(Candidate(name, name, ()), worth(**numbers), 1.0)


@pytest.mark.parametrize(
    ("contract", "unit", "teacher", "free", "allowed"),
    [
        (Contract(), "share", 0.9, "speed", 0.01),
        (Contract(), "nats", -2.0, "speed", 0.02),
        (Contract(max_drop=0.5), "share", 0.9, "speed", 0.005),
        (Contract(max_drop=0.5), "nats", -2.0, "speed", 0.5),
        (Contract(min_speedup=2), "share", 0.9, "metric", math.inf),
        (Contract(max_latency_ms=2, max_drop=1), "share", 0.9, "metric", 0.01),
        (Contract(max_size_mb=2), "share", 0.9, "metric", math.inf),
        (Contract(max_size_mb=2, max_drop=1), "share", 0.9, "speed", 0.01),
    ],
)
def test_what_is_free_and_what_may_be_lost(
    contract: Contract, unit: str, teacher: float, free: str, allowed: float
) -> None:
    assert contract.free == free and contract.allowed_drop(unit, teacher) == pytest.approx(allowed)


@pytest.mark.parametrize(
    ("budget", "seconds", "epochs"),
    [("30s", 30, math.inf), ("15m", 900, math.inf), ("1.5h", 5400, math.inf), ("40 epochs", math.inf, 40)],
)
def test_budgets_are_times_or_epochs(budget: str, seconds: float, epochs: float) -> None:
    contract = Contract(budget=budget)
    assert (contract.seconds, contract.epochs) == (seconds, epochs)


@pytest.mark.parametrize(
    "text", ['budget = "soon"', 'budget = "0m"', "max_drop = -1", "min_speedup = 0", "speedup = 2"]
)
def test_clauses_that_none_can_keep_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"contract"):
        Recipe.loads(f"[contract]\n{text}")
    with pytest.raises(InputError, match="100 points|has 100"):
        Contract(max_drop=120).allowed_drop("share", 0.5)


def test_a_recipe_may_be_a_contract_and_has_it_in_its_text() -> None:
    recipe = Recipe.loads("[contract]\nmax_drop = 0.5\n")
    assert recipe.passes == () and Recipe.loads(recipe.dumps()) == recipe
    with pytest.raises(InputError, match=r"no \[\[pass\]\] and no \[contract\]"):
        Recipe.loads("seed = 1")


def test_a_drop_is_that_of_the_same_samples() -> None:
    """The interval of paired samples: what teacher and student both get wrong does not widen it."""
    samples = 1000
    labels = torch.zeros(samples, dtype=torch.int64)
    judged = judge(right(800, samples), labels)
    assert judged.teacher_value == 0.8 and judged.samples == samples
    point, high = judged.drop(right(790, samples))
    assert point == pytest.approx(0.01)
    # Ten samples of a thousand differ: a binomial's standard deviation is 0.0031, and 1.645 of them are 0.0052.
    assert high == pytest.approx(0.0152, abs=0.0012)
    unpaired = 1.645 * math.sqrt(2 * 0.8 * 0.2 / samples)
    assert high - point < 0.3 * unpaired


def test_where_nothing_differs_three_of_n_samples_may() -> None:
    labels = torch.zeros(400, dtype=torch.int64)
    judged = judge(right(300, 400), labels)
    assert judged.drop(right(300, 400)) == (0.0, NONE_OF / 400)
    judged.refuse_few(0.01)
    with pytest.raises(InputError, match="0.5 points cannot be told on 400 validation samples.*600 samples are needed"):
        judged.refuse_few(0.005)


def test_metrics_that_decide_nothing_are_refused(tmp_path: Path) -> None:
    outputs, labels = right(300, 400), torch.zeros(400, dtype=torch.int64)
    labels[300:] = 1
    numbers = itertools.count()
    for function, message in (
        (lambda o, t: float(next(numbers)), "changes from call to call"),
        (lambda o, t: float((o.argmax(1) != t).double().mean()), "higher must be better"),
        (lambda o, t: math.nan, "is nan"),
    ):
        with pytest.raises(InputError, match=message):
            _ = judge(outputs, labels, metric=Metric("m", "share", function)).teacher_value


def test_without_labels_drops_are_of_decisions_that_are_the_teachers() -> None:
    outputs = right(300, 400)
    data = ArrayData(outputs, None, 64)
    judged = Judge(Identity(), Task(None, data, validation=data), data, Path(), timed=False, seed=0)
    assert judged.teacher_value == 1.0 and judged.unit == "share"
    assert judged.drop(right(290, 400))[0] == pytest.approx(10 / 400)


def test_a_teacher_may_be_worse_than_chance_in_accuracy_whose_direction_is_known() -> None:
    """The front page's own example has an untrained one."""
    labels = torch.arange(400) % 2
    wrong = nn.functional.one_hot(1 - labels, 2).float()
    assert judge(wrong, labels).teacher_value == 0.0
    with pytest.raises(InputError, match="higher must be better"):
        own = Metric("own", "share", lambda o, t: float((o.argmax(1) == t).double().mean()))
        _ = judge(wrong, labels, metric=own).teacher_value


def ten_right_of(labels: Tensor) -> Tensor:
    """Logits of two classes that are right but on the first ten samples."""
    logits = nn.functional.one_hot(labels, 2).float()
    logits[:10] = logits[:10].flip(1)
    return logits


def test_few_answers_that_differ_for_the_better_are_no_more_certain_than_none() -> None:
    labels = torch.arange(400) % 2
    judged = judge(ten_right_of(labels), labels)
    same, better = ten_right_of(labels), ten_right_of(labels)
    better[0] = better[0].flip(0)
    assert judged.drop(same) == (0.0, pytest.approx(3 / 400))
    point, high = judged.drop(better)
    assert point == pytest.approx(-1 / 400) and high == pytest.approx(2 / 400)


def sensitivity_of_rare(outputs: Any, targets: Any) -> float:
    """Undefined where no sample of class 1 is drawn."""
    rare = targets == 1
    return float((outputs.argmax(1)[rare] == 1).double().mean())


def right_of_positive(outputs: Any, targets: Any) -> float:
    """No value where all outputs are below -0.5."""
    return math.nan if bool((outputs < -0.5).all()) else float((outputs.argmax(1) == targets).double().mean())


def test_resamples_without_a_value_are_left_out_or_too_many() -> None:
    labels = torch.zeros(300, dtype=torch.int64)
    labels[:5] = 1  # a resample has none of them in 0.7 % of all cases
    outputs = nn.functional.one_hot(labels, 2).float()
    judged = judge(outputs, labels, metric=Metric("sensitivity", "share", sensitivity_of_rare))
    worse = outputs.clone()
    worse[0] = worse[0].flip(0)
    point, high = judged.drop(worse)
    assert point == pytest.approx(0.2) and high > 0.3
    labels[1:5] = 0  # now in 37 %
    rare = judge(nn.functional.one_hot(labels, 2).float(), labels, metric=Metric("s", "share", sensitivity_of_rare))
    with pytest.raises(InputError, match="has no value on 1.. of 400 draws"):
        rare.drop(worse)
    with pytest.raises(InputError, match="of the student is nan"):
        judge(outputs, labels, metric=Metric("s", "share", right_of_positive)).drop(-outputs - 1)


def test_a_metric_that_sums_up_or_is_the_same_for_all_outputs_is_refused() -> None:
    labels = torch.arange(400) % 2
    seen: list[float] = []

    def running(outputs: Any, targets: Any) -> float:
        seen.append(float((outputs.argmax(1) == targets).double().mean()))
        return sum(seen) / len(seen)

    for function, message in ((running, "reset what it sums"), (lambda o, t: 0.5, "whatever the outputs are")):
        with pytest.raises(InputError, match=message):
            _ = judge(ten_right_of(labels), labels, metric=Metric("m", "share", function)).teacher_value


def test_labels_that_are_ignored_are_no_samples_and_few_samples_of_any_unit_are_refused() -> None:
    labels = torch.full((400,), -100)
    labels[:12] = 0
    judged = judge(right(400, 400), labels)
    assert judged.counted == 12
    with pytest.raises(InputError, match="cannot be told on 12 validation samples.*300 samples are needed"):
        judged.refuse_few(0.01)
    few = judge(
        right(20, 20), torch.zeros(20, dtype=torch.int64), metric=Metric("dB", "dB", lambda o, t: float(o.sum()))
    )
    with pytest.raises(InputError, match='drop of "dB" cannot be told on 20 validation samples; pass 30 or more'):
        few.refuse_few(0.5)
    few.refuse_few(math.inf)


# ---- which one ships


def test_the_fastest_that_keeps_the_contract_ships_and_of_those_alike_the_best() -> None:
    terms = Terms(Contract(), 0.01, share=True)
    rows = [
        tried("slow", ratio=1.0), tried("fast", ratio=3.0, drop_high=0.009, drop=0.006),
        tried("as fast", ratio=2.95, drop_high=0.008, drop=0.002), tried("wrong", ratio=9.0, drop_high=0.2, drop=0.1),
    ]  # fmt: skip
    assert terms.best(rows).candidate.name == "as fast"
    assert not terms.holds(rows[3].worth)


def test_where_speed_is_bounded_the_one_that_loses_least_ships() -> None:
    terms = Terms(Contract(min_speedup=2), math.inf, share=True)
    rows = [
        tried("exact", ratio=1.0), tried("fast", ratio=3.0, ratio_low=2.8, drop=0.02),
        tried("faster", ratio=5.0, ratio_low=4.0, drop=0.1), tried("unsure", ratio=2.2, ratio_low=1.9, drop=0.0),
    ]  # fmt: skip
    assert terms.best(rows).candidate.name == "fast"


def test_where_none_keeps_it_the_nearest_one_ships_and_what_is_in_the_way_is_said() -> None:
    labels = torch.zeros(400, dtype=torch.int64)
    judged = judge(right(300, 400), labels)
    terms = Terms(Contract(min_speedup=4, max_drop=1), 0.01, share=True)
    rows = [
        tried("near", ratio=3.9, ratio_low=3.8),
        tried("far", ratio=1.0),
        Tried(Candidate("none", "", ()), None, 0, "x"),
    ]
    chosen = terms.best(rows)
    promise = promise_of(terms, rows, chosen, judged, 10.0, None)
    assert not promise.kept and promise.chosen == "near"
    assert promise.obstacle is not None and "min_speedup: 3.9 (3.8 for certain), bound 4" in promise.obstacle
    assert [t.fate for t in promise.tried] == ["the nearest one", "breaks min_speedup", "x"]
    few = obstacle(terms, worth(drop=0.004, drop_high=0.016, ratio_low=5.0), judged)
    assert few.startswith("data: it loses 0.4 where 1 are allowed") and "samples would tell" in few


@pytest.mark.parametrize("clause", ["max_drop", "min_speedup", "max_latency_ms", "max_size_mb"])
def test_a_clause_holds_where_the_end_of_its_interval_does(clause: str) -> None:
    contract = Contract(max_drop=1, min_speedup=2, max_latency_ms=5, max_size_mb=1)
    terms = Terms(contract, 0.01, share=True)
    good = {"drop_high": 0.01, "ratio": 2.5, "ratio_low": 2.0, "milliseconds_high": 5.0, "size_bytes": 10**6}
    bad = {"drop_high": 0.0101, "ratio_low": 1.99, "milliseconds_high": 5.01, "size_bytes": 10**6 + 1}
    field = {"max_drop": "drop_high", "min_speedup": "ratio_low", "max_latency_ms": "milliseconds_high"}
    changed = field.get(clause, "size_bytes")
    assert terms.holds(worth(**good))
    clauses = terms.clauses(worth(**{**good, changed: bad[changed]}))
    assert [c.name for c in clauses if not c.held] == [clause] and all(isinstance(c, Clause) for c in clauses)


def test_rows_of_the_table_that_beat_the_student_are_named() -> None:
    report = Report.loads((Path(__file__).parents[2] / "models" / "results" / "resnet20_cifar10.json").read_bytes())
    assert dominating(report) == []
    student = next(row for row in report.attribution if row.variant == "student")
    assert student.ratio_high is not None
    better = student.model_copy(update={"variant": "teacher_ptq", "ratio": 99.0, "ratio_low": student.ratio_high + 1})
    slower = better.model_copy(update={"ratio_low": student.ratio_high - 0.01})
    found = report.model_copy(update={"attribution": (student, better, slower)})
    assert dominating(found) == [better]


def test_a_row_that_was_timed_again_and_is_no_faster_is_not_named() -> None:
    report = Report.loads((Path(__file__).parents[2] / "models" / "results" / "resnet20_cifar10.json").read_bytes())
    student = next(row for row in report.attribution if row.variant == "student")
    better = student.model_copy(update={"variant": "teacher_ptq", "ratio": 99.0, "ratio_low": 98.0})
    found = report.model_copy(update={"attribution": (student, better)})
    assert "99.00x" in str(on_evaluation(a_promise(), found).dominated_by)
    assert on_evaluation(a_promise(), found, ["teacher_ptq"]).dominated_by is None


def test_rows_of_the_table_are_held_against_a_cascade_as_a_whole() -> None:
    """Not against its student, which is faster, and worse."""
    report = Report.loads((Path(__file__).parents[2] / "models" / "results" / "resnet20_cifar10.json").read_bytes())
    student = next(row for row in report.attribution if row.variant == "student")
    student = student.model_copy(update={"metric": 0.8, "ratio": 8.0, "ratio_low": 7.5, "ratio_high": 8.5})
    whole = CascadeResult(
        temperature=1.0, threshold=0.9, routed_validation=0.3, routed=0.3, metric=0.9, student_metric=0.8,
        teacher_metric=0.91, mean_ms=1.0, ratio=2.4, size_bytes=1000,
    )  # fmt: skip

    def row(metric: float, low: float) -> AttributionRow:
        return student.model_copy(update={"variant": "teacher_ptq", "metric": metric, "ratio": low, "ratio_low": low})

    better, worse, no_faster = row(0.9, 3.0), row(0.89, 5.0), row(0.95, 2.35)
    found = report.model_copy(update={"attribution": (student, better, worse, no_faster), "cascade": whole})
    assert dominating(found) == [better]
    untimed = found.model_copy(update={"cascade": whole.model_copy(update={"ratio": None, "mean_ms": None})})
    assert dominating(untimed) == []


@pytest.mark.parametrize(("metric", "measured"), [("accuracy", True), ("decisions that are the teacher's", False)])
def test_a_drop_is_held_against_the_report_where_it_is_of_the_same_metric(metric: str, measured: bool) -> None:
    report = Report.loads((Path(__file__).parents[2] / "models" / "results" / "resnet20_cifar10.json").read_bytes())
    clause = Clause(name="max_drop", bound=1.0, validation=0.0, certain=0.5, held=True)
    made = Promise(
        kept=True, chosen="static", free="speed", metric=metric, teacher=0.9, clauses=(clause,), tried=(),
        validation_samples=400, budget="15m", seconds=1.0,
    )  # fmt: skip
    assert (on_evaluation(made, report).clauses[0].evaluation is not None) == measured


def test_why_pruning_ended_is_in_every_report() -> None:
    judged = judge(right(300, 400), torch.zeros(400, dtype=torch.int64))
    rows = [tried("static")]
    ended = "pruning ended at width 2x: it loses 6 points after a brief training"
    promise = promise_of(Terms(Contract(), 0.01, share=True), rows, rows[0], judged, 1.0, None, ended)
    report = Report.loads((Path(__file__).parents[2] / "models" / "results" / "resnet20_cifar10.json").read_bytes())
    report = report.model_copy(update={"promise": promise})
    assert f"- {ended}\n" in "\n\n".join(promise_section(promise, report))
    assert f"<li>P{ended[1:]}.</li>" in str(section(report))
    assert report.promise is not None and report.promise.ended == ended


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": "soon"}, '^contract: budget = "soon" is neither'),
        ({"max_drop": -1}, "^contract: max_drop: .*greater than or equal to 0"),
        ({"max_drop": 1e-300}, "less than any data can tell"),
        ({"budget": "9" * 400 + "s"}, "neither a time nor"),
        ({"max_dropp": 1}, 'did you mean "max_drop"'),
    ],
)
def test_a_contract_that_cannot_be_is_refused_in_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Contract(**fields)


def test_the_front_is_in_the_unit_of_the_contract() -> None:
    row = TriedStudent(name="a", what="", metric=0.9, drop=0.004, ratio=2.0, epochs=0, seconds=1, on_front=True)
    made = Promise(
        kept=False, chosen="a", free="speed", metric="accuracy", teacher=0.9, clauses=(), tried=(row,), obstacle="o",
        validation_samples=400, budget="15m", seconds=1.0,
    )  # fmt: skip
    assert "a loses 0.4 points at 2.00x" in broken_in_words(made, share=True)
    assert "a loses 0.004 at 2.00x" in broken_in_words(made, share=False)
