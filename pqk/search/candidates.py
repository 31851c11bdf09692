"""The networks that a search tries: integer forms of the teacher as it is, and of the teacher pruned ever further."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from pqk.bench.baselines import Tool
from pqk.core.program import Pass
from pqk.knowledge import CrossEntropy, KLDivergence
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.passes.distill.keep_best import Criterion
from pqk.report.schema import TITLES
from pqk.task.task import Task

GOALS = (1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0)
"""how many times fewer MACs than the teacher the rungs of the ladder have"""
QAT_SHARE = 0.25
"""of a final training, under quantization"""
QAT_RATE = {"sgd": 0.05, "adamw": 0.2}
"""of the rate before quantization"""
CutKind = Literal["width", "depth", "both"]
"""what is cut: channels, whole blocks, or both, decided at once by what they cost on data and in time"""
STATISTICS = 16
"""training batches on which batch norms are estimated again after a cut"""


@dataclass(frozen=True)
class Candidate:
    """A network by the passes that make it, as an ordinary recipe has them."""

    name: str
    what: str
    """how it is made, in words"""
    passes: tuple[Pass, ...]
    cut: CutKind | None = None
    """how it was cut; None: it is the whole teacher, or of the user's own recipe"""
    level: int = 0
    """which of the goals it was cut to, from 1 on"""
    shape: str | None = None
    """the name of the student of another shape that its passes begin with; None: a copy of the teacher"""
    tool: Tool | None = None
    """whose file of the teacher is deployed, in place of what the passes make: those of the teacher in float"""

    @property
    def floats(self) -> tuple[Pass, ...]:
        """The passes before it is captured."""
        return tuple(itertools.takewhile(lambda p: p.name != Capture.name, self.passes))

    @property
    def epochs(self) -> float:
        return sum(p.training_epochs for p in self.passes)


@dataclass(frozen=True)
class TrainingChoice:
    """How students of this teacher learn: what the trials chose, and what an epoch takes."""

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    seconds: float
    """of an epoch of the first rung, before quantization"""


STATIC, DYNAMIC, BLOCKS, MIXED = "static", "dynamic", "blocks", "mixed"
FLOAT, UNGROUPED = "float", "ungrouped"
LEAST_SQNR = 25.0
"""decibels that the outputs keep at least where a layer alone is quantized, else it stays in float; of a net whose
layers read all before them, whose channels differ in range, 46 % were right in INT8, and 67 % so (69 % in FP32)"""


def forms(teacher: nn.Module, *, blocks: bool = False) -> list[Candidate]:
    """What the teacher becomes without training; `blocks`: in blocks of `MatMulNBits`, too."""
    in_blocks = Candidate(
        BLOCKS, "linear layers INT8 in blocks of 32, not trained", _integers(Quantize(activations="blockwise"))
    )
    found = [
        Candidate(STATIC, "INT8 with fixed ranges, not trained", _integers(Quantize())),
        *([in_blocks] if blocks else []),
        Candidate(
            DYNAMIC, "linear layers INT8, with the ranges of each run", _integers(Quantize(activations="dynamic"))
        ),
        Candidate(FLOAT, "the teacher's layers in float", _integers(Quantize(float_layers=("*",)))),
    ]
    grouped = tuple(name for name, m in teacher.named_modules() if getattr(m, "groups", 1) > 1)
    if grouped:
        quantize = Quantize(float_layers=grouped)
        found.append(Candidate(UNGROUPED, "INT8 but for grouped convolutions, not trained", _integers(quantize)))
    return found


def gentler() -> list[Candidate]:
    """INT8 forms that lose less than with ranges of the least squared error, where that loses much."""
    return [
        Candidate(
            "min-max", "INT8 with fixed ranges of all values, not trained", _integers(Quantize(calibration="minmax"))
        ),
        Candidate(
            "guarded",
            "INT8 but for layers that alone cost much, not trained",
            _integers(Quantize(least_sqnr=LEAST_SQNR)),
        ),
    ]


def by_tool(tool: Tool) -> Candidate:
    """What another tool makes of the teacher without training."""
    passes, title = _integers(Quantize(float_layers=("*",))), TITLES[tool]
    return Candidate(title.removeprefix("teacher, "), f"{title}, as that tool writes it", passes, tool=tool)


