"""Terms that look into the models: masks, attention, task neurons, dual space, surviving channels, suggested pairs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.errors import InputError
from pqk.knowledge import (
    AttentionMaps,
    AttentionTransfer,
    CrossEntropy,
    DualSpace,
    HiddenCosine,
    Hint,
    KLDivergence,
    RKDDistance,
    SimilarityPreserving,
    TaskNeurons,
    Term,
    View,
    neuron_scores,
    suggest_pairs,
)
from pqk.knowledge.objective import Distillation
from pqk.knowledge.pairs import cka
from pqk.knowledge.teachers.base import FrozenTeacher
from pqk.knowledge.terms.dual_space import DualProjector
from pqk.knowledge.terms.feature import Slice
from pqk.models.resnet import resnet
from pqk.passes import Capture, Distill, Prune, Quantize
from pqk.passes.capture.capture import capture
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, fit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TOKENS, MASK = torch.randn(8, 5, 4, generator=generator()), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] * 4)
DATA = ArrayData((TOKENS, MASK), torch.arange(8) % 3, 4)
TASK = Task(DATA, DATA, validation=DATA, input_names=("tokens", "attention_mask"))
IMAGES = ArrayData(torch.randn(8, 3, 8, 8, generator=generator()), torch.arange(8) % 5, 4)
IMAGE_TASK = Task(IMAGES, IMAGES, validation=IMAGES)


class Mean(nn.Module):
    """Of the real tokens."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        real = mask[:, :, None].float()
        return (hidden * real).sum(1) / real.sum(1)


