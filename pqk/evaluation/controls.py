"""Controls: the student of a compile, trained once more without what its teacher knows. Listed in `CONTROLS`.

Each tells one explanation of a gain from another: with labels alone (does the teacher help?), with smoothed labels (or
do soft targets help, whatever they say?), with an untrained teacher (or does any second network?), and as a network
of that size from fresh weights (or would it have learned as much without what it began with, which is the teacher's
weights where it was cut out of it?). All draw what the student drew: the same passes on the same batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pqk.copies import copy_of
from pqk.core.pipeline import run_passes
from pqk.core.program import Pass, Program, Stage
from pqk.data.structures import concatenate
from pqk.errors import InputError, Reason
from pqk.evaluation.diagnostics import SAMPLES, Answers, answers, sampled
from pqk.knowledge import CrossEntropy, FromModule, LabelSmoothing
from pqk.knowledge.sources import restart
from pqk.passes import Distill, Factorize, Prune
from pqk.report.diagnostics import ControlVariant
from pqk.task.task import Task
from pqk.training.trainer import Training

Labels = CrossEntropy | LabelSmoothing
"""terms that see no teacher"""


@dataclass(frozen=True)
class Again:
    """The end of a recipe, to be run once more on `start`; its first pass is number `index` of the recipe."""

    start: Program
    passes: Sequence[Pass]
    index: int


@dataclass(frozen=True)
class Control:
    """One control: what it is called, where its run is saved, and what is run."""

    variant: ControlVariant
    folder: str
    plan: Callable[[Program, Task, Sequence[Pass]], Again | str]
    """(finished program, task, the recipe's passes) -> what to run, or why it does not apply"""

    def run(self, program: Program, task: Task, passes: Sequence[Pass]) -> Program | str:
        """The control's finished program, or why there is none. A killed run goes on at its last finished pass."""
        other = [p.name for p in passes if isinstance(p, Training) and not isinstance(p, Distill)]
        if other:
            return f'the recipe trains with "{other[0]}", which has no form without a teacher'
        again = self.plan(program, task, passes)
        if isinstance(again, str):
            return again
        assert program.run.folder is not None
        folder = program.run.folder / self.folder
        folder.mkdir(exist_ok=True)
        run = dataclasses.replace(program.run, folder=folder, identity=f"{program.run.identity}/{self.folder}")
        start = dataclasses.replace(again.start, run=run, fused=None)
        return run_passes(start, task, again.passes, start=again.index)


def _without_teacher(program: Program, task: Task, passes: Sequence[Pass]) -> Again | str:
    return _under_quantization(program, task, passes, CrossEntropy())


def _smoothed(program: Program, task: Task, passes: Sequence[Pass]) -> Again | str:
    """As soft as the teacher is: all other classes share what its mean top probability leaves."""
    with torch.inference_mode():
        said = [program.teacher(*b.for_teacher().inputs) for b in sampled(task.validation, SAMPLES)]
    found = answers(task, concatenate(said), None)
    if not isinstance(found, Answers):
        return found if isinstance(found, str) else "the task is no classification"
    left = 1 - float(found.logits.softmax(1).amax(1).mean())
    return _under_quantization(program, task, passes, LabelSmoothing(smoothing=min(0.9, max(0.001, left))))


def _untrained_teacher(program: Program, task: Task, passes: Sequence[Pass]) -> Again | str:
    taught = [p for p in passes if isinstance(p, Distill) and any(t.needs_teacher for t in p.terms)]
    if not taught or not all(isinstance(p.teacher, FromModule) for p in taught):
        return "its teacher is not the recipe's"
    again = _under_quantization(program, task, passes, None)
    if isinstance(again, str):
        return again
    random = copy_of(program.teacher)
    if (reason := _why_not_restarted(random, program)) is not None:
        return reason
    return dataclasses.replace(again, start=dataclasses.replace(again.start, teacher=random.eval()))


def _from_scratch(program: Program, task: Task, passes: Sequence[Pass]) -> Again | str:
    """The student's architecture from fresh weights, on labels, with the epochs that the recipe spends in float."""
    cut = max((i for i, p in enumerate(passes) if isinstance(p, Prune | Factorize)), default=-1)
    floats = [r.index for r in program.records if isinstance(passes[r.index], Distill) and r.stage == "MODULE"]
    if not floats or floats[-1] < cut:
        return "the recipe trains nothing in float after its last pruning"
    start = dataclasses.replace(program, student=copy_of(program.origin).requires_grad_(True), plan=())
    start = dataclasses.replace(start, stage=Stage.MODULE, records=(), declined=())
    if cut >= 0:
        start = program.after(cut)
    if (reason := _why_not_restarted(start.student, program)) is not None:
        return reason
    rest = [_on(p, CrossEntropy()) for p in passes[cut + 1 :]]
    first = next(i for i in floats if i > cut) - cut - 1
    epochs = sum(p.epochs for i in floats if isinstance(p := passes[i], Distill))
    training = rest[first]
    assert isinstance(training, Distill)
    rest[first] = dataclasses.replace(training, epochs=epochs)
    rest = [p for i, p in enumerate(rest) if i == first or i + cut + 1 not in floats]
    return Again(start, rest, cut + 1)


CONTROLS = (
    Control("student_no_kd", "without-knowledge", _without_teacher),
    Control("student_label_smoothing", "label-smoothing", _smoothed),
    Control("student_random_teacher", "untrained-teacher", _untrained_teacher),
    Control("student_from_scratch", "from-scratch", _from_scratch),
)


def _under_quantization(program: Program, task: Task, passes: Sequence[Pass], term: Labels | None) -> Again | str:
    """The recipe from its first quantization-aware training on, with `term` alone (None: with its own terms)."""
    trained = (
        r.index for r in program.records if isinstance(passes[r.index], Distill) and r.stage == str(Stage.FAKE_QUANT)
    )
    index = next(trained, None)
    if index is None:
        return "the recipe trains nothing under quantization"
    start = program.after(index - 1)
    return Again(start, [p if term is None else _on(p, term) for p in passes[index:]], index)


def _on(p: Pass, term: Labels) -> Pass:
    """A training on one term that needs no teacher; any other pass as it is."""
    return dataclasses.replace(p, terms=(term,), teach_from=0.0) if isinstance(p, Distill) else p


def _why_not_restarted(model: torch.nn.Module, program: Program) -> Reason | None:
    """Draw all weights anew, alike in every run of a seed; or why that cannot be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.run.seed_for("control") & 0xFFFFFFFF)
        try:
            restart(model)
        except InputError as error:
            return str(error)
    return None
