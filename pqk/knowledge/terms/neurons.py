"""Task neurons: of a feature wider than the student's, the units on which the teacher's answer depends most.

A unit's score is the mean over samples of |Σ_positions activation · ∂ top logit / ∂ activation|: the first-order change
of the answer when the unit is removed. That makes it a pruning criterion as well (Molchanov et al. 2017, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pqk.core.modes import evaluating
from pqk.data.structures import Inputs, first_tensor, widened
from pqk.errors import InputError
from pqk.knowledge.taps import tap
from pqk.knowledge.terms.base import Place, View
from pqk.knowledge.terms.feature import FeatureTerm, Slice, channel_axis
from pqk.settings import settings


def neuron_scores(model: nn.Module, point: str, batches: Iterable[Inputs], class_axis: int = -1) -> Tensor:
    """Scores every channel of a feature by how much the model's answer changes when it is removed.

    The mean over samples of |Σ_positions activation · ∂ top logit / ∂ activation| (Molchanov et al., ICLR 2017,
    arXiv:1611.06440, section 2.2). The model is run in eval mode and left as it was.

    Args:
        model: its first output is logits [B, …, C].
        point: path of the module whose output is scored.
        batches: model inputs, a tuple of tensors [B, …] each.
        class_axis: the axis of the logits that classes are on, such as 1 for [B, C, H, W].

    Returns:
        Scores [channels], at least 0, in float32 or float64 as the feature.

    Raises:
        InputError: there is no such module, the answer does not depend on its output, or there are no samples.
    """
    tapped, total, samples = tap(model, [point]), None, 0
    with evaluating(model):
        for inputs in batches:
            score = _scores(tapped, point, inputs, class_axis)
            total = score if total is None else total + score
            samples += len(inputs[0])
    if total is None:
        raise InputError(f'task neurons at "{point}": there are no samples to score them on')
    return total / samples


def _scores(tapped: nn.Module, point: str, inputs: Inputs, class_axis: int) -> Tensor:
    """The scores of one batch, summed over its samples."""
    # A frozen model records nothing unless its inputs do; token numbers cannot, so the first weights do it for them.
    frozen = [p for p in tapped.parameters() if p.is_floating_point() and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            outputs, features = tapped(*inputs)
            answer, feature = widened(first_tensor(outputs)).amax(class_axis).sum(), features[point]
            (gradient,) = torch.autograd.grad(answer, feature, allow_unused=True, retain_graph=True)
            if gradient is None and feature.grad_fn is not None and "Clone" in feature.grad_fn.name():
                # The copy of what is written over later; the answer depends on its original.
                original = torch.autograd.graph.GradientEdge(*feature.grad_fn.next_functions[0])
                (gradient,) = torch.autograd.grad(answer, original, allow_unused=True)
    finally:
        for p in frozen:
            p.requires_grad_(False)
    if gradient is None:
        raise InputError(f'task neurons at "{point}": the model\'s answer does not depend on its output')
    change = widened(gradient * feature).detach().movedim(channel_axis(feature), 1)
    return change.flatten(2).sum(2).abs().sum(0) if change.dim() > 2 else change.abs().sum(0)


@settings
class TaskNeurons(FeatureTerm):
    """mean_i (1 − ρ_i)², ρ_i the correlation of the student's unit i with the teacher's i-th task neuron.

    Saadi & Wang, Flex-KD, arXiv:2507.10155, section 3. Task neurons are the teacher's units with the largest gradient ×
    activation, as many as the student has, in their own order. Features are [B, C, H, W], [B, N, D] or [B, D];
    correlations are over the batch and its positions: the same for every sample.
    """

    term: Literal["task_neurons"] = "task_neurons"
    samples: int = Field(default=256, ge=2)
    """validation samples on which the teacher's units are scored"""

    def projector(self, place: Place) -> nn.Module | None:
        width, teacher_width = (f.shape[channel_axis(f)] for f in (place.student, place.teacher))
        if width > teacher_width:
            raise InputError(f"{self.called}: the student has more units than the teacher ({place})")
        if place.teacher_model is None:
            raise InputError(f"{self.called}: the teacher is a black box, and its units cannot be scored")
        with evaluating(place.teacher_model), torch.no_grad():
            answer = first_tensor(place.teacher_model(*place.task.example))
        axis = -1 if answer.dim() <= 2 else place.task.class_axis_of(answer)
        samples = place.task.calibration(self.samples, teacher=True)
        scores = neuron_scores(place.teacher_model, self.points()[1], samples, axis)
        return Slice(scores.topk(width).indices.sort().values.tolist())

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        s, t = self.features(view, projector)
        self.same_shape(s, t)
        weights, axis = self.position_weights(view, s), channel_axis(s)
        s, t = (f.movedim(axis, -1).flatten(0, -2) for f in (s, t))
        w = None if weights is None else weights.reshape(-1, 1).to(s.dtype)
        return _uncorrelated(s, t, w).square().mean().expand(len(view.student_features[self.point]))


def _uncorrelated(s: Tensor, t: Tensor, weights: Tensor | None) -> Tensor:
    """1 − Pearson's correlation of the columns of [samples, C], weighted; 0 where the teacher's is constant."""
    if weights is None:
        weights = torch.ones_like(s[:, :1])
    share = weights / weights.sum().clamp_min(1e-6)
    s, t = (x - (share * x).sum(0) for x in (s, t))
    norms = [torch.linalg.vector_norm(share.sqrt() * x, dim=0) for x in (s, t)]
    size = norms[0] * norms[1]
    loss = (size - (share * s * t).sum(0)) / (size + 1e-8)
    return torch.where(norms[1] > 1e-6, loss, torch.zeros_like(loss))