class Reader(nn.Module):
    """Tokens [B, N, 4] and a mask -> logits [B, classes], with everything to look at: attention, hidden, pooled."""

    def __init__(self, width: int = 6, heads: int = 2, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.heads = nn.Linear(4, width * heads), heads
        self.probabilities, self.hidden, self.pooled = nn.Softmax(-1), nn.ReLU(), Mean()
        self.body, self.head = nn.Linear(width * heads, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        split = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = split @ split.transpose(-1, -2) - 1e4 * (1 - mask[:, None, None].float())
        mixed = (self.probabilities(scores) @ split).transpose(1, 2).flatten(2)
        return self.head(self.pooled(self.hidden(self.body(mixed)), mask))


def distillation(
    student: nn.Module, teacher: nn.Module, *terms: Term, task: Task = TASK, **options: Any
) -> Distillation:
    points = sorted({p[1] for t in terms if (p := t.points())})
    return Distillation(terms, task, student, FrozenTeacher(teacher, points), **options)


def losses(objective: Distillation, student: nn.Module, batch: Batch) -> Tensor:
    return objective(objective.wrap(student.eval()), batch)


def batch(spoiled: bool = False) -> Batch:
    """The first four samples; `spoiled`: with other tokens where the mask is 0."""
    tokens = TOKENS[:4].clone()
    if spoiled:
        tokens[MASK[:4] == 0] = 9.0
    return Batch((tokens, MASK[:4]), torch.arange(4) % 3, None)


# ---- masks

MASKED: list[Term] = [
    Hint(point="hidden", projector_kind="identity", mask="attention_mask"),
    HiddenCosine(point="hidden", mask="attention_mask"),
    AttentionTransfer(point="hidden", mask="attention_mask"),
    TaskNeurons(point="hidden", mask="attention_mask"),
    RKDDistance(point="hidden", mask="attention_mask"),
    SimilarityPreserving(point="hidden", mask="attention_mask"),
    AttentionMaps(point="probabilities", mask="attention_mask"),
    AttentionMaps(point="probabilities", mask="attention_mask", distance="mse"),
]


@pytest.mark.parametrize("term", MASKED, ids=lambda t: t.term)
def test_padding_does_not_count(term: Term) -> None:
    """A term gives the same whatever stands in the padding, and something else without its mask."""
    student, teacher = Reader(), Reader(seed=1)
    objective = distillation(student, teacher, term)
    torch.testing.assert_close(losses(objective, student, batch()), losses(objective, student, batch(spoiled=True)))
    plain = distillation(student, teacher, type(term)(**{**vars_of(term), "mask": None}))
    assert not torch.equal(losses(plain, student, batch()), losses(plain, student, batch(spoiled=True)))


def vars_of(term: Term) -> dict[str, Any]:
    return {k: v for k, v in vars(term).items() if k in type(term).__dataclass_fields__}  # type: ignore[attr-defined]


def test_the_mean_is_over_real_tokens() -> None:
    g = generator(3)
    s, t = torch.randn(2, 5, 4, generator=g), torch.randn(2, 5, 4, generator=g)
    seen = View(None, None, None, {"p": s}, {"p": t}, TASK, (TOKENS[:2], MASK[:2]))
    want = torch.stack([1 - F.cosine_similarity(s[0, :3], t[0, :3]).mean(), 1 - F.cosine_similarity(s[1], t[1]).mean()])
    torch.testing.assert_close(HiddenCosine(point="p", mask="attention_mask")(seen, None), want)
    want = torch.stack([(s[0, :3] - t[0, :3]).square().mean(), (s[1] - t[1]).square().mean()])
    hint = Hint(point="p", projector_kind="identity", mask="attention_mask")
    torch.testing.assert_close(hint(seen, None), want)


def test_a_mask_that_is_not_there_or_does_not_fit_is_refused() -> None:
    student = Reader()
    with pytest.raises(InputError, match=r'no mask "attention_mark".*"attention_mask"'):
        losses(distillation(student, Reader(), HiddenCosine(point="hidden", mask="attention_mark")), student, batch())
    for term in (HiddenCosine(point="hidden", mask="tokens"), AttentionMaps(point="probabilities", mask="tokens")):
        with pytest.raises(InputError, match=r'mask "tokens" is \(4, 5, 4\)'):
            losses(distillation(student, Reader(), term), student, batch())


@pytest.mark.parametrize("kind", [Hint, AttentionTransfer, RKDDistance])
def test_the_foreground_alone_may_be_taught(kind: Any) -> None:
    """A mask given in Python, at the resolution of the images."""
    student, teacher = small(), small(seed=1)
    left = torch.zeros(4, 1, 8, 8)
    left[..., :4] = 1
    fields = {"projector_kind": "identity"} if kind is Hint else {}
    seen = []

    def foreground(batch: Batch) -> Tensor:
        seen.append(len(batch.inputs[0]))
        return left

    term = kind(point="layer2", mask="foreground", **fields)
    objective = distillation(student, teacher, term, task=IMAGE_TASK, masks={"foreground": foreground})
    features: dict[str, Tensor] = {}
    wrapped, found = objective.wrap(student.eval()), next(IMAGES.batches())
    objective(wrapped, found)
    with torch.no_grad():
        features = {
            name: m(*found.inputs)[1]["layer2"]
            for name, m in (("s", wrapped), ("t", FrozenTeacher(teacher, ["layer2"])._model[0]))
        }
    half = {k: f[..., : f.shape[-1] // 2] for k, f in features.items()}
    if kind is Hint:
        torch.testing.assert_close(objective(wrapped, found), (half["s"] - half["t"]).square().mean((1, 2, 3)))
    changed = {k: torch.cat([h, torch.randn_like(h)], -1) for k, h in half.items()}
    views = [
        View(None, None, None, {"layer2": f["s"]}, {"layer2": f["t"]}, IMAGE_TASK, masks={"foreground": left})
        for f in (features, changed)
    ]
    torch.testing.assert_close(term(views[0], None), term(views[1], None))
    assert seen and set(seen) == {4}


def small(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet((1, 1, 1), width=width, classes=5)


# ---- attention


def test_attention_maps_are_compared_head_by_head() -> None:
    g = generator(1)
    s, t = (torch.randn(2, 3, 4, 4, generator=g).softmax(-1) for _ in range(2))
    seen = View(None, None, None, {"p": s}, {"p": t}, TASK)
    kl = (t * (t / s).log()).sum(-1).mean((1, 2))
    torch.testing.assert_close(AttentionMaps(point="p")(seen, None), kl)
    mse = AttentionMaps(point="p", distance="mse")(seen, None)
    torch.testing.assert_close(mse, (s - t).square().mean((1, 2, 3)))
    scores = View(None, None, None, {"p": s.log() + 3}, {"p": t.log() - 1}, TASK)
    torch.testing.assert_close(AttentionMaps(point="p", scores=True)(scores, None), kl)


def test_cut_heads_are_left_out() -> None:
    student, teacher = Reader(heads=2), Reader(heads=3, seed=1)
    with torch.no_grad():  # the student is the teacher without head 1
        kept = torch.cat([torch.arange(6), torch.arange(12, 18)])
        student.embed.weight.copy_(teacher.embed.weight[kept])
        student.embed.bias.copy_(teacher.embed.bias[kept])
    for options in ({"heads": (0, 2)}, {}):
        term = AttentionMaps(point="probabilities", **options)  # type: ignore[arg-type]
        objective = distillation(student, teacher, term, kept=lambda point: [0, 2])
        assert float(losses(objective, student, batch()).detach().abs().max()) < 1e-6
    for term, message in [
        (AttentionMaps(point="probabilities"), "not known which teacher channels"),
        (AttentionMaps(point="probabilities", heads=(0, 3)), r"heads = \[0, 3\] do not fit"),
        (AttentionMaps(point="probabilities", heads=(0,)), r"heads = \[0\] do not fit"),
        (AttentionMaps(point="hidden"), r"compares attention \[B, heads, N, N\]"),
    ]:
        with pytest.raises(InputError, match=message):
            distillation(student, teacher, term)


# ---- task neurons


def linear(weights: Sequence[float]) -> nn.Module:
    """Two logits: Σ w_i x_i and its negative."""
    model = nn.Sequential(nn.Identity(), nn.Linear(len(weights), 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([weights, [-w for w in weights]]))  # type: ignore[union-attr]
    return model.requires_grad_(False)


def test_a_units_score_is_the_change_of_the_answer_without_it() -> None:
    x = torch.randn(16, 3, generator=generator())
    model = nn.Sequential(nn.Linear(3, 3), linear([1.0, -5.0, 0.0]))
    scores = neuron_scores(model.train(), "0", [(x[:10],), (x[10:],)])
    want = (model[0](x) * torch.tensor([1.0, 5.0, 0.0])).abs().mean(0)
    torch.testing.assert_close(scores, want.detach())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


def test_scores_of_images_and_tokens_are_sums_over_their_positions() -> None:
    teacher = small().requires_grad_(False).eval()
    (x,) = next(IMAGES.batches()).inputs
    scores = neuron_scores(teacher, "layer3", [(x,)])
    with torch.no_grad():
        pooled, answer = {}, teacher(x)
        hook = teacher.layer3.register_forward_hook(lambda m, i, o: pooled.update(f=o.mean((2, 3))))  # type: ignore[union-attr]
        teacher(x)
        hook.remove()
    weight = next(m for m in teacher.modules() if isinstance(m, nn.Linear)).weight
    torch.testing.assert_close(scores, (pooled["f"] * weight[answer.argmax(1)]).abs().mean(0))
    assert neuron_scores(Reader(), "hidden", [(TOKENS, MASK)]).shape == (6,)
    with pytest.raises(InputError, match="no samples"):
        neuron_scores(teacher, "layer3", [])


def test_the_teachers_most_used_units_are_taught() -> None:
    data = ArrayData(torch.randn(64, 4, generator=generator()), None, 16)
    task = Task(data, data, validation=data)
    student = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    teacher = nn.Sequential(nn.Linear(4, 4), linear([0.1, 6.0, 0.0, -9.0]))
    objective = distillation(student, teacher, TaskNeurons(point="0"), task=task)
    chosen = objective.projectors["0"]
    assert isinstance(chosen, Slice) and chosen.kept == [1, 3] and not [*objective.parameters()]
    log = fit(RunContext(), student, data, objective, Training(epochs=60, learning_rate=0.1, weight_decay=0))
    assert log.losses[-1] < 0.01 < log.losses[0]
    with torch.no_grad():
        s, t = student[0](data.inputs[0]), teacher[0](data.inputs[0])[:, [1, 3]]
    for i in range(2):
        assert float(torch.corrcoef(torch.stack([s[:, i], t[:, i]]))[0, 1]) > 0.9
    with pytest.raises(InputError, match="more units than the teacher"):
        distillation(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)), teacher, TaskNeurons(point="0"), task=task)
    with pytest.raises(InputError, match="does not depend"):
        neuron_scores(Aside(), "aside", [(TOKENS,)])


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aside, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.head(x).mean(1)


# ---- dual space

DUAL = DualSpace(point="pooled", head="head")


def test_equal_models_with_identity_maps_have_nothing_to_learn_but_the_labels() -> None:
    student, teacher = Reader(), Reader()
    objective = distillation(student, teacher, DUAL)
    projector = objective.projectors["0"]
    assert isinstance(projector, DualProjector)
    with torch.no_grad():
        for layer in (projector.to_student, projector.to_teacher):
            layer.weight.copy_(torch.eye(6))
            layer.bias.zero_()
        want = F.cross_entropy(student(*batch().inputs), batch().targets, reduction="none")
    torch.testing.assert_close(losses(objective, student, batch()), want)


def test_who_learns_what_in_dual_space() -> None:
    """Equation by equation: the heads learn nothing by being read, and the teacher nothing at all."""
    student, teacher = Reader(), Reader(width=5, heads=1, seed=1)
    objective = distillation(student, teacher, DUAL)
    losses(objective, student, batch()).mean().backward()
    projector = objective.projectors["0"]
    assert isinstance(projector, DualProjector)
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in projector.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    student_space = torch.autograd.grad(losses(objective, student, batch()).mean(), student.head.weight)[0]
    with torch.no_grad():
        hidden = {}
        for name, model in (("s", student), ("t", teacher)):
            hook = model.pooled.register_forward_hook(lambda m, i, o, n=name: hidden.update({n: o}))  # type: ignore[misc]
            model(*batch().inputs)
            hook.remove()
        taught = projector.read(projector.to_student(hidden["t"]), 0)
        answer = student(*batch().inputs)
    want = (answer.softmax(1) - taught.softmax(1)).T @ hidden["s"] / 4  # of KL(taught ‖ answer) alone
    torch.testing.assert_close(student_space, want)


def test_dual_space_takes_other_classes_and_trains() -> None:
    student, teacher = Reader(classes=3), Reader(width=8, classes=7, seed=1)
    with torch.no_grad():
        labels = teacher(TOKENS, MASK).argmax(1) % 3  # that can be read from the teacher's hidden state
    data = ArrayData((TOKENS, MASK), labels, 4)
    log = fit(RunContext(), student, data, distillation(student, teacher, DUAL), Training(epochs=30, learning_rate=0.1))
    assert log.losses[-1] < 0.5 * log.losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"point": "pooled", "head": "haed"}, r'student has no linear layer "haed".*"head"'),
        ({"point": "pooled", "head": "head", "teacher_head": "hidden"}, 'teacher has no linear layer "hidden"'),
        ({"point": "probabilities", "head": "head"}, "reads 6 channels and the feature has 2"),
    ],
)
def test_heads_that_are_not_there_are_refused_before_training(fields: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        distillation(Reader(), Reader(), DualSpace(**fields))


def test_dual_space_needs_labels_and_the_points_that_the_heads_read() -> None:
    student = Reader()
    objective = distillation(student, Reader(), DUAL)
    with pytest.raises(InputError, match="one class label"):
        losses(objective, student, batch()._replace(targets=None))
    objective = distillation(student, Reader(), DualSpace(point="hidden", head="head"))
    with pytest.raises(InputError, match=r"heads give \(4, 5, 3\).*\(4, 3\) \(student\)"):
        losses(objective, student, batch())


# ---- terms that look into the models, and what becomes of them

LOOKING: list[Term] = [
    DUAL,
    TaskNeurons(point="hidden"),
    Hint(point="hidden", projector_kind="linear"),
    Hint(point="hidden", projector_kind="mlp"),
]


@pytest.mark.parametrize("term", LOOKING, ids=lambda t: t.term)
def test_nothing_of_a_term_is_in_the_student_or_its_graph(term: Term) -> None:
    student, teacher = Reader(), Reader(width=8, seed=1)
    keys, example = set(student.state_dict()), TASK.example
    objective = distillation(student, teacher, CrossEntropy(), term)
    fit(RunContext(), student, DATA, objective, Training(epochs=1))
    assert set(student.state_dict()) == keys
    graph = capture(student, example)
    assert {n for n, _ in graph.named_parameters()} <= keys
    again = distillation(graph, teacher, CrossEntropy(), term)  # and it goes on in the captured graph
    log = fit(RunContext(), graph, DATA, again, Training(epochs=3, learning_rate=0.01))
    assert log.losses[-1] < log.losses[0]
    assert {n for n, _ in graph.named_parameters()} <= keys


@pytest.mark.slow
def test_terms_go_through_pruning_capture_and_quantization(tmp_path: Path) -> None:
    """One list of terms for every stage; narrow students need no other one."""
    terms = (
        CrossEntropy(weight=0.1), KLDivergence(), DualSpace(point="layer3", head="linear"), TaskNeurons(point="layer2"),
        HiddenCosine(point="layer1"), Hint(point="layer3"), AttentionTransfer(point="layer2"),
        RKDDistance(point="layer3"), SimilarityPreserving(point="layer3"),
    )  # fmt: skip
    teacher = small(width=8, seed=1).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    program = Program(
        teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1, tmp_path).enter("00-distill")
    )
    program = Prune(macs_ratio=1.5, multiple=1, scope="per_layer").apply(program, IMAGE_TASK)
    distill = Distill(epochs=1, learning_rate=0.001, terms=terms)
    keys = set(program.student.state_dict())
    for number, step in enumerate((Capture(), Quantize(samples=8), None)):
        program = replace(program, run=program.run.enter(f"{number}-distill"))
        program = distill.apply(program, IMAGE_TASK)
        assert program.details["losses"][0] > 0
        if step is not None:
            program = replace(step.apply(program, IMAGE_TASK), stage=Stage(number + 1))
    assert {k for k in program.student.state_dict() if k.endswith("weight") and "bn" not in k} <= keys


