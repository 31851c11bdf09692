"""Where a training's teacher comes from: `teacher = { source = "ema", momentum = 0.99 }`. Listed in `SOURCES`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from pqk.copies import copy_of
from pqk.data.data import Batch
from pqk.data.structures import Inputs
from pqk.documents import digest_of_file
from pqk.errors import InputError, Reason
from pqk.files import read_sealed
from pqk.knowledge.taps import tap
from pqk.knowledge.teachers.base import FrozenTeacher, Teacher
from pqk.knowledge.teachers.black_box import OnnxTeacher
from pqk.knowledge.teachers.context import ContextTeacher
from pqk.knowledge.teachers.ensemble import AxisOf, EMATeacher, EnsembleTeacher, UncertaintyTeacher, last_axis
from pqk.knowledge.teachers.online import ExitsTeacher, PeerTeacher, ShadowTeacher, exit_for
from pqk.knowledge.teachers.retokenizing import Alignment, RetokenizingTeacher
from pqk.settings import settings


@dataclass(frozen=True)
class TeacherContext:
    """What a teacher can be made of, when a training begins."""

    teacher: nn.Module
    """the recipe's"""
    student: nn.Module
    """the one that trains"""
    points: Sequence[str]
    """module paths of the teacher whose outputs the terms compare"""
    precision: str
    """"fp32", or "bf16" for bfloat16 autocast"""
    example: Inputs
    """the task's example inputs"""
    earlier: Callable[[int], nn.Module] | None = None
    """the student that an earlier pass of the run left, by its number; None: there is no run"""
    class_axis: AxisOf = last_axis
    """an output -> the axis of it that classes are on"""
    language_model: Callable[[str], tuple[nn.Module, Any]] | None = None
    """a Hugging Face directory -> its causal model, and its tokenizer; None: none can be read here"""


@settings
class Source(ABC):
    """Where a training's teacher comes from."""

    like_student: ClassVar[bool] = False
    """whether its layers have the student's channels, whatever was cut"""

    def why_not_cached(self) -> Reason | None:
        """Why its answers cannot be kept for the next epoch, whatever the data is, else None."""
        return None

    @abstractmethod
    def make(self, context: TeacherContext) -> Teacher:
        """Makes the teacher.

        Args:
            context: what it can be made of.

        Returns:
            The teacher.

        Raises:
            InputError: there is none.
        """


@settings
class FromModule(Source):
    """The teacher of the recipe, frozen."""

    source: Literal["module"] = "module"

    def make(self, context: TeacherContext) -> Teacher:
        return FrozenTeacher(context.teacher, context.points, context.precision)


@settings
class FromEMA(Source):
    """The moving average of the student that trains (mean teacher: Tarvainen & Valpola, NeurIPS 2017)."""

    source: Literal["ema"] = "ema"
    momentum: float = Field(default=0.999, ge=0, lt=1)
    """share of the average that stays in a step"""
    warmup: bool = True
    """let the momentum grow from 0, at most 1 - 1/(k + 1) in step k"""
    like_student: ClassVar[bool] = True

    def why_not_cached(self) -> Reason | None:
        return EMATeacher.uncacheable

    def make(self, context: TeacherContext) -> Teacher:
        return EMATeacher(
            context.student, context.points, momentum=self.momentum, warmup=self.warmup, precision=context.precision
        )


@settings
class FromSnapshot(Source):
    """A frozen copy of the student as it is when this training begins."""

    source: Literal["snapshot"] = "snapshot"
    restart: bool = False
    """begin again from fresh weights: the next generation of a born-again network (Furlanello et al., ICML 2018,
    arXiv:1805.04770)"""
    like_student: ClassVar[bool] = True

    def make(self, context: TeacherContext) -> Teacher:
        frozen = copy_of(context.student, "student").requires_grad_(False)
        if self.restart:
            restart(context.student)
        return FrozenTeacher(frozen, context.points, context.precision, students_view=True)


