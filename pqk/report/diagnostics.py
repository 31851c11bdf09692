"""The report's part on distillation: whether it worked. `pqk.evaluation.diagnostics` fills it in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pqk.report.base import Count, Part, Positive, Share

ControlVariant = Literal["student_no_kd", "student_label_smoothing", "student_random_teacher", "student_from_scratch"]


class Interval(Part):
    """A number and its 95 % interval over samples."""

    mean: float
    low: float
    high: float


class Calibration(Part):
    """How far probabilities can be believed. The temperature was found on other samples than it is judged on."""

    accuracy: Share
    ece: Share
    """expected calibration error"""
    nll: Annotated[float, Field(ge=0)]
    temperature: Positive | None = None
    """dividing the logits (or the last layer's weights and biases) by this makes the NLL of validation data least"""
    ece_after: Share | None = None
    nll_after: Annotated[float, Field(ge=0)] | None = None
    reason: str | None = None
    """why there is no temperature"""


class TeacherHealth(Part):
    """What there is to learn from a teacher's soft targets, at temperature 1."""

    top: Share
    """mean probability of its decision"""
    entropy: Share
    """mean entropy, over that of a guess"""
    calibration: Calibration | None
    """null: there are no labels"""
    warning: str | None


class Fidelity(Part):
    """How much the student answers as the teacher does."""

    agreement: Share
    kl: Annotated[float, Field(ge=0)]
    """mean KL(teacher ‖ student) at temperature 1, in nats"""
    lost: Share | None
    """share of all samples that only the teacher has right; null: there are no labels"""
    won: Share | None
    """share of all samples that only the student has right"""
    agreement_per_class: tuple[Share | None, ...]
    """by the label (without labels by the teacher's decision); null: the class does not occur"""


class ClassAccuracy(Part):
    """How often samples of one class are decided right."""

    label: Count
    samples: Annotated[int, Field(gt=0)]
    """evaluation samples of this class"""
    teacher: Share
    student: Share
    difference: Interval
    """the student's accuracy less the teacher's, on the same samples"""


class NegativeTransfer(Part):
    """How often the student gives the teacher's wrong label where the teacher is wrong."""

    samples: Count
    """on which the teacher is wrong"""
    copied: Share | None
    """share of them on which the student says the same; null: there are none"""
    control: Share | None
    """the same share of a student that was trained without the teacher"""
    control_reason: str | None = None
    """why `control` is null"""
    warning: str | None = None


class CorruptionRow(Part):
    """Accuracy under one corruption. A drop is relative to the same network's accuracy on the same samples, clean."""

    corruption: str
    what: str
    """what it does to a sample"""
    teacher: Share
    student: Share
    teacher_drop: Interval | None
    """null: it has no sample right even without the corruption"""
    student_drop: Interval | None
    excess: Interval | None
    """the student's drop less the teacher's"""


class Robustness(Part):
    """Teacher and student, both as deployed, on corrupted evaluation samples."""

    samples: Count
    teacher: Share
    """its accuracy on them without corruption"""
    student: Share
    rows: tuple[CorruptionRow, ...]
    left_out: dict[str, str] = Field(default_factory=dict)
    """corruptions that do not apply to the task's inputs, and why"""


class ControlRow(Part):
    """The student beside one that was trained again without what the teacher knows."""

    variant: ControlVariant
    accuracy: Share
    difference: Interval
    """the student's accuracy less the control's, on the same samples"""
    warning: str | None
    """where the student is worse"""


class CapacityGap(Part):
    """What distillation gained from a teacher of this size: one point of the curve, each compile gives one."""

    gain: Interval
    """the student's accuracy less that of the same student trained without the teacher"""
    teacher_parameters: Count
    student_parameters: Count


class BreakEven(Part):
    """After how many queries the faster student has paid for the time of the passes."""

    queries: Count
    compile_seconds: Annotated[float, Field(ge=0)]
    saved_ms: Positive
    """of a query: batch 1, both in ONNX Runtime"""


class TokenAnswers(Part):
    """What a network says of the next tokens of evaluation texts."""

    accuracy: Share
    """share of tokens that it finds most likely"""
    nats: Annotated[float, Field(ge=0)]
    """mean of -log p of a token"""
    top: Share
    """mean probability of the token that it finds most likely"""
    ece: Share
    """expected calibration error of those probabilities"""


class TokenDiagnostics(Part):
    """Whether distillation worked, of networks that continue texts: next tokens that have a label, teacher forced.

    Intervals take tokens for independent, so those of few long texts are too narrow.
    """

    tokens: Annotated[int, Field(gt=0)]
    teacher: TokenAnswers
    student: TokenAnswers
    agreement: Share
    """share of tokens of which both find the same most likely"""
    lost: Share
    """share of all tokens that only the teacher has right"""
    won: Share
    """share of all tokens that only the student has right"""
    negative_transfer: NegativeTransfer
    """in tokens"""
    controls: tuple[ControlRow, ...] = ()


class Diagnostics(Part):
    """Whether distillation worked. A part that is null has its reason in `reasons`, by field name."""

    samples: Count = 0
    """evaluation samples that logits were compared on"""
    teacher: TeacherHealth | None = None
    fidelity: Fidelity | None = None
    accuracy_by_class: tuple[ClassAccuracy, ...] = ()
    """by the label; classes that do not occur are left out"""
    calibration: Calibration | None = None
    """of the student; the teacher's is in `teacher`"""
    negative_transfer: NegativeTransfer | None = None
    robustness: Robustness | None = None
    controls: tuple[ControlRow, ...] = ()
    capacity_gap: CapacityGap | None = None
    tokens: TokenDiagnostics | None = None
    """of networks that continue texts, in the place of all parts above"""
    break_even: BreakEven | None = None
    reasons: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
