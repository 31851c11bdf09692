"""The one thing that flows through the compiler, and the one verb that changes it.

A `Program` holds the frozen teacher, the student, the stage the student is in, the target, and everything that was
done so far. A `Pass` decides; a *rewrite* does. A rewrite is a plain function

    rewrite(student, example, **arguments) -> student

whose arguments are JSON. `Program.rewrite` calls it and writes it into the *plan*, so the plan replayed on a copy of
what the student began as (the teacher, or a network of another shape), plus the saved tensors, gives the student back:
without pickle, after a crash, or years later.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from pqk.copies import copy_of
from pqk.errors import InputError, Reason
from pqk.report.schema import Declined, PassRecord
from pqk.settings import CONFIG as CONFIG  # passes that users wrote take it from here

if TYPE_CHECKING:
    from pqk.core.run_context import RunContext
    from pqk.target.target import Target
    from pqk.task.task import Task

Example = tuple[Tensor, ...]
RewriteFunction = Callable[..., nn.Module]


class Stage(enum.IntEnum):
    """What the student is. A stage only moves right."""

    MODULE = 0
    """an ordinary float `nn.Module`"""
    GRAPH = 1
    """the ATen graph that will be deployed, batch norm folded"""
    FAKE_QUANT = 2
    """that graph with fake-quantizers on the target's integer grid; it trains"""
    INT8 = 3
    """that graph with integer weights and explicit quantize / dequantize"""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Rewrite:
    """One line of the plan: the name of a rewrite function and its JSON arguments."""

    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A finished pass of a run, and how the program that it left is had again."""

    index: int
    finished: Pass
    stage: Stage
    restore: Callable[[], Program]


@dataclass(frozen=True)
class Program:
    """The state of a compilation. Passes return a new one; the teacher is never changed."""

    teacher: nn.Module
    student: nn.Module
    stage: Stage
    target: Target
    run: RunContext
    plan: tuple[Rewrite, ...] = ()
    declined: tuple[Declined, ...] = ()
    records: tuple[PassRecord, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    """the finished passes of this run that are saved, in order"""
    details: Mapping[str, Any] = field(default_factory=dict)
    """what the current pass wants noted in its record (JSON)"""
    fused: fx.GraphModule | None = None
    """the INT8 student as a program of fused operators; made from the student, so it is not saved"""
    given: nn.Module | None = None
    """the student of another shape that the compile was given, frozen; None: the student is cut out of the teacher"""

    @staticmethod
    def begin(teacher: nn.Module, target: Target, run: RunContext, given: nn.Module | None = None) -> Program:
        """The program before its first pass: the student trains, and is a copy of the `given` one or of the teacher."""
        origin = teacher if given is None else given
        # A frozen origin makes a student that trains: rewrites freeze what must not.
        student = copy_of(origin, "teacher" if given is None else "student").requires_grad_(True)
        return Program(teacher, student, Stage.MODULE, target, run, given=given)

    @property
    def origin(self) -> nn.Module:
        """What the plan begins with, unchanged: the given student, or else the teacher."""
        return self.teacher if self.given is None else self.given

    def rewrite(self, function: RewriteFunction, example: Example, **arguments: Any) -> Program:
        """Apply one rewrite to the student and append it to the plan. `arguments` must be JSON."""
        student = function(self.student, example, **arguments)
        return replace(self, student=student, plan=(*self.plan, Rewrite(function.__name__, arguments)))

    def decline(self, pass_name: str, reasons: Iterable[tuple[str, str]]) -> Program:
        """Note `(layer, reason)` pairs that `pass_name` left alone."""
        more = [Declined(pass_name=pass_name, layer=layer, reason=reason) for layer, reason in reasons]
        return replace(self, declined=(*self.declined, *more))

    def after(self, index: int) -> Program:
        """The program as pass `index` of this run left it. Raises `LookupError` where that is not saved."""
        return self._restored(lambda snapshot: snapshot.index == index, f"after pass {index}")

    def last(self, stage: Stage, kind: Callable[[Pass], bool] = lambda _: True) -> Program:
        """The last saved program in `stage`, after a pass of that `kind`. Raises `LookupError` where there is none."""
        return self._restored(lambda snapshot: snapshot.stage == stage and kind(snapshot.finished), f"in stage {stage}")

    def _restored(self, wanted: Callable[[Snapshot], bool], where: str) -> Program:
        for snapshot in reversed(self.snapshots):
            if wanted(snapshot):
                return snapshot.restore()
        raise LookupError(f"no program is saved {where}")

    def note(self, **details: Any) -> Program:
        """Add JSON values to the current pass's record."""
        return replace(self, details={**self.details, **details})