@settings
class FromRandom(Source):
    """The recipe's teacher with fresh weights, a control: what gains by it does not gain by what a teacher knows."""

    source: Literal["random"] = "random"

    def make(self, context: TeacherContext) -> Teacher:
        untrained = copy_of(context.teacher)
        restart(untrained, "teacher")
        return FrozenTeacher(untrained.requires_grad_(False), context.points, context.precision)


@settings
class FromOnnx(Source):
    """An ONNX file with the task's inputs: a black box that shows its outputs only."""

    source: Literal["onnx"] = "onnx"
    path: str = Field(min_length=1)
    """the file, from the folder in which pqk runs"""

    def make(self, context: TeacherContext) -> Teacher:
        return OnnxTeacher(self.path, context.example)


@settings
class FromArtifact(Source):
    """The student of an earlier compile, a black box: an assistant, or the model from before there was new data."""

    source: Literal["artifact"] = "artifact"
    path: str = Field(min_length=1)
    """the artifact's directory, from the folder in which pqk runs"""

    def make(self, context: TeacherContext) -> Teacher:
        return OnnxTeacher(artifact_model(Path(self.path)), context.example)


@settings
class FromAssistant(Source):
    """The student as an earlier pass of this recipe left it, frozen.

    It is of middle size, between a large teacher and a small student (Mirzadeh et al., AAAI 2020, arXiv:1902.03393). A
    recipe prunes, distills, prunes on, distills from it.
    """

    source: Literal["assistant"] = "assistant"
    after: int = Field(ge=0)
    """the number of the pass that left it, from 0; it must still be a module there"""
    like_student: ClassVar[bool] = True

    def make(self, context: TeacherContext) -> Teacher:
        if context.earlier is None:
            raise InputError("distill: an assistant is the student of an earlier pass, and there is no run here")
        return FrozenTeacher(context.earlier(self.after).requires_grad_(False), context.points, context.precision)


@settings
class FromPeer(Source):
    """A second student that learns beside the first, each from the other.

    Deep mutual learning: Zhang et al., CVPR 2018, arXiv:1706.00384.

    Raises:
        InputError: neither noise nor restart tells the peer from the student.
    """

    source: Literal["peer"] = "peer"
    seed: int = Field(default=1, ge=0)
    """what tells the peer from the student; several peers of an ensemble need several"""
    noise: float = Field(default=0.1, ge=0)
    """the peer begins as the student, its weights moved by Gaussian noise of this share of their spread"""
    restart: bool = False
    """begin from fresh weights instead"""
    kd_weight: float = Field(default=1.0, ge=0)
    """weight of what the peer learns from the student, beside the task's loss"""
    temperature: float = Field(default=1.0, gt=0)
    """of that"""
    like_student: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.noise == 0 and not self.restart:
            raise InputError("noise = 0 without restart: the peer would be the student's twin and teach it nothing")

    def why_not_cached(self) -> Reason | None:
        return PeerTeacher.uncacheable

    def make(self, context: TeacherContext) -> Teacher:
        peer = copy_of(context.student, "student")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            if self.restart:
                restart(peer, "peer")
            else:
                for p in peer.parameters():
                    if p.dim() >= 2:
                        p.add_(self.noise * p.std() * torch.randn_like(p))
        options = {"kd_weight": self.kd_weight, "temperature": self.temperature, "precision": context.precision}
        return PeerTeacher(peer, context.points, **options)  # type: ignore[arg-type]


@settings
class FromOtherTokenizer(Source):
    """A causal model with another tokenizer, which reads the same texts.

    Its answers count where tokens of both end in the same place. For `sorted_uld` (Boizard et al., arXiv:2402.12030,
    which aligns the n-th tokens: `align = "index"`), and for `dual_space` (Zhang et al., DSKD, arXiv:2406.17328, with
    this alignment in the place of its attention between the two).
    """

    source: Literal["other_tokenizer"] = "other_tokenizer"
    directory: str = Field(min_length=1)
    """the teacher's Hugging Face directory: model and tokenizer"""
    tokenizer: str = Field(min_length=1)
    """the Hugging Face directory with the student's tokenizer"""
    align: Alignment = "text"
    """where an answer is put: at the token that ends in the same place of the text, or at that of the same number"""

    def why_not_cached(self) -> Reason | None:
        return "the teacher has another tokenizer, and its answers are as long as the texts"

    def make(self, context: TeacherContext) -> Teacher:
        if context.language_model is None:
            raise InputError("distill: a teacher with another tokenizer is read from a directory, and none can be here")
        model, tokenizer = context.language_model(self.directory)
        _, students = context.language_model(self.tokenizer)
        model.requires_grad_(False)
        return RetokenizingTeacher(model, tokenizer, students, context.points, context.precision, self.align)


