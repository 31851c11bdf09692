"""Terms on sequences of tokens [B, S, C]: what has no label says nothing, and the rest is as it was without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pqk.data.data import ArrayData
from pqk.knowledge import (
    DIST,
    JSD,
    TERMS,
    AttentionMaps,
    AttentionTransfer,
    CrossEntropy,
    DecoupledKD,
    DualSpace,
    GroupPolicy,
    HiddenCosine,
    Hint,
    KLDivergence,
    LabelSmoothing,
    LogitMSE,
    MiniLLM,
    Ranking,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SortedULD,
    StandardizedKD,
    TaskNeurons,
    Term,
    View,
)
from pqk.knowledge.terms.base import Place
from pqk.knowledge.terms.relation import RelationTerm
from pqk.knowledge.weighting import student_doubt, teacher_confidence, teacher_right
from pqk.task.task import Task

BATCH, TOKENS, CLASSES, WIDTH = 3, 5, 7, 4
LABELS = torch.tensor([[-100, 3, 1, 6, -100], [-100, -100, 0, -100, -100], [2, 4, 5, 1, 0]])
"""a prompt and padding; one token alone; all"""
DATA = ArrayData(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), 2)
TASK = Task(DATA, DATA, validation=DATA, class_axis=-1)
P: dict[str, Any] = {"point": "p"}
RESPONSE: list[Term] = [
    CrossEntropy(), KLDivergence(), ReverseKL(), JSD(), SkewKL(), SkewReverseKL(), LogitMSE(), LogitMSE(centred=True),
    DecoupledKD(), StandardizedKD(), DIST(), DIST(columns=0), LabelSmoothing(), SortedULD(), MiniLLM(),
    MiniLLM(single_step_decomposition=False, length_normalization=False, gamma=0.9),
]  # fmt: skip
FEATURE: list[Term] = [
    Hint(**P, projector_kind="identity"), AttentionTransfer(**P), HiddenCosine(**P), TaskNeurons(**P),
    *(kind(**P) for kind in TERMS if issubclass(kind, RelationTerm)),
]  # fmt: skip
EVERY = pytest.mark.parametrize("term", [*RESPONSE, *FEATURE, DualSpace(**P, head="h")], ids=lambda t: t.term)


def draw(seed: int, width: int) -> Tensor:
    return torch.randn(BATCH, TOKENS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pair(nn.Module):
    """Hidden states and their head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.h = nn.Linear(WIDTH, CLASSES).double()


def loss_of(term: Term, parts: dict[str, Tensor], labels: Tensor = LABELS) -> Tensor:
    features = [{"p": parts["fs"]}, {"p": parts["ft"]}]
    view = View(parts["zs"], parts["zt"], labels, *features, TASK, teacher_share=0.2)
    projector = None
    if isinstance(term, DualSpace):
        torch.manual_seed(0)
        projector = term.projector(Place(parts["fs"], parts["ft"], None, Pair(1), Pair(2), TASK)).double()
    return term(view, projector)


def parts_of() -> dict[str, Tensor]:
    return {"zs": draw(0, CLASSES), "zt": draw(1, CLASSES), "fs": draw(2, WIDTH), "ft": draw(3, WIDTH)}


def test_every_term_is_here() -> None:
    tested = {type(t) for t in (*RESPONSE, *FEATURE)} | {DualSpace, AttentionMaps, GroupPolicy, Ranking}
    assert tested == set(TERMS)


@pytest.mark.parametrize("term", [Ranking(margin=9.0), GroupPolicy()], ids=lambda t: t.term)
def test_an_order_of_answers_does_not_see_what_has_no_label(term: Ranking | GroupPolicy) -> None:
    """Three answers to one prompt, of which the second is best and all are wrong about it."""
    clean, spoiled = draw(0, CLASSES), draw(0, CLASSES)
    spoiled[LABELS == -100] = 1000 * draw(9, CLASSES)[LABELS == -100]
    scores, found = torch.tensor([[1.0, 3.0, 2.0]]), []
    for logits in (clean, spoiled):
        learned = logits.requires_grad_()
        view = View(learned, draw(1, CLASSES), LABELS, {}, {}, TASK, scores=scores)
        loss = term(view, None)
        assert loss.shape == (1,) and abs(float(loss.detach())) > 0.01
        loss.sum().backward()
        assert learned.grad is not None and not learned.grad[LABELS == -100].any()
        found.append((loss.detach(), learned.grad))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


