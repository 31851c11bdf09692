"""What a teacher is, the frozen one, and what makes its answers those of one file (`pqk.knowledge.teachers.cache`).

With a keyed augmentation the teacher sees each (sample, view) once; later epochs, the run's other trainings and, where
`PQK_CACHE` names a folder, later runs read its answers.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.core.distributed import world_size
from pqk.data.data import Batch, Data, digest_of
from pqk.data.structures import Inputs, map_tensors, widened
from pqk.errors import Reason
from pqk.knowledge.taps import tap
from pqk.knowledge.teachers.cache import LogitCache, cache_folder
from pqk.knowledge.terms.base import View
from pqk.target.machine import autocast

TeacherAnswer = tuple[Any, dict[str, Tensor]]
"""(outputs, {point: feature}) of a batch"""

PROBE = 8
"""samples whose answers are compared with those that a cache holds"""
TIMED = 64
"""live answers whose times are remembered"""


def weights_fingerprint(model: nn.Module) -> str:
    """A digest of a model's tensors and their names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def network_fingerprint(model: nn.Module) -> str:
    """A digest of a model's architecture, as far as its modules print it, and of its tensors and their names."""
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # where a function lies in memory, another process another
    return hashlib.sha256(f"{printed}{weights_fingerprint(model)}".encode()).hexdigest()


class Teacher(nn.Module, ABC):
    """What answers a training's batches: always in eval mode, never with a gradient, in float32 at least.

    A subclass computes an answer in `live`; calling the teacher gives it, or reads it from `cache`.
    """

    cache: LogitCache | None = None
    """the answers that are kept, if any"""
    no_feature_reason = "the teacher was made without that point; name it in its `points`"
    """why a feature is missing"""
    other_tokens: bool = False
    """whether its outputs are scores of other tokens than the student's"""
    student_points: Sequence[str] = ()
    """points of the student that its auxiliary loss looks at"""

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.live_seconds: deque[float] = deque(maxlen=TIMED)
        """what the last live answers took, of those to training data"""

    @property
    def module(self) -> nn.Module | None:
        """The model that answers, for terms that look into it; None: it is a black box."""
        return None

    @abstractmethod
    def live(self, batch: Batch) -> TeacherAnswer:
        """Computes the answer to a batch.

        Args:
            batch: inputs each [B, …]; `batch.for_teacher()` is what a teacher with its own view sees.

        Returns:
            (outputs, {point: feature}): tensors [B, …] in float32 at least.

        Raises:
            InputError: the teacher cannot answer it.
        """

    def identity(self) -> str:
        """Identifies everything that the answers depend on; only asked for where they can be kept."""
        raise NotImplementedError

    def why_not_cached(self) -> Reason | None:
        """Why the answers cannot be kept for the next epoch, else None."""
        return None

    def check(self, example: Inputs) -> None:
        """Checks that it can answer inputs like these, each [B, …].

        Raises:
            InputError: it cannot.
        """

    def begin(self, progress: float) -> None:
        """Called before each training step with the share of the training that is done, 0 to 1."""

    def auxiliary_loss(self, view: View) -> Tensor | None:
        """The loss [B] of what it learns itself, which is added to the student's; None: nothing."""
        return None

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherAnswer:
        """Answers a batch: with what `live` computes, or where all of it is kept, with that.

        Returns:
            (outputs, {point: feature}), without a gradient.

        Raises:
            InputError: it cannot answer it.
        """
        # Whatever precision the student trains in: an answer is the same when it is kept.
        with torch.autocast(batch.inputs[0].device.type, enabled=False):
            if self.cache is None or batch.keys is None:
                began = time.perf_counter()
                answer = self.live(batch)
                if batch.keys is not None:
                    self.live_seconds.append(time.perf_counter() - began)
                return answer
            rows, present = self.cache.get(batch.keys)
            device, name = batch.inputs[0].device, self.cache.output
            if bool(present.all()):
                return (rows.to(device) if name is None else {name: rows.to(device)}), {}
            live, _ = self.live(batch)
            live = live if name is None else live[name]
            self.cache.put(batch.keys[~present.to(batch.keys.device)], live[~present.to(device)])
            whole = torch.where(present.view(-1, *[1] * (live.dim() - 1)).to(device), rows.to(device), live)
            return (whole if name is None else {name: whole}), {}


def run_tapped(tapped: nn.Module, batch: Batch, precision: str = "fp32") -> TeacherAnswer:
    """Runs a tapped model on a batch; "bf16" computes in bfloat16 autocast, and the answer is float32 at least."""
    with autocast(batch.inputs[0].device.type, precision):
        outputs, features = tapped(*batch.inputs)
    return map_tensors(lambda t: widened(t) if t.is_floating_point() else t, outputs), features


