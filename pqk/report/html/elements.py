"""The few elements that the page is made of. What is not markup is escaped here, and nowhere else."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence

UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""what no HTML document may hold, not even escaped"""


SHORT = 12
"""characters of a cell that needs no more room than it has"""


class Markup(str):
    """Text that is markup already: `element` made it."""

    __slots__ = ()


def printable(text: str) -> str:
    """The text without what no document may hold."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(content: str) -> Markup:
    """Markup as it is; of any other text, what a browser shows as that text."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(printable(content)))


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """An element. `class_` is the attribute `class`, `aria_label` is `aria-label`."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    said = "".join(f' {name}="{html.escape(printable(value))}"' for name, value in named.items())
    return Markup(f"<{tag}{said}>{''.join(map(escape, content))}</{tag}>")


def joined(parts: Iterable[str], between: str = "\n") -> Markup:
    """Parts one behind the other, without the empty ones."""
    return Markup(between.join(escape(part) for part in parts if part))


def paragraph(*content: str, class_: str | None = None) -> Markup:
    return element("p", *content) if class_ is None else element("p", *content, class_=class_)


def bullets(lines: Iterable[str]) -> Markup:
    """A list; nothing where there are no lines."""
    items = [element("li", line) for line in lines]
    return element("ul", *items) if items else Markup("")


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1, marked: Collection[int] = ()
) -> Markup:
    """A table that scrolls by itself where it is wider than the page.

    `texts` leading columns are words and start on the left, the others are numbers; rows at `marked` stand out.
    """

    def cells(tag: str, row: Sequence[str], **scope: str) -> Iterable[Markup]:
        for i, cell in enumerate(row):
            kind = "number" if i >= texts else "long" if len(cell) > SHORT else ""
            yield element(tag, cell, **({"class_": kind} if kind else {}), **scope)

    head = element("thead", element("tr", *cells("th", header, scope="col")))
    lines = [
        element("tr", *cells("td", row), class_="marked") if i in marked else element("tr", *cells("td", row))
        for i, row in enumerate(rows)
    ]
    return element("div", element("table", head, element("tbody", *lines)), class_="scroll", tabindex="0")


def section(name: str, title: str, *content: str) -> Markup:
    """A part of the page with a heading; `name` is its address in the page."""
    return element("section", element("h2", title), "\n", *content, id=name)


def folded(summary: str, *content: str) -> Markup:
    """Content that is shown when it is asked for."""
    return element("details", element("summary", summary), *content)


def figure(picture: Markup, caption: str) -> Markup:
    """A picture with words below it; it scrolls by itself where it is wider than the page."""
    return element("figure", element("div", picture, class_="scroll", tabindex="0"), element("figcaption", caption))