def test_a_black_box_shows_nothing() -> None:
    class BlackBox(FrozenTeacher):
        @property
        def module(self) -> nn.Module | None:
            return None

    student, teacher = Reader(), Reader(seed=1)
    for term in (DUAL, TaskNeurons(point="pooled")):
        with pytest.raises(InputError, match="black box"):
            Distillation([term], TASK, student, BlackBox(teacher, ["pooled"]))


# ---- suggestions


def test_cka_is_one_for_rotated_and_scaled_features() -> None:
    x = torch.randn(40, 5, generator=generator())
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator(1)))
    assert cka(x, 3 * x @ q + 1) == pytest.approx(1, abs=1e-6)
    assert cka(x, torch.randn(40, 5, generator=generator(2))) < 0.5
    assert cka(x, torch.zeros(40, 2)) == 0
    images, other = torch.randn(2, 6, 4, 4, generator=generator(3)), torch.randn(2, 2, 4, 4, generator=generator(4))
    rows = [f.permute(0, 2, 3, 1).reshape(32, -1) for f in (images, other)]
    assert cka(images, other) == pytest.approx(cka(*rows))


def test_pairs_are_the_ends_of_the_stages() -> None:
    """A network and itself: its own points, wholly alike; a shorter copy: the same stages."""
    (x,) = IMAGES.inputs
    teacher, student = resnet((2, 2, 2), width=4, classes=5).eval(), small().train()
    for same, found in ((True, suggest_pairs(teacher, teacher, (x,))), (False, suggest_pairs(teacher, student, (x,)))):
        assert [p.point for p in found][:3] == ["layer1", "layer2", "layer3"]
        for p in found[:3]:
            assert p.student_shape == p.teacher_shape and p.projector_kind == "identity"
            assert not same or (p.teacher_point == p.point and p.cka == pytest.approx(1))
    assert student.training and not teacher.training
    narrow = suggest_pairs(teacher, small(width=2), (x,))
    assert {p.projector_kind for p in narrow[:3]} == {"conv1x1"}


