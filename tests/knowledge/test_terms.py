"""The catalogue of terms: known answers, and for every term the laws that beat values."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from typing import Any

import jsonschema
import pytest
import tomli_w
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.knowledge import (
    DIST,
    JSD,
    PKT,
    TERMS,
    AttentionMaps,
    AttentionTransfer,
    CorrelationCongruence,
    CrossEntropy,
    DecoupledKD,
    GroupPolicy,
    HiddenCosine,
    Hint,
    KLDivergence,
    LabelSmoothing,
    LocalGeometry,
    LogitMSE,
    MiniLLM,
    Ranking,
    ReverseKL,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
    SkewKL,
    SkewReverseKL,
    SortedULD,
    StandardizedKD,
    TaskNeurons,
    Term,
    View,
)
from pqk.recipe.recipe import Recipe
from pqk.recipe.schema import json_schema
from pqk.task.task import Task

I, J = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(6.0, dtype=torch.float64)  # noqa: E741
ZS, ZT = 2 * (1.3 * I + 0.7 * J[:5] + 0.2).sin(), 4 * (0.9 * I - 0.5 * J[:5] + 0.1).cos()
Y = torch.tensor([0, 3, 1, 4])
ES, ET = (0.8 * I * (J[:3] + 1) + 0.3 * J[:3]).sin(), (0.5 * I * (J + 1) - 0.2 * J).cos()


def grid(channels: int) -> Any:
    return torch.meshgrid(*[torch.arange(float(n), dtype=torch.float64) for n in (4, channels, 2, 2)], indexing="ij")


def images(channels: int, student: bool) -> Tensor:
    i, c, h, w = grid(channels)
    return (i + 0.5 * c + 0.3 * h - 0.2 * w).sin() if student else (0.7 * i - 0.4 * c + 0.6 * h + 0.1 * w).cos()


FS, FT = images(3, True), images(5, False)
DATA = ArrayData(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5, 4)
TASK = Task(DATA, DATA, validation=DATA, class_axis=-1)


def view(s: Any = None, t: Any = None, fs: Any = None, ft: Any = None, targets: Any = Y, **masks: Tensor) -> View:
    features = [{} if f is None else {"p": f} for f in (fs, ft)]
    return View(s, t, targets, *features, TASK, masks=masks)


KNOWN: list[tuple[Term, str, float, float]] = [
    (ReverseKL(), "z", 1.4425893620, 1e-8),
    (JSD(beta=0.1), "z", 0.0757828943, 1e-8),
    (JSD(beta=0.5), "z", 0.2080013969, 1e-8),
    (JSD(beta=0.9), "z", 0.0942713486, 1e-8),
    (SkewKL(skew=0.1), "z", 0.6621295190, 1e-8),
    (SkewReverseKL(skew=0.1), "z", 0.7298702969, 1e-8),
    (DecoupledKD(target=1, others=8, temperature=4), "z", 12.7500004449, 1e-8),
    (StandardizedKD(temperature=2), "z", 5.8710557143 / 9, 1e-5 / 9),
    (DIST(), "z", 1.9744177612, 1e-8),
    (SortedULD(), "z", 0.4091960287, 1e-8),
    (AttentionTransfer(point="p"), "f", 0.0104371717, 1e-8),
    (SimilarityPreserving(point="p"), "f", 0.0836493987, 1e-8),
    (RKDDistance(point="p"), "e", 0.0123488814, 1e-8),
    (RKDAngle(point="p"), "e", 0.0254468024, 1e-8),
    (CorrelationCongruence(point="p"), "e", 0.0079562781, 1e-8),
    (PKT(point="p"), "e", 0.0050012288, 1e-5),
]


@pytest.mark.parametrize(("term", "kind", "value", "tolerance"), KNOWN, ids=lambda v: getattr(v, "term", None))
def test_terms_have_known_answers(term: Term, kind: str, value: float, tolerance: float) -> None:
    """Specification, section 7, in float64."""
    views = {"z": view(ZS, ZT), "f": view(None, None, FS, FT), "e": view(None, None, ES, ET)}
    losses = term(views[kind], None)
    assert losses.shape == (4,) and losses.dtype == torch.float64
    assert float(losses.mean()) == pytest.approx(value, abs=tolerance)


def test_the_published_weights_are_the_defaults() -> None:
    """Specification, section 1."""
    weights = {
        StandardizedKD: 9, SortedULD: 1.5, AttentionTransfer: 1000, RKDDistance: 25, RKDAngle: 50,
        SimilarityPreserving: 3000,
    }  # fmt: skip
    for kind, weight in weights.items():
        fields = {} if kind in (StandardizedKD, SortedULD) else {"point": "p"}
        assert kind(**fields).weight == weight
    dkd, dist, cc = DecoupledKD(), DIST(), CorrelationCongruence(point="p")
    assert (dkd.target, dkd.others, dkd.temperature, dist.rows, dist.columns) == (1, 8, 4, 1, 1)
    assert (cc.gamma, cc.order, StandardizedKD().temperature) == (0.4, 2, 2)


@dataclass(frozen=True)
class Case:
    """A term on inputs of a kind: z logits [B, …, C], f images, t tokens, e vectors, a attention [B, heads, N, N]."""

    term: Term
    kind: str
    widths: bool = False
    """teacher and student may differ in width"""

    def __str__(self) -> str:
        return type(self.term).__name__ + self.kind


P: dict[str, Any] = {"point": "p"}
IDENTITY = Hint(point="p", projector_kind="identity")
CASES = [
    *(Case(term, "z") for term in (
        KLDivergence(), ReverseKL(), JSD(), JSD(beta=0.9), SkewKL(), SkewReverseKL(), LogitMSE(),
        LogitMSE(centred=True), DecoupledKD(), StandardizedKD(), DIST())),
    Case(SortedULD(), "z", widths=True),
    Case(IDENTITY, "f"), Case(IDENTITY, "t"), Case(AttentionTransfer(**P), "f", widths=True),
    Case(AttentionTransfer(**P), "t", widths=True),
    Case(HiddenCosine(**P), "t"), Case(HiddenCosine(**P), "e"), Case(HiddenCosine(**P), "f"),
    Case(AttentionMaps(**P), "a"), Case(AttentionMaps(**P, distance="mse"), "a"),
    Case(AttentionMaps(**P, scores=True), "f"),
    Case(TaskNeurons(**P), "e"), Case(TaskNeurons(**P), "f"), Case(TaskNeurons(**P), "t"),
    *(Case(kind(**P), "e", widths=True) for kind in (
        RKDDistance, RKDAngle, SimilarityPreserving, CorrelationCongruence, LocalGeometry, PKT)),
    Case(RKDDistance(**P), "f", widths=True), Case(SimilarityPreserving(**P), "f", widths=True),
]  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def tensor(kind: str, batch: int, width: int, seed: int, scale: float = 1.0, dtype: Any = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    places = {"z": (), "e": (), "t": (3,)}.get(kind)
    shape = (batch, width, 3, 3) if places is None else (batch, *places, width)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    return (x.softmax(-1) if kind == "a" else x).to(dtype)


def shown(case: Case, s: Tensor, t: Tensor) -> View:
    labels = torch.arange(len(s)) % s.shape[-1]
    return view(s, t, targets=labels) if case.kind == "z" else view(None, None, s, t, targets=labels)


def test_every_term_with_a_teacher_is_under_the_laws() -> None:
    tested = {type(c.term) for c in CASES}
    # DualSpace is not zero at equality, MiniLLM takes answers of the student's own: both have laws of their own.
    others = {t.__name__ for t in TERMS if t.needs_teacher} - {t.__name__ for t in tested}
    assert others == {"DualSpace", "MiniLLM"}


@EVERY
@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 9), width=st.integers(2, 7), other=st.integers(2, 7), seed=st.integers(0, 2**31))
def test_losses_are_per_sample_zero_at_equality_and_give_the_teacher_no_gradient(
    case: Case, batch: int, width: int, other: int, seed: int
) -> None:
    s = tensor(case.kind, batch, width, seed, dtype=torch.float64)
    equal = case.term(shown(case, s, s.clone()), None)
    # DIST's published ε shows where the teacher says next to nothing.
    assert equal.shape == (batch,) and float(equal.abs().max()) < (2e-2 if isinstance(case.term, DIST) else 1e-9)
    student = s.requires_grad_()
    teacher = tensor(case.kind, batch, other if case.widths else width, seed + 1, dtype=torch.float64).requires_grad_()
    loss = case.term(shown(case, student, teacher), None)
    assert loss.shape == (batch,) and bool((loss > -1e-3).all())  # PKT's rows are not normalised after their ε
    loss.mean().backward()
    assert teacher.grad is None and student.grad is not None and bool(student.grad.isfinite().all())


@EVERY
def test_a_step_against_the_gradient_lessens_the_loss(case: Case) -> None:
    s = tensor(case.kind, 6, 5, 0, dtype=torch.float64).requires_grad_()
    t = tensor(case.kind, 6, 5, 1, dtype=torch.float64)
    loss = case.term(shown(case, s, t), None).mean()
    (gradient,) = torch.autograd.grad(loss, s)
    assert float(gradient.abs().max()) > 1e-7
    moved = (s - 1e-4 * gradient / gradient.norm()).detach()
    assert float(case.term(shown(case, moved, t), None).mean()) < float(loss.detach())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1.0, 0.0])
def test_extremes_have_finite_losses_and_gradients(case: Case, scale: float, dtype: torch.dtype) -> None:
    """±1e4, all equal (dead features, a head that starts at zero), and bfloat16, which is computed in float32."""
    s = tensor(case.kind, 6, 5, 0, scale, dtype).requires_grad_()
    t = tensor(case.kind, 6, 5, 1, scale, dtype)
    for teacher in (t, -s.detach(), torch.zeros_like(t)):
        loss = case.term(shown(case, s, teacher), None)
        assert loss.dtype == torch.float32 and bool(loss.isfinite().all())
        (gradient,) = torch.autograd.grad(loss.mean(), s)
        assert gradient.dtype == dtype and bool(gradient.isfinite().all())


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "z"], ids=str)
def test_thirty_thousand_classes(case: Case) -> None:
    for scale in (1.0, 1e4):
        s, t = (tensor("z", 3, 30_000, i, scale).requires_grad_(i == 0) for i in range(2))
        loss = case.term(shown(case, s, t), None)
        (gradient,) = torch.autograd.grad(loss.mean(), s)
        assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
        assert scale > 1 or float(gradient.abs().sum()) > 0  # of ±1e4 a mixture (skew, JSD) may see nothing
        equal = case.term(shown(case, t, t.clone()), None)
        assert float(equal.abs().max()) < (2e-2 if isinstance(case.term, DIST) else 1e-5)


# ---- laws of single terms


def rotated(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=g, dtype=x.dtype))
    return 3.7 * x @ q + torch.randn(x.shape[1], generator=g, dtype=x.dtype)


@pytest.mark.parametrize("kind", [RKDDistance, RKDAngle, LocalGeometry])
def test_relations_of_distances_are_free_of_rotation_shift_and_scale(kind: Any) -> None:
    s, t = tensor("e", 7, 5, 0, dtype=torch.float64), tensor("e", 7, 3, 1, dtype=torch.float64)
    plain, moved = (kind(point="p")(view(None, None, x, t), None) for x in (s, rotated(s)))
    torch.testing.assert_close(plain, moved, atol=1e-10, rtol=1e-8)
    assert float(kind(point="p")(view(None, None, rotated(t), t), None).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", [SimilarityPreserving, CorrelationCongruence, PKT])
def test_relations_of_cosines_are_free_of_rotation_and_scale(kind: Any) -> None:
    s, t = tensor("e", 7, 5, 0, dtype=torch.float64), tensor("e", 7, 3, 1, dtype=torch.float64)
    turned = 3.7 * (rotated(s) - rotated(torch.zeros_like(s)))
    plain, moved = (kind(point="p")(view(None, None, x, t), None) for x in (s, turned))
    torch.testing.assert_close(plain, moved, atol=1e-10, rtol=1e-6)


def test_the_angles_of_a_large_batch_are_those_of_its_groups() -> None:
    s, t = tensor("e", 130, 4, 0, dtype=torch.float64), tensor("e", 130, 4, 1, dtype=torch.float64)
    whole = RKDAngle(point="p")(view(None, None, s, t), None)
    groups = zip(s.tensor_split(3), t.tensor_split(3), strict=True)
    want = torch.cat([RKDAngle(point="p")(view(None, None, *g), None) for g in groups])
    torch.testing.assert_close(whole, want)


def test_angles_are_cosines_of_differences() -> None:
    """The straightforward B x B x D way."""

    def angles(e: Tensor) -> Tensor:
        d = F.normalize(e[None] - e[:, None], dim=2)
        return torch.bmm(d, d.transpose(1, 2))

    s, t = tensor("e", 9, 4, 0, dtype=torch.float64), tensor("e", 9, 6, 1, dtype=torch.float64)
    s[3] = s[5]  # two samples in one place have no direction
    want = F.smooth_l1_loss(angles(s), angles(t))
    assert float(RKDAngle(point="p")(view(None, None, s, t), None).mean()) == pytest.approx(float(want), abs=1e-12)


def test_local_geometry_looks_at_neighbours_only() -> None:
    """Two far clusters: their distance may change freely, the arrangement within may not."""
    near = tensor("e", 4, 3, 0, dtype=torch.float64)
    t = torch.cat([near, near + 100])
    term = LocalGeometry(point="p", neighbours=3)
    parted = torch.cat([near, near + 100])
    parted[4:] += 1e-9
    assert float(term(view(None, None, parted, t), None).mean()) < 1e-12
    parted[0] = parted[1]
    assert float(term(view(None, None, parted, t), None)[0]) > 1e-6
    wide = LocalGeometry(point="p", neighbours=50)(view(None, None, tensor("e", 8, 3, 2), t), None)
    assert wide.shape == (8,) and bool((wide > 0).all())


def test_jsd_is_between_its_two_ends() -> None:
    """JSD(β) / β tends to KL(t ‖ s) for β to 0, and JSD(β) / (1 − β) to KL(s ‖ t) for β to 1 (GKD, section 2)."""
    small, large = JSD(beta=1e-6)(view(ZS, ZT), None) / 1e-6, JSD(beta=1 - 1e-6)(view(ZS, ZT), None) / 1e-6
    torch.testing.assert_close(small, KLDivergence(temperature=1)(view(ZS, ZT), None), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(large, ReverseKL()(view(ZS, ZT), None), rtol=1e-3, atol=1e-5)
    half = JSD(beta=0.5)
    torch.testing.assert_close(half(view(ZS, ZT), None), half(view(ZT, ZS), None))


def test_reverse_and_skew_are_the_other_way_round() -> None:
    forward, reverse = KLDivergence(temperature=2), ReverseKL(temperature=2)
    torch.testing.assert_close(forward(view(ZS, ZT), None), reverse(view(ZT, ZS), None))
    torch.testing.assert_close(SkewKL()(view(ZS, ZT), None), SkewReverseKL()(view(ZT, ZS), None))


def test_decoupled_kd_with_its_own_factors_is_kd() -> None:
    """KD = TCKD + (1 − p_t(target)) NCKD (Zhao et al., equation 6)."""
    kd = KLDivergence(temperature=4)(view(ZS, ZT), None)
    target = DecoupledKD(target=1, others=0)(view(ZS, ZT), None)
    others = DecoupledKD(target=0, others=1)(view(ZS, ZT), None)
    p = (ZT / 4).softmax(1).gather(1, Y[:, None])[:, 0]
    torch.testing.assert_close(kd, target + (1 - p) * others)


def test_decoupled_kd_takes_tokens_and_several_outputs() -> None:
    tokens, labels = torch.stack([ZS, ZT], 1), torch.stack([Y, Y.flip(0)], 1)
    both = DecoupledKD()(view(tokens, tokens.flip(1), targets=labels), None)
    first = DecoupledKD()(view(ZS, ZT), None)
    second = DecoupledKD()(view(ZT, ZS, targets=Y.flip(0)), None)
    torch.testing.assert_close(both, (first + second) / 2)
    heads = {"a": ZS, "b": ZT}
    named = DecoupledKD(output="b")(view(heads, {"a": ZT, "b": ZS}, targets={"a": Y, "b": Y.flip(0)}), None)
    torch.testing.assert_close(named, second)


def test_standardised_logits_are_free_of_shift_and_scale() -> None:
    torch.testing.assert_close(
        StandardizedKD()(view(5 * ZS + 3, ZT / 9 - 1), None), StandardizedKD()(view(ZS, ZT), None), rtol=1e-5, atol=1e-7
    )


def test_dist_is_free_of_the_scale_of_its_rows() -> None:
    """ρ does not change where the student's probabilities are an affine map of the teacher's."""
    p = ZT.softmax(1)
    affine = (0.5 * p + 0.1).log()
    assert float(DIST()(view(ZT, ZT), None).abs().max()) < 1e-6
    assert float(DIST(columns=0)(view(affine, ZT), None).abs().max()) < 1e-6
    assert float(KLDivergence(temperature=1)(view(affine, ZT), None).mean()) > 0.05


def test_sorted_uld_takes_other_vocabularies_and_is_blind() -> None:
    order = torch.tensor([4, 2, 0, 3, 1])
    assert float(SortedULD()(view(ZT[:, order], ZT), None).abs().max()) < 1e-12
    longer = torch.cat([ZT, torch.full((4, 3), -1e4)], 1)
    for s, t in ((ZT, longer), (longer, ZT)):
        assert float(SortedULD()(view(s, t), None).abs().max()) < 1e-12
    with pytest.raises(InputError, match="row by row"):
        SortedULD()(view(ZS[:3], ZT), None)


def test_label_smoothing_needs_no_teacher_and_is_zero_at_its_target() -> None:
    taught = torch.full((4, 5), 0.1 / 4, dtype=torch.float64).scatter(1, Y[:, None], 0.9)
    loss = LabelSmoothing(smoothing=0.1)
    assert not LabelSmoothing.needs_teacher and float(loss(view(taught.log() + 7, None), None).abs().max()) < 1e-12
    smoothed = F.cross_entropy(ZS, Y, reduction="none", label_smoothing=0.1 * 5 / 4)
    entropy = -(taught * taught.log()).sum(1)
    torch.testing.assert_close(loss(view(ZS, None), None) + entropy, smoothed)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_reverse_kl(temperature: float) -> None:
    """T p_s (log p_s/p_t − KL) / B."""
    z = ZS.clone().requires_grad_()
    ReverseKL(temperature=temperature)(view(z, ZT), None).mean().backward()
    log_s, log_t = (ZS / temperature).log_softmax(1), (ZT / temperature).log_softmax(1)
    ratio = log_s - log_t
    want = temperature * log_s.exp() * (ratio - (log_s.exp() * ratio).sum(1, keepdim=True)) / 4
    torch.testing.assert_close(z.grad, want, atol=1e-12, rtol=0)


# ---- refusals


def test_outputs_without_samples_are_refused_before_training_unless_one_is_chosen() -> None:
    """Anchors beside the answers: the loss of a sample is not made of both."""
    outputs = {"scores": torch.zeros(2, 5), "anchors": torch.zeros(3, 4)}
    data = ArrayData(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    task = Task(None, data, validation=data)
    reason = LogitMSE().why_not_compared(task, outputs)
    assert reason is not None and "output anchors is (3, 4) where output scores is (2, 5)" in reason
    assert LogitMSE(output="scores").why_not_compared(task, outputs) is None


def test_an_output_is_chosen_by_number_or_name() -> None:
    want = KLDivergence()(view(ZS, ZT), None)
    assert torch.equal(KLDivergence(output=1)(view((ZT, ZS), (ZT, ZT)), None), want)
    assert torch.equal(KLDivergence(output="b")(view({"a": ZT, "b": ZS}, {"a": ZT, "b": ZT}), None), want)
    with pytest.raises(InputError, match=r'no output "box".*"boxes"'):
        KLDivergence(output="box")(view({"boxes": ZS}, {"boxes": ZT}), None)
    with pytest.raises(InputError, match="has 2 outputs, and none of number 2"):
        KLDivergence(output=2)(view((ZS, ZS), (ZT, ZT)), None)


@pytest.mark.parametrize("term", [DecoupledKD(), LabelSmoothing()], ids=lambda t: t.term)
def test_labels_that_do_not_fit_are_refused(term: Term) -> None:
    with pytest.raises(InputError, match="needs labels"):
        term(view(ZS, ZT, targets=None), None)
    for labels in (Y.double(), Y[:3], torch.stack([Y, Y], 1)):
        with pytest.raises(InputError, match="one class label for every row"):
            term(view(ZS, ZT, targets=labels), None)
    with pytest.raises(InputError, match="from 0 to 5"):
        term(view(ZS, ZT, targets=Y + torch.tensor([0, 0, 0, 1])), None)
    with pytest.raises(InputError, match="there is only one"):
        term(view(ZS[:, :1], ZT[:, :1], targets=Y * 0), None)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (JSD, {"beta": 0}), (JSD, {"beta": 1}), (SkewKL, {"skew": 1}), (DIST, {"temperature": 0}),
        (DecoupledKD, {"others": -1}), (LabelSmoothing, {"smoothing": 0}), (KLDivergence, {"teacher_top": 1}),
        (KLDivergence, {"ramp_up": 1.1}), (KLDivergence, {"gate": ""}), (RKDAngle, {"point": "p", "most": 2}),
        (CorrelationCongruence, {"point": "p", "order": 0}), (AttentionMaps, {"point": "p", "distance": "cosine"}),
        (RKDDistance, {}), (ReverseKL, {"alpha": 0.5}),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        kind(**fields)


REQUIRED = {"point": "layer2", "head": "fc"}
SET: dict[str, Any] = {
    "ramp_up": 0.25,
    "gate": "teacher_right",
    "output": "boxes",
    "heads": [0, 2],
    "mask": "foreground",
}


SCHEMA = jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("kind", TERMS, ids=lambda t: t.__name__)
def test_every_term_is_a_table_of_a_recipe(kind: Any) -> None:
    """With the fields that it needs and some that it may have; an unknown field names the nearest known one."""
    names = {f.name for f in fields(kind)}
    chosen = {k: v for k, v in (REQUIRED | SET).items() if k in names}
    table = {"term": next(f.default for f in fields(kind) if f.name == "term"), **chosen}
    others = [{"term": "cross_entropy"}] if kind.blind else []
    author = {MiniLLM: "mixture", Ranking: "critic", GroupPolicy: "adversary"}.get(kind)
    answers = {} if author is None else {"answers": {"by": author}}
    text, wrong = (
        tomli_w.dumps({"pass": [{"name": "distill", "terms": [{**table, **more}, *others], **answers}]})
        for more in ({}, {"wieght": 2.0})
    )
    recipe = Recipe.loads(text)
    (distill,) = recipe.passes
    term = distill.terms[0]  # type: ignore[attr-defined]
    assert type(term) is kind and Recipe.loads(recipe.dumps()) == recipe
    assert {k: getattr(term, k) for k in chosen} == {k: tuple(v) if k == "heads" else v for k, v in chosen.items()}
    SCHEMA.validate(tomllib.loads(text))
    with pytest.raises(InputError, match='unknown key .*wieght" .*"weight"'):
        Recipe.loads(wrong)


def test_cross_entropy_is_the_tasks_own_loss() -> None:
    assert torch.equal(CrossEntropy()(view(ZS), None), F.cross_entropy(ZS, Y, reduction="none"))
