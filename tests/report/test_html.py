"""report.html: strict markup, texts that stay texts, the report's numbers, nothing that is loaded, a bounded size."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from reports import a_full_report, a_promise, a_report, with_texts

from pqk.cli.app import run
from pqk.deploy.artifact import write_report
from pqk.report.html.drawing import drawn
from pqk.report.html.page import to_html
from pqk.report.schema import Report
from pqk.report.text import attribution_cells, difference_text, latency_cells, percent

ROOT = Path(__file__).parents[2]
REPORTS = sorted(
    [*(p for p in (ROOT / "models" / "results").glob("*.json") if '"attribution"' in p.read_text()),
     *(ROOT / "tests" / "old_artifacts" / "artifacts").glob("*/report.json")]
)  # fmt: skip
HOSTILE = '<script>alert("&amp;")</script> $x$ #010101 id="a" \'"><b onclick=x> url(http://x.y) \x00'
VOID = {"meta"}
KNOWN = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section", "h1", "h2", "h3", "p", "ul",
    "li", "a", "dl", "div", "dt", "dd", "small", "strong", "span", "table", "thead", "tbody", "tr", "th", "td",
    "figure", "figcaption", "details", "summary", "svg", "g", "path", "use", "defs", "clipPath", "rect", "text",
}  # fmt: skip


def parsed(page: str) -> ElementTree.Element:
    """The page as strict XML, which is valid HTML of these elements: all closed, all attributes quoted."""
    assert page.startswith("<!DOCTYPE html>\n")
    root = ElementTree.fromstring(page)
    assert {e.tag for e in root.iter()} <= KNOWN
    assert all(not len(e) and not e.text for e in root.iter() if e.tag in VOID)
    ids = Counter(e.get("id") for e in root.iter() if e.get("id"))
    assert all(count == 1 for count in ids.values()), ids
    for e in root.iter():
        assert not [name for name in e.attrib if name.startswith("on")]
        drawn_with = " ".join(value for name, value in e.attrib.items() if name != "aria-label")
        references = [e.get("href", "#"), *re.findall(r"url\(([^)]*)\)", drawn_with)]
        assert all(r == "#" or (r[0] == "#" and r[1:] in ids) for r in references), references
        assert not {"src", "srcset", "action", "data", "poster"} & e.attrib.keys()
    return root


def texts(page: str) -> list[str]:
    """Everything that is read, piece by piece."""
    return [t for t in parsed(page).itertext() if t.strip()]


def cells(page: str) -> list[list[str]]:
    """The rows of all tables."""
    return [["".join(c.itertext()) for c in row if c.tag == "td"] for row in parsed(page).iter("tr")]


def test_the_page_has_every_part() -> None:
    root = parsed(to_html(a_full_report()))
    sections = [e.get("id") for e in root.iter("section")]
    assert sections == ["promise", "front", "layers", "parity", "classes", "tried", "latency", "conditions"]
    links = [e.get("href") for e in root.iter("a")]
    assert links == [f"#{name}" for name in sections]
    pictures = {e.get("aria-label") for e in root.iter("svg")}
    assert len(pictures) == 4 and "accuracy of 3 networks against their speed" in str(pictures)
    assert not [t for t in root.itertext() if "could not be drawn" in t]


def test_the_numbers_are_the_reports() -> None:
    report = a_full_report()
    assert report.promise and report.layer_times and report.diagnostics and report.parity
    page = to_html(report)
    rows = cells(page)
    for i, row in enumerate(report.attribution, 1):
        assert [f"{i}", *attribution_cells(report, row)] in rows
    for row in report.latency:
        assert latency_cells(row) in rows
    *measured, failed = report.promise.tried
    for tried in measured:
        own = next(r for r in rows if r[1:2] == [tried.name])
        assert {tried.what, tried.fate, percent(tried.metric), difference_text(tried.drop_high, share=True)} <= {*own}
        assert {"120 kB", "20.0 M", "4.5", "61 s"} <= {*own}
        assert f"{tried.ratio:.2f}x ({tried.ratio_low:.2f} to {tried.ratio_high:.2f})" in own
    assert ["4", "odd", failed.what, "does not compile", *["–"] * 6, "0", "3 s"] in rows
    assert ["stem.conv", "1.234 ms", "68.5 %", "float", "0.321 ms", "100.0 %", "integer"] in rows
    assert ["block.conv", "0.567 ms", "31.5 %", "float", "–", "", ""] in rows
    assert ["all layers", "1.801 ms", "", "", "0.321 ms", "", ""] in rows
    assert ["0", "997", "95.00 %", "91.23 %", "-3.77 % (-4.77 to -2.77)"] in rows
    assert ["loses at most 1 point of the metric", "0.31 points", "0.83 points", "holds", "–", "–"] in rows
    assert ["is at least 3x as fast", "4.13x", "4.01x", "holds", "4.07x", "holds"] in rows
    assert ["conv1", "Conv", "1", "99.99 %", "equal"] in rows
    said = " ".join(texts(page))
    for text in ("5,123 deciding samples", "10,000 samples", "teacher, INT8 by PTQ alone was not measured", "a note",
                 "99.90 % of 1000 samples", "Budget 15m; the search took 12 min"):  # fmt: skip
        assert text in said


@pytest.mark.parametrize(
    ("promise", "headline", "said"),
    [
        ({}, "The promise is kept", "fastest of those that keep every clause, or as good and loses less, of 4"),
        ({"free": "metric"}, "The promise is kept", "the one that loses least of the metric of those"),
        ({"kept": False, "obstacle": "layer X"}, "The promise is not kept", "in the way: layer X."),
        ({"dominated_by": "the row Y"}, "The promise is kept", "better in metric and speed, for sure: the row Y."),
    ],
)
def test_the_first_sentence_says_whether_the_promise_is_kept(promise: Any, headline: str, said: str) -> None:
    page = to_html(a_full_report(promise=a_promise(**promise)))
    root = parsed(page)
    (title,) = root.iter("h1")
    assert str(title.text).startswith(headline) and said in " ".join(texts(page))
    verdict = next(e for e in root.iter("strong"))
    assert verdict.text == ("not kept" if promise.get("kept") is False else "kept")


def test_a_promise_that_evaluation_data_breaks_is_said_first() -> None:
    drop, speed = a_promise().clauses
    broken = speed.model_copy(update={"evaluation": 2.9, "held_on_evaluation": False})
    page = to_html(a_full_report(promise=a_promise(clauses=(drop, broken))))
    (title,) = parsed(page).iter("h1")
    assert title.text == "The promise was kept on deciding data, but does not hold on evaluation data"
    assert ["is at least 3x as fast", "4.13x", "4.01x", "holds", "2.9x", "broken"] in cells(page)


def test_without_a_contract_the_first_sentence_is_the_result() -> None:
    page = to_html(a_report())
    (title,) = parsed(page).iter("h1")
    assert title.text == "4.00x as fast as its teacher; accuracy 91.00 %, the teacher's 93.00 %"
    assert "No contract was given" in " ".join(texts(page)) and "promise" not in page.lower()


def test_every_text_stays_a_text() -> None:
    """Whatever names, reasons and notes say, the page has the elements that it has with plain words."""
    document = json.loads(a_full_report().dumps())
    plain, hostile = (to_html(Report.loads(json.dumps(with_texts(document, t)))) for t in ("word " * 18, HOSTILE))
    shape = [(e.tag, sorted(e.attrib)) for e in parsed(plain).iter()]
    assert [(e.tag, sorted(e.attrib)) for e in parsed(hostile).iter()] == shape
    shown = HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    said = texts(hostile)
    assert len([t for t in said if shown in t]) > 30
    (drawn_name,) = [t for t in said if t.startswith("2 …")]  # in a picture, by its end
    assert shown.endswith(drawn_name.removeprefix("2 …"))


def test_nothing_is_loaded() -> None:
    page = to_html(a_full_report())
    assert not re.search(r"https?:|//|@import|<script|<link|<img|<iframe|javascript:", page, re.IGNORECASE)


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_committed_reports_have_a_page(path: Path) -> None:
    report = Report.load(path)
    page = to_html(report)
    said = " ".join(texts(page))
    layers = 0 if report.parity is None else len(report.parity.layers)
    assert "could not be drawn" not in said and len(page) < 140_000 + 600 * layers
    rows = cells(page)
    for i, row in enumerate(report.attribution, 1):
        assert [f"{i}", *attribution_cells(report, row)] in rows
    assert ("Not measured" in said) is (report.layer_times is None)  # where the time goes
    assert ("tokens a second after the first" in said) is (report.texts is not None)


def test_a_report_with_nothing_has_a_page() -> None:
    nothing: dict[str, Any] = {
        "metric": None, "latency": (), "latency_reason": "another machine", "integer_coverage": None,
        "integer_coverage_reason": "no runtime", "parity": None, "parity_reason": "no file", "attribution": (),
        "passes": (), "declined": (), "notes": (),
    }  # fmt: skip
    page = to_html(a_report(**nothing))
    said = " ".join(texts(page))
    for text in ("A student for x86-avx2", "Not measured: another machine.", "not measured: no runtime", "no file"):
        assert text in said


def test_the_size_is_bounded() -> None:
    """Hundreds of layers, classes and networks: pictures show the most important, tables all."""
    report = a_full_report()
    assert report.promise and report.layer_times and report.diagnostics
    teacher = report.layer_times.networks[0]
    layers = tuple(
        teacher.layers[0].model_copy(update={"layer": f"block.{i}.conv", "milliseconds": i}) for i in range(300)
    )
    (row, _) = report.diagnostics.accuracy_by_class
    classes = tuple(row.model_copy(update={"label": i}) for i in range(1000))
    tried = tuple(t.model_copy(update={"name": f"{t.name} {i}"}) for i in range(50) for t in report.promise.tried)
    networks = (teacher.model_copy(update={"layers": layers}), report.layer_times.networks[1])
    parts = {
        "layer_times": report.layer_times.model_copy(update={"networks": networks}),
        "diagnostics": report.diagnostics.model_copy(update={"accuracy_by_class": classes}),
        "promise": a_promise(tried=tried),
    }
    page = to_html(report.model_copy(update=parts))
    assert len(page) < 700_000
    said = " ".join(texts(page))
    assert "The 40 of 301 layers that take longest." in said and "The 30 of 1000 classes" in said
    assert len([r for r in cells(page) if r and r[0].startswith("block.")]) == 300


def test_the_same_report_has_the_same_page() -> None:
    report = a_full_report()
    assert to_html(report) == to_html(Report.loads(report.dumps()))


def test_a_network_that_only_a_later_version_knows_has_its_own_name() -> None:
    report = a_full_report()
    assert report.layer_times
    later = report.layer_times.networks[1].model_copy(update={"variant": "student_of_tomorrow"})
    times = report.layer_times.model_copy(update={"networks": (report.layer_times.networks[0], later)})
    page = to_html(report.model_copy(update={"layer_times": times}))
    heads = ["".join(e.itertext()) for e in parsed(page).iter("th")]
    assert "student_of_tomorrow" in heads and ["all layers", "1.801 ms", "", "", "0.321 ms", "", ""] in cells(page)


def test_a_network_far_below_is_at_the_edge_of_the_picture() -> None:
    """An untrained network would press all others together."""
    far = a_report().attribution[1].model_copy(update={"metric": 0.1025, "ratio": 2.0})
    said = texts(to_html(a_report(attribution=(a_report().attribution[0], far, a_report().attribution[2]))))
    assert "2 (10.25)" in said and "20" not in said  # which would be on the axis
    assert any("Triangles are below the picture" in t for t in said)
    assert not any("Triangles" in t for t in texts(to_html(a_report())))


def test_a_picture_that_fails_is_a_sentence() -> None:
    def draw(plot: Any) -> None:
        raise ValueError("<no> data")

    shown = drawn("name", 100, "what", "caption", draw)
    assert shown == '<p class="note">The picture could not be drawn: ValueError: &lt;no&gt; data.</p>'


def test_it_is_written_beside_the_other_page_where_it_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(a_report(), tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == to_html(a_report())
    (tmp_path / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    write_report(a_report(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_the_command_writes_it_from_report_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(a_report().dumps())
    assert run(["report", str(tmp_path), "--html"]) == 0
    page = to_html(a_report())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert run(["report", str(tmp_path / "report.json"), "--html", "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == page
    capsys.readouterr()
    assert run(["report", str(tmp_path)]) == 0
    assert "# Compressed for x86-avx2" in capsys.readouterr().out
    assert run(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(a_report().dumps())


def test_the_command_refuses_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert run(["report", *arguments]) == 2
        return capsys.readouterr().err

    assert "none.json" in refused(str(tmp_path / "none.json"), "--html")
    assert "--out names the file of --html" in refused(str(tmp_path), "--out", "x.html")
    (tmp_path / "report.json").write_text(a_report().dumps())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed: pip install 'pqk[report]'" in refused(str(tmp_path), "--html")