AnyMember = Annotated[
    FromModule | FromEMA | FromSnapshot | FromOnnx | FromArtifact | FromAssistant | FromPeer,
    Field(discriminator="source"),
]


@settings
class FromContext(Source):
    """Another teacher that reads a text before each prompt, such as demonstrations, which the student is to do without.

    Snell, Klein & Zhong, "Learning by Distilling Context", arXiv:2209.15189. Taught by itself as it was, over answers
    of its own (`answers = { by = "student" }`, `reverse_kl`), a model learns what demonstrations show and keeps near to
    what it was (Shenfeld et al., SDFT, arXiv:2601.19897, who show a demonstration of its own to each prompt, and not
    one text to all).
    """

    source: Literal["context"] = "context"
    text: str = Field(min_length=1)
    """what the teacher reads first"""
    tokenizer: str = Field(min_length=1)
    """the Hugging Face directory with the tokenizer of the texts"""
    teacher: AnyMember = FromSnapshot()
    """who reads it, and answers the terms"""

    def why_not_cached(self) -> Reason | None:
        return "the teacher reads a context, and its answers are as long as the texts"

    def make(self, context: TeacherContext) -> Teacher:
        if context.language_model is None:
            raise InputError("distill: the context's tokenizer is read from a directory, and none can be here")
        _, tokenizer = context.language_model(self.tokenizer)
        tokens = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(self.text)["input_ids"]  # special tokens behind the text are no part of what begins one
        begins = next((i for i in range(len(whole)) if whole[i : i + len(tokens)] == tokens), 0)
        return ContextTeacher(self.teacher.make(context), torch.tensor(tokens, dtype=torch.int64), begins)


@settings
class FromExits(Source):
    """Another teacher, and small classifiers at the student's shallower points that its own output teaches.

    Be your own teacher: Zhang et al., ICCV 2019, arXiv:1905.08094. What the exits learn reaches the layers below; they
    themselves are left behind.
    """

    source: Literal["exits"] = "exits"
    points: tuple[str, ...] = Field(min_length=1)
    """module paths of the student whose outputs get an exit"""
    teacher: AnyMember = FromModule()
    """who else teaches, and answers the terms"""
    ce_weight: float = Field(default=0.3, ge=0)
    """weight of the task's loss at each exit"""
    kd_weight: float = Field(default=0.7, ge=0)
    """weight of what the student's output teaches each exit"""
    temperature: float = Field(default=3.0, gt=0)
    """of that"""

    def why_not_cached(self) -> Reason | None:
        return self.teacher.why_not_cached()

    def make(self, context: TeacherContext) -> Teacher:
        with torch.no_grad():
            outputs, features = tap(context.student.eval(), self.points)(*context.example)
        exits = {point: exit_for(features[point], outputs, f'the exit at "{point}"') for point in self.points}
        weights = {"ce_weight": self.ce_weight, "kd_weight": self.kd_weight, "temperature": self.temperature}
        return ExitsTeacher(self.teacher.make(context), exits, **weights)


@settings
class FromShadow(Source):
    """A second head on the recipe's teacher, which teaches in its place and learns from teacher and student.

    SHAKE: Li & Jin, NeurIPS 2022.
    """

    source: Literal["shadow"] = "shadow"
    point: str = Field(min_length=1)
    """the teacher's module whose output the head reads: the last before its own head"""
    student_weight: float = Field(default=1.0, ge=0)
    """weight of what the student teaches the head, beside what the teacher does"""
    temperature: float = Field(default=4.0, gt=0)
    """of both"""

    def why_not_cached(self) -> Reason | None:
        return ShadowTeacher.uncacheable

    def make(self, context: TeacherContext) -> Teacher:
        inner = FrozenTeacher(context.teacher, sorted({*context.points, self.point}), context.precision)
        outputs, features = inner(Batch(context.example, None, None))
        head = exit_for(features[self.point], outputs, f'the shadow head at "{self.point}"')
        return ShadowTeacher(inner, self.point, head, student_weight=self.student_weight, temperature=self.temperature)