@EVERY
def test_what_has_no_label_changes_neither_loss_nor_gradient(term: Term) -> None:
    """Garbage in prompts and padding, a thousand times as large."""
    own, other = parts_of(), parts_of()
    unlabelled = LABELS == -100
    for key, value in other.items():
        other[key] = value.clone()
        other[key][unlabelled] = 1000 * draw(9, value.shape[-1])[unlabelled]
    found = []
    for parts in (own, other):
        learned = [parts[key].requires_grad_() for key in ("zs", "fs")]
        loss = loss_of(term, parts)
        assert loss.shape == (BATCH,) and bool(loss.isfinite().all()) and float(loss.detach().abs().max()) > 1e-6
        loss.sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        assert not any(g[unlabelled].any() for g in gradients)
        assert any(g[~unlabelled].any() for g in gradients)
        found.append((loss.detach(), *gradients))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("term", [t for t in RESPONSE if not isinstance(t, MiniLLM | DIST)], ids=lambda t: t.term)
def test_a_sample_loss_is_the_mean_over_its_labelled_tokens(term: Term) -> None:
    """As if each token that has a label were a sample of its own."""
    parts = parts_of()
    counted = LABELS != -100
    single = {k: v[counted] for k, v in parts.items()}
    view = View(single["zs"], single["zt"], LABELS[counted], {}, {}, TASK)
    each = torch.zeros(BATCH, TOKENS, dtype=torch.float64).masked_scatter(counted, term(view, None))
    torch.testing.assert_close(loss_of(term, parts), each.sum(1) / counted.sum(1))


@pytest.mark.parametrize("term", [t for t in RESPONSE if not isinstance(t, DIST)], ids=lambda t: t.term)
def test_a_sample_without_any_label_has_no_loss(term: Term) -> None:
    labels = LABELS.clone()
    labels[1] = -100
    loss = loss_of(term, parts_of(), labels)
    assert float(loss[1]) == 0 and float(loss[2]) != 0


def test_attention_counts_the_queries_that_have_labels() -> None:
    maps = [draw(seed, TOKENS)[:, None].softmax(-1) for seed in (4, 5)]
    for distance in ("kl", "mse"):
        term = AttentionMaps(**P, distance=distance)
        found = []
        for garbage in (False, True):
            s, t = (m.clone() for m in maps)
            if garbage:
                s[:, 0][LABELS == -100] = draw(6, TOKENS).softmax(-1)[LABELS == -100]
            found.append(term(View(None, None, LABELS, {"p": s}, {"p": t}, TASK), None))
        torch.testing.assert_close(*found)
        whole = term(View(None, None, None, {"p": maps[0]}, {"p": maps[1]}, TASK), None)
        torch.testing.assert_close(found[0][2], whole[2])  # all of its tokens have one
        assert float((found[0] - whole)[:2].abs().min()) > 1e-4


def test_gates_look_at_labelled_tokens() -> None:
    parts = parts_of()
    garbage = {k: v.clone() for k, v in parts.items()}
    for v in garbage.values():
        v[LABELS == -100] = 50.0
    for gate in (teacher_right, teacher_confidence, student_doubt):
        views = [View(p["zs"], p["zt"], LABELS, {}, {}, TASK) for p in (parts, garbage)]
        torch.testing.assert_close(gate(views[0]), gate(views[1]))


def test_pixels_and_samples_without_a_label_are_still_taught() -> None:
    """A label that is missing there is no padding: a teacher can say what nobody labelled."""
    s, t = draw(0, CLASSES), draw(1, CLASSES)
    flat = View(s[:, 0], t[:, 0], torch.tensor([1, -100, 2]), {}, {}, TASK)
    assert float(KLDivergence()(flat, None).min()) > 0
    images = [z[:, :, None].repeat(1, 1, 2, 1) for z in (s, t)]
    labels = torch.full((BATCH, TOKENS, 2), -100)
    assert float(KLDivergence()(View(*images, labels, {}, {}, TASK), None).min()) > 0


# ---- policy


