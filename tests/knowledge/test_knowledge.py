"""Knowledge terms against known answers, and the laws that beat values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.errors import InputError
from pqk.files import read_tensors
from pqk.knowledge import AttentionTransfer, CrossEntropy, Hint, KLDivergence, LogitMSE, Term, View
from pqk.knowledge.objective import Distillation
from pqk.knowledge.taps import tap
from pqk.knowledge.teachers.base import FrozenTeacher, weights_fingerprint
from pqk.passes.capture.capture import capture
from pqk.target import machine
from pqk.task.task import Task
from pqk.training.trainer import Training, fit

I, J = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)  # noqa: E741
ZS, ZT, Y = 2 * (1.3 * I + 0.7 * J + 0.2).sin(), 4 * (0.9 * I - 0.5 * J + 0.1).cos(), torch.tensor([0, 3, 1, 4])


def grid(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axes = [torch.arange(float(n), dtype=torch.float64) for n in (4, channels, 2, 2)]
    return torch.meshgrid(*axes, indexing="ij")  # type: ignore[return-value]


def features() -> tuple[Tensor, Tensor]:
    i, c, h, w = grid(3)
    student = (i + 0.5 * c + 0.3 * h - 0.2 * w).sin()
    i, c, h, w = grid(5)
    return student, (0.7 * i - 0.4 * c + 0.6 * h + 0.1 * w).cos()


def images(count: int = 8, **options: Any) -> ArrayData:
    g = torch.Generator().manual_seed(0)
    return ArrayData(torch.randn(count, 3, 6, 6, generator=g), torch.arange(count) % 5, 4, **options)


def task() -> Task:
    return Task(images(), images(), validation=images(), class_axis=-1)


def view(s: Any = ZS, t: Any = ZT, fs: Tensor | None = None, ft: Tensor | None = None) -> View:
    return View(s, t, Y, {} if fs is None else {"p": fs}, {} if ft is None else {"p": ft}, task())


RESPONSE: list[tuple[Term, float]] = [
    (CrossEntropy(), 2.0799009600),
    (KLDivergence(temperature=1), 0.8765541106),
    (KLDivergence(temperature=2), 1.3390494014),
    (KLDivergence(temperature=4), 1.6938652111),
    (LogitMSE(), 8.2232110177),
]


@pytest.mark.parametrize(("term", "value"), RESPONSE)
def test_response_terms_have_known_answers(term: Term, value: float) -> None:
    """Specification, section 7, in float64."""
    losses = term(view(), None)
    assert losses.shape == (4,) and losses.dtype == torch.float64
    assert float(losses.mean()) == pytest.approx(value, abs=1e-8)


def test_attention_transfer_has_a_known_answer() -> None:
    losses = AttentionTransfer(point="p")(view(None, None, *features()), None)
    assert losses.shape == (4,) and float(losses.mean()) == pytest.approx(0.0104371717, abs=1e-8)


class Fixed(nn.Module):
    """A model that says what it is told to."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> Any:
        return self.outputs