def test_the_most_alike_point_of_a_stage_is_proposed() -> None:
    """The student is the teacher's first block of each stage, so its stages end there."""
    (x,) = IMAGES.inputs
    teacher, student = resnet((2, 1, 1), width=4, classes=5).eval(), small().eval()
    own = {k: v for k, v in teacher.state_dict().items() if k in student.state_dict()}
    student.load_state_dict(own)
    first = suggest_pairs(teacher, student, (x,))[0]
    assert (first.point, first.teacher_point) == ("layer1", "layer1.0") and first.cka == pytest.approx(1)


@pytest.mark.slow
def test_every_suggestion_can_be_trained_on() -> None:
    (x,) = IMAGES.inputs
    teacher, student = small(seed=1).eval(), small(width=2)
    graph = capture(small(width=2), (x[:2],))
    for model in (student, graph):
        pairs = suggest_pairs(teacher, model, (x,))
        assert len(pairs) >= 3
        hints = [
            Hint(point=p.point, teacher_point=p.teacher_point, projector_kind=p.projector_kind)  # type: ignore[arg-type]
            for p in pairs
        ]
        objective = distillation(model, teacher, KLDivergence(), *hints, task=IMAGE_TASK)
        log = fit(RunContext(), model, IMAGES, objective, Training(epochs=3, learning_rate=0.01))
        assert log.losses[-1] < log.losses[0]


def test_networks_without_a_common_stage_are_refused() -> None:
    with pytest.raises(InputError, match="none agree"):
        suggest_pairs(
            nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), nn.Sequential(nn.AvgPool2d(4), nn.ReLU()), IMAGES.inputs
        )