def mixed() -> Candidate:
    """INT8 where each layer, timed in turn, is faster for it."""
    return Candidate(
        MIXED, "INT8 where that is faster, each layer timed, not trained", _integers(Quantize(faster_float=True))
    )


def _integers(quantize: Quantize) -> tuple[Pass, ...]:
    return (Capture(), quantize, Convert())


def in_float(student: Candidate) -> Candidate:
    """A student as it was before quantization, which nothing follows."""
    passes = (*student.floats, *_integers(Quantize(float_layers=("*",))))
    return replace(student, name=f"{student.name}, in float", what=f"{student.what}; in float", passes=passes)


def given(passes: Sequence[Pass], shape: str | None) -> list[Candidate]:
    """The passes of the user's own recipe, of the teacher or its own student, which compete with what is found."""
    return [Candidate("recipe", "the passes of the recipe", tuple(passes), shape=shape)] if passes else []


def shaped(shape: str, form: Candidate) -> Candidate:
    """A student of another shape as it was given, in integers as `form` is."""
    what = f"a student of another shape, as it was given; {form.what}"
    return Candidate(f"{shape}, {form.name}", what, form.passes, shape=shape)


def continued(start: Candidate, form: Candidate, training: TrainingChoice, epochs: float, number: int) -> Candidate:
    """A student of another shape that is trained for `epochs` more, in its round of that number."""
    passes = (*start.floats, distillation(training, epochs), *form.passes)
    what = f"a student of another shape, trained for {epochs:.2g} epochs more; {form.what}"
    return replace(start, name=f"{start.shape}, round {number}", what=what, passes=passes)


def distillation(training: TrainingChoice, epochs: float) -> Distill:
    """Training before quantization, from the labels and the teacher."""
    return Distill(
        epochs=epochs, optimizer=training.optimizer, learning_rate=training.learning_rate, clip=1.0,
        terms=(CrossEntropy(weight=0.1), KLDivergence(weight=0.9)),
    )  # fmt: skip


def rung(
    above: Sequence[Pass], cut: CutKind, level: int, form: Candidate, training: TrainingChoice, epochs: float
) -> Candidate:
    """A student cut further than what `above` makes, trained briefly, and in integers as `form` is."""
    what = f"cut by {cut} to {GOALS[level - 1]:g} times fewer MACs, trained briefly; {form.what}"
    passes = (*above, prune(level, cut), distillation(training, epochs), *form.passes)
    return Candidate(f"{cut} {GOALS[level - 1]:g}x", what, passes, cut, level)


def prune(level: int, cut: CutKind) -> Prune:
    """Cuts a student to a goal, as far as that goes."""
    return Prune(
        macs_ratio=GOALS[level - 1], width=cut != "depth", depth=cut != "width", best_effort=True,
        allocation="table" if cut == "both" else "greedy", batch_norm_batches=STATISTICS,
    )  # fmt: skip


def finished(start: Candidate, form: Candidate, training: TrainingChoice, epochs: float, keep: Criterion) -> Candidate:
    """A rung, or the teacher's form, that is trained for `epochs` more, the last of them under quantization."""
    capture, quantize, convert = form.passes
    rate = training.learning_rate * QAT_RATE[training.optimizer]
    under = replace(distillation(training, QAT_SHARE * epochs), learning_rate=rate, teach_from=0.1, keep=keep)
    float_ = distillation(training, (1 - QAT_SHARE) * epochs)
    what = f"{start.name}, trained {epochs:.2g} epochs more, a quarter of them under quantization"
    passes = (*start.floats, float_, capture, quantize, under, convert)
    stem, trained, number = start.name.partition(", trained")
    name = f"{stem}, trained" + (f" ({int(number.strip(' ()') or 1) + 1})" if trained else "")
    return replace(start, name=name, what=what, passes=passes)


def first_student(teacher: nn.Module, task: Task, outputs: Any) -> tuple[Pass, ...]:
    """The passes of the first student that a search cuts and trains, as a rehearsal takes them."""
    form = forms(teacher)[0]
    passes = form.passes
    if task.train is not None:
        passes = rung((), "width", 1, form, TrainingChoice("sgd", 0.02, 1.0), 1.0).passes
    return tuple(p.fitted(task, outputs) for p in passes)