@settings
class FromEnsemble(Source):
    """The weighted mean of several teachers.

    Raises:
        InputError: the weights are not one for each member, negative, or all 0.
    """

    source: Literal["ensemble"] = "ensemble"
    members: tuple[AnyMember, ...] = Field(min_length=1)
    """the teachers: tables with `source`"""
    weights: tuple[float, ...] | None = None
    """one for each member; none: alike"""
    of: Literal["probabilities", "logits"] = "probabilities"
    """what the mean is taken of"""
    by: Literal["confidence", "surest", "label_confidence", "best_on_label"] | None = None
    """what weights the members sample by sample: their top probabilities, the most confident alone, their losses on the
    labels (CA-MKD), the one with the least of these alone"""
    uncertainty: bool = False
    """also say how far the members disagree, which the gate "teacher_agreement" needs"""

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is not None and (len(weights) != len(self.members) or min(weights) < 0 or sum(weights) <= 0):
            raise InputError(
                f"weights: {list(weights)} for {len(self.members)} members; give one each, at least 0 and not all 0"
            )

    def why_not_cached(self) -> Reason | None:
        if self.uncertainty:
            return "how far the members disagree is not kept with their answers"
        return next((reason for m in self.members if (reason := m.why_not_cached()) is not None), None)

    def make(self, context: TeacherContext) -> Teacher:
        kind = UncertaintyTeacher if self.uncertainty else EnsembleTeacher
        members = [m.make(context) for m in self.members]
        return kind(members, self.weights, of=self.of, by=self.by, class_axis=context.class_axis)


SOURCES = (
    FromModule, FromEMA, FromSnapshot, FromRandom, FromOnnx, FromArtifact, FromAssistant, FromPeer, FromExits,
    FromShadow, FromEnsemble, FromOtherTokenizer, FromContext,
)  # fmt: skip
AnySource = Annotated[
    FromModule | FromEMA | FromSnapshot | FromRandom | FromOnnx | FromArtifact | FromAssistant | FromPeer | FromExits
    | FromShadow | FromEnsemble | FromOtherTokenizer | FromContext,
    Field(discriminator="source"),
]  # fmt: skip


def artifact_model(folder: Path) -> Path:
    """The `model.onnx` of an artifact. Raises `InputError` where there is none, or it is not the manifest's."""
    manifest, model = folder / "manifest.json", folder / "model.onnx"
    if not manifest.is_file() or not model.is_file():
        raise InputError(f"distill: the teacher {folder} is no finished artifact with a model.onnx")
    files = read_sealed(manifest, ("files",), unsealed=True)["files"]
    entry = files.get(model.name) if isinstance(files, dict) else None
    if not isinstance(entry, dict) or digest_of_file(model) != entry.get("sha256"):
        raise InputError(
            f"distill: the teacher {model} was changed after its compile: its sha256 is not the manifest's"
        )
    return model


def restart(model: nn.Module, whose: str = "student") -> None:
    """Draw all weights anew, each layer as it does it itself. Raises `InputError` for layers that cannot."""
    for path, module in model.named_modules():
        # Buffers that are not saved are part of how a module is built: they have nothing to forget.
        saved = set(module._buffers) - module._non_persistent_buffers_set
        own = [*module.parameters(recurse=False), *(b for b in map(module._buffers.get, saved) if b is not None)]
        if own and not callable(getattr(module, "reset_parameters", None)):
            raise InputError(
                f'distill: the {whose} cannot begin again: "{path}" ({type(module).__name__}) has tensors and no '
                "reset_parameters; restart a plain module, before it is captured"
            )
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