def test_the_weighted_sum_has_a_known_answer() -> None:
    terms = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9, temperature=4))
    student = Fixed(ZS)
    objective = Distillation(terms, task(), student, FrozenTeacher(Fixed(ZT)))
    losses = objective(objective.wrap(student), Batch((torch.zeros(4, 3, 6, 6),), Y, None))
    assert losses.shape == (4,) and float(losses.mean()) == pytest.approx(1.7324687859, abs=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_gradient_of_kd(temperature: float) -> None:
    """T (p_s - p_t) / B: the most common bug is another divisor."""
    z = ZS.clone().requires_grad_()
    KLDivergence(temperature=temperature)(view(z), None).mean().backward()
    expected = temperature * ((ZS / temperature).softmax(1) - (ZT / temperature).softmax(1)) / len(ZS)
    torch.testing.assert_close(z.grad, expected, atol=1e-12, rtol=0)


def test_centred_logit_mse_is_the_limit_of_kd() -> None:
    """2 C KD(T) tends to the centred form (Kim et al. 2021)."""
    kd = KLDivergence(temperature=1e4)(view(), None)
    torch.testing.assert_close(kd * 2, LogitMSE(centred=True)(view(), None), rtol=1e-3, atol=1e-6)


FS, FT = features()
TERMS: list[tuple[Term, Any, Any]] = [
    (KLDivergence(), ZS, None),
    (LogitMSE(), ZS, None),
    (LogitMSE(centred=True), ZS, None),
    (Hint(point="p", projector_kind="identity"), ZS, FS),
    (AttentionTransfer(point="p"), ZS, FS),
]


@pytest.mark.parametrize(("term", "z", "f"), TERMS, ids=lambda v: type(v).__name__)
def test_terms_are_zero_at_equality_and_give_the_teacher_no_gradient(term: Term, z: Tensor, f: Tensor | None) -> None:
    assert float(term(view(z, z.clone(), f, f), None).abs().max()) < 1e-15
    student, teacher = z.clone().requires_grad_(), (z + 1).sin().requires_grad_()
    fs = None if f is None else f.clone().requires_grad_()
    ft = None if f is None else (f * 2).cos().requires_grad_()
    loss = term(view(student, teacher, fs, ft), None)
    loss.mean().backward()
    assert loss.shape == (4,)
    assert teacher.grad is None and (ft is None or ft.grad is None)
    moved = student.grad if f is None else fs.grad  # type: ignore[union-attr]
    assert moved is not None and float(moved.abs().sum()) > 0


@pytest.mark.parametrize(("term", "z", "f"), [(CrossEntropy(), ZS, None), *TERMS], ids=lambda v: type(v).__name__)
def test_half_precision_is_computed_in_float32(term: Term, z: Tensor, f: Tensor | None) -> None:
    half = [None if t is None else t.bfloat16() for t in (z, ZT, f, f)]
    assert term(view(*half), None).dtype == torch.float32


def test_other_axes_and_outputs_are_averaged_per_sample() -> None:
    tokens = torch.stack([ZS, ZT], 1)
    both = KLDivergence()(view((tokens, ZS), (tokens.flip(1), ZT)), None)
    first = KLDivergence()(view(ZS), None)
    second = KLDivergence()(view(ZT, ZS), None)
    torch.testing.assert_close(both, ((first + second) / 2 + first) / 2)


def test_outputs_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match=r"output is \(4, 5\) and the teacher's \(4, 4\)"):
        KLDivergence()(view(ZS, ZT[:, :4]), None)
    with pytest.raises(InputError, match="has 2 outputs and the teacher 1"):
        KLDivergence()(view((ZS, ZS), ZT), None)
    unlabelled = View(ZS, ZT, None, {}, {}, task())
    with pytest.raises(InputError, match="needs labels"):
        CrossEntropy()(unlabelled, None)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": -1}, {"weight": -1}, {"temperature": float("nan")}]
)
def test_impossible_fields_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InputError):
        KLDivergence(**fields)


# ---- hints


class Net(nn.Module):
    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def objective(student: nn.Module, teacher: nn.Module, *terms: Term, kept: Sequence[int] | None = None) -> Distillation:
    points = sorted({p[1] for t in terms if (p := t.points())})
    return Distillation(terms, task(), student, FrozenTeacher(teacher, points), kept=lambda point: kept)


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "mlp"])
def test_a_projector_trains_and_is_no_part_of_the_student(kind: Any) -> None:
    student, teacher = Net(4), Net(6, seed=1)
    distillation = objective(student, teacher, Hint(point="body", projector_kind=kind))
    before = {k: v.clone() for k, v in distillation.state_dict().items()}
    keys, first = student.state_dict().keys(), student.body[0].weight.detach().clone()  # type: ignore[union-attr]
    log = fit(RunContext(), student, images(), distillation, Training(epochs=30, learning_rate=0.05))
    assert before and all(not torch.equal(v, before[k]) for k, v in distillation.state_dict().items())
    assert student.state_dict().keys() == keys and not torch.equal(student.body[0].weight, first)  # type: ignore[union-attr]
    assert log.losses[-1] < 0.5 * log.losses[0]
    assert not student.body._forward_hooks and not teacher.body._forward_hooks


def test_a_slice_compares_the_surviving_channels() -> None:
    student, teacher = Net(3), Net(6, seed=1)
    kept = [5, 0, 2]
    distillation = objective(student, teacher, Hint(point="body", projector_kind="slice"), kept=kept)
    batch = next(images().batches())
    losses = distillation(distillation.wrap(student.eval()), batch)
    want = (student.body(*batch.inputs) - teacher.body(*batch.inputs)[:, kept]).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, want)
    assert not [*distillation.parameters()]