class FrozenTeacher(Teacher):
    """A module in eval mode, without gradients, its buffers never touched.

    Args:
        model: the trained module; it is read only.
        points: module paths whose outputs it shows as features.
        precision: "fp32", or "bf16", which computes convolutions and matmuls in bfloat16 autocast (about twice as fast
            where the CPU has the instructions); outputs are float32 either way.
        cache: where its outputs are kept; not used where there are points.
        students_view: where the two see different views, it sees that of the student, which it once was.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[str] = (),
        precision: str = "fp32",
        cache: LogitCache | None = None,
        students_view: bool = False,
    ) -> None:
        super().__init__()
        # Hidden from `parameters()` and `state_dict()`: the teacher is read only and is not part of any checkpoint.
        self._model = [tap(model.eval(), points)]
        self.precision, self.cache, self.students_view = precision, None if points else cache, students_view

    @property
    def module(self) -> nn.Module | None:
        return getattr(self._model[0], "model", None)

    def train(self, mode: bool = True) -> FrozenTeacher:
        self._model[0].eval()
        super().train(False)
        return self

    def identity(self) -> str:
        model = self.module or self._model[0]  # its text, too: other layers can have the same tensors
        return repr((weights_fingerprint(model), str(model), self.precision, self.students_view))

    def live(self, batch: Batch) -> TeacherAnswer:
        device = batch.inputs[0].device
        if any(t.device != device for t in self._model[0].parameters()):
            self._model = [copy_of(self._model[0]).to(device)]  # the program's teacher stays where it is
        return run_tapped(self._model[0], batch if self.students_view else batch.for_teacher(), self.precision)


class ChangingTeacher(Teacher):
    """A teacher whose weights change in every step: its answers are never kept, and it is part of the checkpoint.

    A subclass keeps its model as an attribute, gives it as `module`, and calls `tap_module` when it is there.
    """

    uncacheable: ClassVar[str]
    """why its answers are not kept"""

    def __init__(self, points: Sequence[str], precision: str) -> None:
        super().__init__()
        self.points, self.precision = points, precision
        self._tapped: list[nn.Module] = []

    def tap_module(self) -> None:
        """Shows the features of `module` at the points."""
        assert self.module is not None
        self._tapped = [tap(self.module, self.points)]  # in a list: no part of the teacher's own modules

    def why_not_cached(self) -> Reason | None:
        return self.uncacheable

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ChangingTeacher:
        super()._apply(fn, recurse)
        self.tap_module()  # a tapped graph holds buffers of its own
        return self

    def live(self, batch: Batch) -> TeacherAnswer:
        return run_tapped(self._tapped[0], batch, self.precision)


def cache_for(
    folder: Path | None,
    teacher: nn.Module,
    data: Data,
    precision: str,
    output: str | None = None,
    free: bool = False,
) -> LogitCache | str:
    """The cache of this teacher on this data, shared by all passes of a run, or the reason why there is none.

    `output` is the one that is asked for of a teacher with several outputs: it alone is kept, and answered. `free`:
    inputs have other free axes than the batch, such as the lengths of texts.
    With the environment variable `PQK_CACHE` it is in the folder named there, shared by all runs. `teacher`: a
    `Teacher`, or the model of a frozen one. Raises `InputError` where the file holds other answers than it gives.
    """
    teacher = teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher, precision=precision)
    place = cache_folder(folder)
    if (reason := teacher.why_not_cached()) is not None:
        return reason
    if place is None:
        return "nothing is saved in this run"
    if data.key_count is None:
        return data.unkeyed_reason
    if world_size() > 1:
        return "several processes would write one file"
    batch, outputs = _probe(teacher, data)
    name = output if isinstance(outputs, dict) and output in outputs else None
    outputs = outputs if name is None else outputs[name]
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        return f"the teacher's output is a {kind}; only single tensors are cached: let all terms name one as `output`"
    if free and outputs.dim() > 2:
        return "its answers are as long as the texts of their batch, and those that are kept have one size"
    if outputs.dtype != torch.float32:
        return f"the teacher answers in {outputs.dtype}, and answers are kept in float32"
    inputs = digest_of("seen", (*batch.inputs, *(batch.teacher_inputs or ())))  # `prepare` shows in nothing else
    key = f"{teacher.identity()} {data.fingerprint()} {precision} {inputs}" + (f" {name}" if name else "")
    key = hashlib.sha256(key.encode()).hexdigest()
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{key}.npy"
    size, room = 4 * data.key_count * (outputs[0].numel() + 2), shutil.disk_usage(place).free
    if not path.exists() and size > room / 2:
        return f"the answers would take {size / 1e9:.1f} GB and {place} has {room / 1e9:.1f} GB free"
    cache = LogitCache(path, data.key_count, outputs.shape[1:], name)
    if batch.keys is not None:
        cache.confirm(batch.keys, outputs, precision)
    return cache


@torch.no_grad()
def _probe(teacher: Teacher, data: Data) -> tuple[Batch, Any]:
    """A few training samples in their first view, with their labels, and the teacher's outputs on them."""
    with torch.random.fork_rng(devices=[]):
        batch = next(data.batches(0))
    few = map_tensors(lambda t: t[:PROBE], batch)
    return few, teacher.live(few)[0]
