"""The page's pictures: metric against speed, time by layer, accuracy by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pqk.report.diagnostics import ClassAccuracy
from pqk.report.html.drawing import ACCENT, INK, LINE, MUTED, PAPER, SECOND, THIRD, drawn
from pqk.report.html.elements import Markup, printable
from pqk.report.layer_times import LayerTimes
from pqk.report.promise import Promise, TriedStudent
from pqk.report.schema import TITLES, Report, VariantName

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot

MOST_LAYERS, MOST_CLASSES, LONGEST_NAME = 40, 30, 30
ROW = 20
"""pixels of a layer or class"""


@dataclass(frozen=True)
class PlottedNetwork:
    """A point of the picture of metric against speed."""

    number: int
    """of its row in the table below the picture"""
    name: str
    metric: float
    metric_low: float
    speed: float
    speed_low: float
    speed_high: float
    chosen: bool = False
    on_front: bool = False


def tried_students(promise: Promise) -> list[PlottedNetwork]:
    """Those of the networks that were tried that have a metric and a speed."""
    return [
        PlottedNetwork(
            number=number, name=t.name, metric=t.metric, metric_low=t.metric - _beyond(t), speed=t.ratio,
            speed_low=t.ratio_low or t.ratio, speed_high=t.ratio_high or t.ratio, chosen=t.name == promise.chosen,
            on_front=t.on_front,
        )
        for number, t in enumerate(promise.tried, 1)
        if t.ratio is not None and t.metric is not None
    ]  # fmt: skip


def _beyond(tried: TriedStudent) -> float:
    """How much more of the metric than was measured may be lost."""
    return 0.0 if tried.drop is None or tried.drop_high is None else max(0.0, tried.drop_high - tried.drop)


def networks(report: Report) -> list[PlottedNetwork]:
    """The rows of the attribution table that have a metric and a speed."""
    points = [
        PlottedNetwork(
            number=number, name=r.label or TITLES[r.variant], metric=r.metric, metric_low=r.metric, speed=r.ratio,
            speed_low=r.ratio_low or r.ratio, speed_high=r.ratio_high or r.ratio, chosen=r.variant == "student",
        )
        for number, r in enumerate(report.attribution, 1)
        if r.metric is not None and r.ratio is not None
    ]  # fmt: skip

    def beaten(p: PlottedNetwork) -> bool:
        others = ((q.speed, q.metric) for q in points if (q.speed, q.metric) != (p.speed, p.metric))
        return any(speed >= p.speed and metric >= p.metric for speed, metric in others)

    return [replace(p, on_front=not beaten(p)) for p in points]


def metric_against_speed(
    name: str, points: Sequence[PlottedNetwork], metric: str, share: bool, caption: str, bounds: Promise | None = None
) -> Markup:
    """The front: every point with its intervals and number, the chosen one marked, a contract's bounds as lines."""
    chosen = next((f"; {p.name} is chosen" for p in points if p.chosen), "")
    what = f"{metric} of {len(points)} networks against their speed, relative to the teacher in FP32{chosen}"
    scale = 100.0 if share else 1.0
    lowest = _lowest_shown(points, scale, bounds)
    if any(scale * p.metric < lowest for p in points):
        caption += " Triangles are below the picture, at the metric in brackets."
    label = f"{metric} (%)" if share else metric
    return drawn(name, 340, what, caption, partial(_front, points, label, scale, lowest, bounds))


def _lowest_shown(points: Sequence[PlottedNetwork], scale: float, bounds: Promise | None) -> float:
    """The least metric that has a place in the picture: an untrained network would press all others together."""
    compared = [scale * p.metric for p in points if p.on_front or p.chosen or p is points[0]]
    least = None if bounds is None else _least_metric(bounds, scale)
    compared += [] if least is None else [least]
    return min(compared) - max(2 * (max(compared) - min(compared)), 0.01 * abs(max(compared)))


def _least_metric(bounds: Promise, scale: float) -> float | None:
    """What the contract asks of the metric; None where it asks nothing."""
    drop = next((clause.bound for clause in bounds.clauses if clause.name == "max_drop"), None)
    return None if drop is None else scale * bounds.teacher - drop


def _front(
    points: Sequence[PlottedNetwork], label: str, scale: float, lowest: float, bounds: Promise | None, plot: Plot
) -> None:
    front = sorted((p for p in points if p.on_front), key=lambda p: p.speed)
    speeds, metrics = [p.speed for p in front], [scale * p.metric for p in front]
    plot.plot(speeds, metrics, color=SECOND, drawstyle="steps-pre", linewidth=1.2, zorder=1)
    if bounds is not None:
        _bounds(bounds, scale, plot)
    middle = (min(p.speed_low for p in points) + max(p.speed_high for p in points)) / 2
    for p in points:
        _point(p, scale, lowest, p.speed > middle, plot)
    plot.margins(0.12)
    plot.set_xlabel("times as fast as the teacher in FP32")
    plot.set_ylabel(printable(label))