def log_softmax(z: Any) -> Any:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_minillm_is_what_its_section_2_2_adds_up(share: float, decomposed: bool, normalised: bool) -> None:
    """Token by token, in numpy."""
    parts = parts_of()
    log_s, log_t = (log_softmax(parts[k].numpy()) for k in ("zs", "zt"))
    gamma, want = 0.9, []
    for b in range(BATCH):
        places = [i for i in range(TOKENS) if LABELS[b, i] != -100]
        total = 0.0
        for n, i in enumerate(places):
            y = int(LABELS[b, i])
            later = places[n + 1 :] if decomposed else places[n:]
            powers = gamma ** np.arange(len(later))
            gains = np.array([log_t[b, j, LABELS[b, j]] - log_s[b, j, LABELS[b, j]] for j in later])
            value = float((powers * gains).sum())
            if normalised:
                value /= max(1.0, powers.sum())
            p, q = np.exp(log_t[b, i, y]), np.exp(log_s[b, i, y])
            weight = q / ((1 - share) * q + share * p)
            divergence = float((np.exp(log_s[b, i]) * (log_s[b, i] - log_t[b, i])).sum()) if decomposed else 0.0
            total += weight * (divergence - value * log_s[b, i, y])
        want.append(total / len(places))
    term = MiniLLM(single_step_decomposition=decomposed, length_normalization=normalised, gamma=gamma)
    view = View(parts["zs"], parts["zt"], LABELS, {}, {}, TASK, teacher_share=share)
    torch.testing.assert_close(term(view, None), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("decomposed", [True, False])
def test_the_gradient_of_minillm_is_that_of_the_divergence_of_whole_answers(decomposed: bool) -> None:
    """Over all answers of two tokens of three, weighed by what the student writes (their section 2.1).

    Its second token depends on the first by a table, so that a policy has something to look ahead to.
    """
    g = torch.Generator().manual_seed(3)
    first = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_()
    second = torch.randn(3, 3, generator=g, dtype=torch.float64).requires_grad_()
    teacher = [torch.randn(3, generator=g, dtype=torch.float64), torch.randn(3, 3, generator=g, dtype=torch.float64)]

    def whole(a: Tensor, b: Tensor) -> Tensor:
        return (a.log_softmax(0)[:, None] + b.log_softmax(1)).flatten()

    student, wanted = whole(first, second), whole(*teacher)
    divergence = (student.exp() * (student - wanted)).sum()
    want = torch.autograd.grad(divergence, (first, second))
    answers = torch.tensor([[a, b] for a in range(3) for b in range(3)])
    logits = torch.stack([first.expand(9, 3), second[answers[:, 0]]], 1)
    taught = torch.stack([teacher[0].expand(9, 3), teacher[1][answers[:, 0]]], 1)
    term = MiniLLM(single_step_decomposition=decomposed, length_normalization=False)
    losses = term(View(logits, taught, answers, {}, {}, TASK, teacher_share=0.0), None)
    found = torch.autograd.grad((student.detach().exp() * 2 * losses).sum(), (first, second))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_minillm_on_answers_of_others_is_the_reverse_divergence() -> None:
    parts = parts_of()
    view = View(parts["zs"], parts["zt"], LABELS, {}, {}, TASK)
    torch.testing.assert_close(MiniLLM()(view, None), ReverseKL()(view, None))
    assert not torch.allclose(MiniLLM()(replace(view, teacher_share=0.0), None), ReverseKL()(view, None))


def test_the_generalised_divergence_of_gkd_in_numbers() -> None:
    """TRL's `generalized_jsd_loss` in numpy, over labelled tokens."""
    parts = parts_of()
    log_s, log_t = (log_softmax(parts[k].numpy()) for k in ("zs", "zt"))
    for beta in (0.1, 0.5, 0.9):
        m = np.log(beta * np.exp(log_t) + (1 - beta) * np.exp(log_s))
        each = beta * (np.exp(log_t) * (log_t - m)).sum(-1) + (1 - beta) * (np.exp(log_s) * (log_s - m)).sum(-1)
        counted = (LABELS != -100).numpy()
        want = (each * counted).sum(1) / counted.sum(1)
        found = JSD(beta=beta)(View(parts["zs"], parts["zt"], LABELS, {}, {}, TASK), None)
        np.testing.assert_allclose(found.numpy(), want, atol=1e-12)