@pytest.mark.parametrize(
    ("hint", "kept", "message"),
    [
        (Hint(point="body", projector_kind="identity"), None, r"shapes differ \(student \(2, 4, 6, 6\).*use slice"),
        (Hint(point="body"), None, "not known which teacher channels the student has"),
        (Hint(point="body"), [1, 2], "not known which teacher channels the student has"),
        (Hint(point="head", projector_kind="conv1x1"), None, "conv1x1 maps images"),
        (Hint(point="boddy", teacher_point="body"), None, r'no module "boddy".*"body"'),
        (Hint(point="body", teacher_point="haed"), None, r'no module "haed".*"head"'),
    ],
)
def test_hints_that_do_not_fit_are_refused_before_training(hint: Hint, kept: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(Net(4), Net(6), hint, kept=kept)


def test_features_of_other_resolution_are_refused_and_not_broadcast() -> None:
    small = FS.mean((2, 3), keepdim=True)
    with pytest.raises(InputError, match="points of one shape"):
        Hint(point="p", projector_kind="identity")(view(None, None, small, FS), None)
    with pytest.raises(InputError, match="points of one resolution"):
        AttentionTransfer(point="p")(view(None, None, small, FS), None)


def test_a_captured_student_shows_the_same_features() -> None:
    """Batch norm is folded and the modules are gone; their outputs are not."""
    model, (x,) = Net().eval(), images().inputs
    with torch.no_grad():
        model.body[1].running_mean.normal_()  # type: ignore[union-attr]
    outputs, seen = tap(model, ["body", "body.0", "head"])(x)
    graph = capture(Net(), (x[:2],))
    graph = capture(model, (x[:2],))
    captured, found = tap(graph, ["body", "head"])(x)
    torch.testing.assert_close(captured, outputs)
    assert seen.keys() == {"body", "body.0", "head"} and found.keys() == {"body", "head"}
    for path, feature in found.items():
        torch.testing.assert_close(feature, seen[path], rtol=1e-4, atol=1e-5)
    found["body"].sum().backward()
    assert any(p.grad is not None for p in graph.parameters())
    with pytest.raises(InputError, match=r'no point "bodi".*"body"'):
        tap(graph, ["bodi"])


# ---- the teacher


def test_the_teacher_is_never_touched() -> None:
    teacher, student = Net(6, seed=1), Net(4)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distillation = objective(student, teacher, KLDivergence(), Hint(point="body", projector_kind="conv1x1"))
    fit(RunContext(), student, images(), distillation, Training(epochs=3))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in k for k in distillation.state_dict())


def test_weight_zero_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    def train(*terms: Term) -> dict[str, Tensor]:
        student = Net(4)
        fit(RunContext().enter("x"), student, images(), objective(student, Net(6, seed=1), *terms), Training(epochs=2))
        return student.state_dict()

    plain = train(CrossEntropy())
    other = train(CrossEntropy(), KLDivergence(weight=0), Hint(weight=0, point="body", projector_kind="mlp"))
    assert not [k for k in plain if not torch.equal(plain[k], other[k])]
    taught = train(CrossEntropy(), KLDivergence(weight=1))
    assert [k for k in plain if not torch.equal(plain[k], taught[k])]
    with pytest.raises(InputError, match="no term has a weight above 0"):
        train(KLDivergence(weight=0))


def test_the_teacher_joins_when_it_is_time() -> None:
    student, teacher = Net(4), Net(6, seed=1)
    distillation = Distillation((CrossEntropy(), KLDivergence()), task(), student, FrozenTeacher(teacher), start=0.5)
    batch = next(images().batches())
    student.eval()
    plain = F.cross_entropy(student(*batch.inputs), batch.targets, reduction="none")
    for progress in (0.0, 0.49, 0.5, 1.0):
        distillation.begin(progress)
        losses = distillation(distillation.wrap(student), batch)
        assert torch.equal(losses, plain) == (progress < 0.5)


def test_a_fingerprint_is_of_names_shapes_and_values() -> None:
    model = Net()
    assert weights_fingerprint(model) == weights_fingerprint(Net()) != weights_fingerprint(Net(seed=1))
    with torch.no_grad():
        model.head.bias[0] += 1
    assert weights_fingerprint(model) != weights_fingerprint(Net())


def test_bfloat16_answers_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bf16_is_slow", lambda: False)
    answer, _ = FrozenTeacher(Net(), precision="bf16")(next(images().batches()))
    live, _ = FrozenTeacher(Net())(next(images().batches()))
    assert answer.dtype == torch.float32 and 0 < float((answer - live).abs().max()) < 0.05


def test_checkpoints_hold_projectors_and_no_teacher(tmp_path: Path) -> None:
    run, student = RunContext(folder=tmp_path).enter("x"), Net(4)
    distillation = objective(student, Net(6, seed=1), Hint(point="body", projector_kind="linear"))
    fit(run, student, images(), distillation, Training(epochs=1))
    assert run.scratch is not None
    tensors, _ = read_tensors(run.scratch / "checkpoint.safetensors")
    assert "objective/projectors.0.weight" in tensors and not any("teacher" in k for k in tensors)