class Pass(ABC):
    """One step of a recipe: a frozen pydantic dataclass whose fields are its whole configuration."""

    name: ClassVar[str]
    consumes: ClassVar[frozenset[Stage]]
    produces: ClassVar[Stage | None] = None
    """the stage it leaves the student in; None: the stage it found"""
    rewrites: ClassVar[tuple[RewriteFunction, ...]] = ()

    @abstractmethod
    def apply(self, program: Program, task: Task) -> Program:
        """Return the program with this pass done. Raises `InputError` where it cannot apply."""

    def prepare(self, teacher: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        """Teacher and task as this pass needs them, where it changes both; it is the first of its recipe then.

        Called before anything else; the teacher is not changed. Raises `InputError` where it cannot.
        """
        return teacher, task

    def why_not_applied(self, task: Task, outputs: Any) -> Reason | None:
        """Why the pass cannot be for a task whose teacher has these outputs on the example, else None."""
        return None

    def derive(self, program: Program) -> Program:
        """What this pass makes of the student without changing it. Called where its saved result is loaded."""
        return program

    def result_stage(self, stage: Stage) -> Stage:
        """The stage after this pass on a student in `stage`."""
        return stage if self.produces is None else self.produces

    # What a pass answers for itself, so that nobody asks for its class.

    row: ClassVar[str | None] = None
    """the row of the attribution table that the float student after the last such pass makes"""
    tuning: str = ""
    """a file with the configurations of kernels that this pass was given"""
    ignore: tuple[str, ...] = ()
    """shell patterns of layers that this pass never cuts"""
    protect: tuple[str, ...] = ()
    """shell patterns of blocks that this pass never removes"""

    @property
    def training_epochs(self) -> float:
        """Epochs over the training data that this pass takes; 0 where it does not train."""
        return 0.0

    @property
    def notes_losses(self) -> bool:
        """Whether what this pass notes is about its training, of which a rehearsal says nothing."""
        return False

    @property
    def rounds(self) -> int:
        """How many times this pass does what is not training."""
        return 1

    def rehearsal(self, epochs: float) -> Pass:
        """This pass with at most so many epochs of training, and once what it does in rounds."""
        return self

    def unrehearsed_seconds(self, details: Mapping[str, Any], scored: int) -> float:
        """Seconds that this pass takes beyond its rehearsal and its training, by what the rehearsal noted in `details`.

        `scored` is how many validation samples there are.
        """
        return 0.0

    def timed_form(self, floats: tuple[str, ...]) -> Pass | None:
        """This pass as it shapes the INT8 form that is timed, `floats` being further layers in float; None: not."""
        return None

    def fitted(self, task: Task, outputs: Any) -> Pass:
        """This pass of the default recipe as `task` can have it; `outputs` are the teacher's on the example."""
        return self

    def why_not_for(self, target: Target) -> Reason | None:
        """Why this pass cannot compile for `target`."""
        return None

    def why_not_cached(self) -> Reason | None:
        """Why the teacher's answers are not cached in this pass."""
        return "it asks no teacher"


def parse_plan(entries: Any, where: object) -> tuple[Rewrite, ...]:
    """The plan that a file holds as JSON. Raises `InputError`, naming it as `where`, for anything else."""
    plan = []
    for entry in entries if isinstance(entries, list) else [None]:
        function, arguments = (entry.get(k) if isinstance(entry, dict) else None for k in ("function", "arguments"))
        if not isinstance(function, str) or not isinstance(arguments, dict):
            raise InputError(f"{where} was changed or is of another version of pqk: its plan is no list of rewrites")
        plan.append(Rewrite(function, arguments))
    return tuple(plan)


def replay(
    origin_copy: nn.Module, example: Example, plan: Iterable[Rewrite], rewrites: Mapping[str, RewriteFunction]
) -> nn.Module:
    """Apply a plan to a copy of what it begins with (which is changed). Raises `KeyError` for an unknown rewrite."""
    student = origin_copy
    with torch.random.fork_rng(devices=[]):
        for step in plan:
            student = rewrites[step.function](student, example, **step.arguments)
    return student
