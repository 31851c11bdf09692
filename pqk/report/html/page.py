"""`report.html`: the report for whoever decides, in one file that loads nothing, needs no script and no network."""

from __future__ import annotations

from pathlib import Path
from string import Template

from pqk.report.html.drawing import why_not_drawn
from pqk.report.html.elements import Markup, bullets, element, escape, joined, paragraph, section
from pqk.report.html.evidence import by_class, conditions, distillation, latencies, layers, parity
from pqk.report.html.verdict import cascade, front, headline, lead, numbers, promise, texts, tried
from pqk.report.schema import Report

__all__ = ["to_html", "why_not_drawn"]

HERE = Path(__file__).parent
SECTIONS = {
    "promise": ("The promise", promise),
    "cascade": ("The cascade", cascade),
    "texts": ("Texts", texts),
    "front": ("Metric against speed", front),
    "layers": ("Where the time goes", layers),
    "parity": ("Parity and coverage", parity),
    "classes": ("Accuracy by class", by_class),
    "distillation": ("Whether distillation worked", distillation),
    "tried": ("What was tried", tried),
    "latency": ("All latencies", latencies),
    "conditions": ("Conditions", conditions),
}
"""of the page, by their address; one that has nothing to say of a report is left out"""


def to_html(report: Report) -> str:
    """The page of a report, the same for the same report and version of matplotlib, which draws its pictures."""
    made = {name: content for name, (_, make) in SECTIONS.items() if (content := make(report))}
    links = [element("a", SECTIONS[name][0], href=f"#{name}") for name in made]
    title = headline(report)
    body = [
        element(
            "header",
            paragraph(f"Compressed for {report.target}", class_="over"),
            element("h1", title),
            paragraph(lead(report), class_="lead"),
            numbers(report),
            element("nav", bullets(links), aria_label="Sections"),
        ),
        *(section(name, SECTIONS[name][0], content) for name, content in made.items()),
    ]
    page = Template((HERE / "page.html").read_text(encoding="utf-8"))
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), style=style, body=joined(body))