def _point(p: PlottedNetwork, scale: float, lowest: float, left: bool, plot: Plot) -> None:
    """One network with its number; one that is far below all others points down at the edge, with its metric."""
    x, y = p.speed, scale * p.metric
    colour = ACCENT if p.chosen else INK if p.on_front else MUTED
    words = f"{p.number} {_short(p.name)}" if p.chosen else f"{p.number}"
    below = y < lowest
    if below:
        words, y = f"{words} ({y:.4g})", lowest
    plot.errorbar(
        [x], [y], xerr=[[max(0.0, x - p.speed_low)], [max(0.0, p.speed_high - x)]],
        yerr=[[0.0 if below else max(0.0, scale * (p.metric - p.metric_low))], [0.0]], fmt="v" if below else "o",
        color=colour, markersize=10 if p.chosen else 6, elinewidth=1.0, zorder=3 if p.chosen else 2,
        markerfacecolor=colour if p.on_front or p.chosen else PAPER,
    )  # fmt: skip
    plot.annotate(
        words, (x, y), xytext=(-7 if left else 7, -16 if p.chosen else 6), textcoords="offset points", color=colour,
        ha="right" if left else "left", fontweight="bold" if p.chosen else "normal",
    )  # fmt: skip


def _bounds(bounds: Promise, scale: float, plot: Plot) -> None:
    """What the contract asks of metric and speed, as lines that the student must be beyond."""
    dashed = (0, (4, 3))
    for clause in bounds.clauses:
        if clause.name == "min_speedup":
            plot.axvline(clause.bound, color=THIRD, linestyle=dashed, linewidth=1.2)
    if (least := _least_metric(bounds, scale)) is not None:
        plot.axhline(least, color=THIRD, linestyle=dashed, linewidth=1.2)


def time_by_layer(times: LayerTimes, first: VariantName, second: VariantName) -> Markup:
    """The layers of two networks beside each other; of many those that take longest."""
    a, b = times.of(first), times.of(second)

    def spent(layer: str) -> float:
        return max(of[layer].milliseconds if layer in of else 0.0 for of in (a, b))

    names = times.layer_names()
    shown = set(sorted(names, key=spent, reverse=True)[:MOST_LAYERS])
    layers = [name for name in names if name in shown]
    caption = "In the order of execution. Milliseconds of one call under the profiler."
    if len(layers) < len(names):
        caption = f"The {len(layers)} of {len(names)} layers that take longest. {caption}"
    pairs = [tuple(of[la].milliseconds if la in of else 0.0 for of in (a, b)) for la in layers]
    titles = [TITLES[v] for v in (first, second)]
    what = f"Milliseconds by layer: {titles[0]} and {titles[1]}"
    return drawn("layers", 70 + ROW * len(layers), what, caption, partial(_layers, layers, pairs, titles))


def _layers(layers: Sequence[str], pairs: Sequence[tuple[float, ...]], titles: Sequence[str], plot: Plot) -> None:
    at = range(len(layers))
    for side, colour in enumerate((SECOND, ACCENT)):
        places = [i + 0.4 * side - 0.2 for i in at]
        plot.barh(places, [pair[side] for pair in pairs], height=0.38, color=colour, label=titles[side])
    plot.set_yticks(list(at), [_short(name) for name in layers], fontsize=11)
    plot.set_ylim(len(layers) - 0.4, -0.6)
    plot.grid(visible=False, axis="y")
    plot.tick_params(axis="y", length=0)
    plot.set_xlabel("ms")
    plot.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def accuracy_of_classes(classes: Sequence[ClassAccuracy]) -> Markup:
    """Teacher and student of each class; of many those that change most."""
    shown = sorted(classes, key=lambda c: -abs(c.difference.mean))[:MOST_CLASSES]
    shown = sorted(shown, key=lambda c: c.difference.mean)
    caption = "Accuracy on the evaluation samples of each class, sorted by what the student loses."
    if len(shown) < len(classes):
        caption = f"The {len(shown)} of {len(classes)} classes in which they differ most. {caption}"
    what = f"Accuracy of teacher and student on {len(shown)} classes"
    return drawn("classes", 70 + ROW * len(shown), what, caption, partial(_classes, shown))


def _classes(classes: Sequence[ClassAccuracy], plot: Plot) -> None:
    at = range(len(classes))
    teacher, student = [100 * c.teacher for c in classes], [100 * c.student for c in classes]
    for i, t, s in zip(at, teacher, student, strict=True):
        plot.plot([t, s], [i, i], color=LINE if s >= t else THIRD, linewidth=2, zorder=1)
    plot.scatter(teacher, at, s=44, color=SECOND, label="teacher", zorder=2)
    plot.scatter(student, at, s=28, color=ACCENT, label="student", zorder=3)
    plot.set_yticks(list(at), [f"class {c.label}" for c in classes], fontsize=11)
    plot.set_ylim(len(classes) - 0.4, -0.6)
    plot.grid(visible=False, axis="y")
    plot.tick_params(axis="y", length=0)
    plot.set_xlabel("accuracy (%)")
    plot.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _short(name: str) -> str:
    """A name of any length in a picture: its end, which is what tells layers apart."""
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
