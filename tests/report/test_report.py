"""report.json: round trip, schema, refusals; the page and the table."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from reports import a_promise, a_report

from pqk.cli.views import parity, passes_done
from pqk.errors import InputError
from pqk.report.html.page import to_html
from pqk.report.markdown import to_markdown
from pqk.report.schema import SCHEMA_PATH, MetricValues, Parity, Report, schema_text
from pqk.report.text import DECIDING, declined_rows, promise_text, to_text
from pqk.target.machine import machine_fingerprint


def test_round_trip(tmp_path: Path) -> None:
    report = a_report()
    assert Report.loads(report.dumps()) == report
    (tmp_path / "report.json").write_text(report.dumps())
    assert Report.load(tmp_path / "report.json") == report
    assert Report.loads(report.dumps()).dumps() == report.dumps()


def test_json_has_what_readers_are_promised() -> None:
    document = json.loads(a_report().dumps())
    row = "variant runtime batch threads median_ms p05_ms p95_ms ratio ratio_low ratio_high"
    assert set(row.split()) <= document["latency"][0].keys()
    assert {"name", "unit", "teacher", "student"} == document["metric"].keys()
    assert {"passed", "layers", "agreement", "metric_delta"} <= document["parity"].keys()
    assert {"name", "max_lsb", "exact"} <= document["parity"]["layers"][0].keys()
    assert document["declined"] == [{"pass": "quantize", "layer": "softmax", "reason": "float | faster"}]
    assert document["passes"][0]["pass"] == "prune"


def test_the_committed_schema_is_the_models_and_reports_fit_it() -> None:
    assert SCHEMA_PATH.read_text() == schema_text(), "write pqk.report.schema_text() to report.schema.json"
    schema = json.loads(schema_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(json.loads(a_report().dumps()))
    wrong = json.loads(a_report().dumps())
    wrong["integer_coverage"] = 100
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"integer_coverage": 1.5}, "integer_coverage"),
        ({"unknown": 1}, "unknown"),
        ({"latency": [{"variant": "fastest"}]}, "latency.0"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], where: str) -> None:
    document = json.loads(a_report().dumps()) | change
    with pytest.raises(InputError, match=f"report.json: {where}"):
        Report.loads(json.dumps(document))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_what_passes_note_is_finite(value: str) -> None:
    document = json.loads(a_report().dumps())
    document["passes"][0]["details"] = {"losses": ["here"]}
    with pytest.raises(InputError, match=r"cannot read report\.json: .*is no number"):
        Report.loads(json.dumps(document).replace('"here"', value))


@pytest.mark.parametrize("value", [True, "1"])
def test_only_numbers_are_numbers(value: Any) -> None:
    with pytest.raises(InputError, match=r"report\.json: size_bytes"):
        Report.loads(json.dumps(json.loads(a_report().dumps()) | {"size_bytes": value}))


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        Report.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="the document"):
        Report.loads("{")


def test_the_page_says_everything() -> None:
    page = to_markdown(a_report())
    for text in (
        "| teacher, FP32 | 93.00 % |",
        "4.00x (3.90 to 4.10)",
        "1x (baseline)",
        "pruned, float: no latency_ms: not asked for",
        "**met**",
        "99.90 % of 1000 samples",
        "| conv1 | Conv | 1 | 99.99 % | equal |",
        "| quantize | softmax | float \\| faster |",
        "4 epochs, 100 s",
        "seed 0",
        "- a note",
    ):
        assert text in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_page_says_why_numbers_are_missing() -> None:
    page = to_markdown(
        a_report(
            latency=(),
            latency_reason="another machine",
            integer_coverage=None,
            integer_coverage_reason="no runtime",
            parity=None,
            parity_reason="no ONNX file",
            declined=(),
        )
    )
    for text in ("Not measured: another machine.", "not measured: no runtime", "not checked: no ONNX file", "Nothing."):
        assert text in page


def test_a_broken_contract_and_an_insignificant_ratio_are_said_so() -> None:
    report = a_report()
    assert report.parity is not None
    broken = report.parity.model_copy(update={"passed": False, "first_divergence": "conv1 (Conv): 3 LSB"})
    ratio = {"ratio": 1.05, "ratio_low": 0.9, "ratio_high": 1.2}
    slow = report.latency[1].model_copy(update={**ratio, "significant": False})
    last = report.attribution[2].model_copy(update=ratio)
    report = a_report(parity=broken, latency=(report.latency[0], slow), attribution=(last,))
    page = to_markdown(report)
    assert "**broken**" in page and "First divergence: conv1 (Conv): 3 LSB" in page
    assert page.count("no significant speed-up") == 2
    assert "significant" in to_text(report, width=160)


def test_the_table_fits_a_terminal() -> None:
    text = to_text(a_report(), width=120)
    assert "91.00 %" in text and "student: + QAT" in text and "x86-avx2" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_fingerprint_names_no_host_and_no_path() -> None:
    import platform

    told = machine_fingerprint()
    text = json.dumps(told)
    assert platform.node() not in text and "/" not in told["os"] and told["cores"] >= 1
    assert "torch" in told["versions"]


def test_what_is_lost_has_one_unit() -> None:
    """Points of a share in the clause, in the table of what was tried and in parity; the metric in per cent."""
    page = to_markdown(a_report(promise=a_promise()))
    (row,) = [line for line in page.splitlines() if line.startswith("| **narrow**")]
    assert "| 92.69 % | 0.81 points | 4.13x |" in row
    assert "max_drop = 1: 0.31 points on deciding data (at most 0.83 points for certain): held" in page
    assert (
        "min_speedup = 3: 4.13x on deciding data (at least 4.01x for certain): held; 4.07x on evaluation data" in page
    )
    assert "where the teacher has 93.00 %" in page and "metric differs by -0.01 points" in page
    assert "0.81 points" in to_html(a_report(promise=a_promise()))


def test_what_is_lost_of_another_metric_is_in_its_own_unit() -> None:
    metric = MetricValues(name="quality", unit="dB", teacher=0.93, student=0.91)
    page = to_markdown(a_report(promise=a_promise(), metric=metric))
    (row,) = [line for line in page.splitlines() if line.startswith("| **narrow**")]
    assert "| 0.9269 | 0.0081 | 4.13x |" in row and "points" not in page
    assert "metric differs by -0.0001" in page


def test_the_data_that_decides_is_not_called_what_the_split_of_the_training_data_is() -> None:
    """Each has its own name, and both are explained once."""
    report = a_report(promise=a_promise())
    markdown, html = to_markdown(report), to_html(report)
    for text in (markdown, html):
        assert text.count(DECIDING) == 1
        rest = text.replace(DECIDING, "")
        assert "deciding data" in rest and "validation samples" not in rest
    assert "validation" not in promise_text(a_promise(), share=True)
    table = next(part for part in passes_done(report) if hasattr(part, "columns"))
    assert "on validation data" in [column.header for column in table.columns]


def test_a_file_of_another_tool_is_not_said_to_have_met_anything() -> None:
    nothing = Parity(
        passed=True, layers=(), agreement=None, metric_delta=None, first_divergence=None, samples=0, mode="optimized"
    )
    report = a_report(parity=nothing)
    for text in (to_markdown(report), to_html(report), parity(report)):
        assert "nothing was compared: another tool wrote this file" in text
        assert "of 0 samples" not in text and "met" not in text.partition("Parity")[2].partition("nothing was")[0]
    assert "not compared" in to_html(report)


def test_what_is_left_alone_for_one_reason_is_one_line() -> None:
    """The file keeps every layer."""
    entries = [("quantize", f"layer{i}", "float is faster") for i in range(6)] + [("prune", "head", "it is the output")]
    assert declined_rows(entries) == [
        ["quantize", "layer0, layer1, layer2, layer3 and 2 more", "float is faster"],
        ["prune", "head", "it is the output"],
    ]
