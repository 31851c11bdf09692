"""Matplotlib's pictures as SVG inside the page: in the page's colours and font, with names that are the page's alone.

Pictures are drawn in colours that stand for the page's variables, so that one picture is right in light and dark.
Nothing is loaded: no font, no style, no script.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pqk.errors import Reason, first_line
from pqk.quiet import quiet
from pqk.report.html.elements import Markup, escape, figure, paragraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot

INSTALL = "pip install 'pqk[report]'"
INK, MUTED, LINE, ACCENT, SECOND, THIRD, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 8))
VARIABLES = dict(
    zip(
        (INK, MUTED, LINE, ACCENT, SECOND, THIRD, PAPER),
        ("ink", "muted", "line", "accent", "second", "third", "paper"),
        strict=True,
    )
)
WIDTH = 500
"""of a picture, in pixels of a page that is not narrow; its text can still be read on a telephone"""
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollars is a name
    "font.size": 12.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
}


def why_not_drawn() -> Reason | None:
    """Why there are no pictures here."""
    return None if importlib.util.find_spec("matplotlib") else f"matplotlib is not installed: {INSTALL}"


def drawn(name: str, height: float, what: str, caption: str, draw: Callable[[Plot], None]) -> Markup:
    """A figure in which `draw` has drawn, `WIDTH` x `height` pixels.

    Args:
        name: of the figure in its page.
        height: in pixels.
        what: what can be seen, for those who cannot see it.
        caption: the words below it.
        draw: gets matplotlib's axes.
    """
    try:
        with quiet():  # a name in a script that matplotlib's own font lacks; the browser's fonts have it
            svg = _svg(name, height, draw)
    except Exception as error:  # a picture that fails is no reason to lose a finished student
        return paragraph(f"The picture could not be drawn: {first_line(error)}.", class_="note")
    return figure(_inline(svg, name, what), caption)


def _svg(name: str, height: float, draw: Callable[[Plot], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {**SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        canvas = FigureCanvasSVG(Figure(figsize=(WIDTH / 72, height / 72), layout="constrained"))
        draw(canvas.figure.add_subplot())
        text = io.StringIO()
        canvas.print_svg(text, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()


def _inline(svg: str, name: str, what: str) -> Markup:
    """What a page needs of an SVG file: without its prologue and size, its colours variables, its names its own."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", body))

    def adopted(tag: re.Match[str]) -> str:
        """A tag for this page; texts between tags may say anything, and stay."""
        made = re.sub(r" *font-family: [^;\"]*;", "", tag[0]).replace("xlink:href", "href")
        made = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", made)
        made = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", made)
        made = re.sub(r"#0[1-7]0[1-7]0[1-7]\b", lambda m: f"var(--{VARIABLES.get(m[0], 'ink')})", made)
        return re.sub(r"\s*\n\s*", " ", made)

    body = re.sub(r"<[^>]+>", adopted, re.sub(r">\s*\n\s*<", "><", body.strip()))
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(what)}">{body}')
