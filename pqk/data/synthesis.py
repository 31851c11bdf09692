"""Data that a teacher makes: labels for inputs that have none, and inputs out of nothing.

`pseudo_labels` keeps the samples that the teacher is sure of. `synthesize` draws inputs whose statistics in every
batch norm are those that the teacher remembers of its training data (DeepInversion, Yin et al., CVPR 2020, arXiv
1912.08795), for compiling without data: for calibration, and for distillation. Both give `ArrayData`, for a `Task`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk.copies import copy_of
from pqk.data.data import ArrayData, Data
from pqk.data.structures import Inputs, concatenate, first_tensor, widened
from pqk.errors import InputError
from pqk.settings import CONFIG, in_words

# ---- labels


class Labelled(NamedTuple):
    """`data` with the teacher's labels, and how many of all samples it is sure enough of to be there."""

    data: ArrayData
    kept: int
    samples: int

    def __str__(self) -> str:
        return f"{self.kept} of {self.samples} unlabelled samples carry the teacher's label"


@torch.no_grad()
def pseudo_labels(
    teacher: nn.Module, data: Data, confidence: float = 0.9, *, batch_size: int | None = None
) -> Labelled:
    """Labels data with the teacher's classes, and keeps the samples that it is sure of (Lee 2013, "Pseudo-Label").

    Labels that the data has are ignored. Augmentation, its views and ids stay those of `ArrayData`; of other data,
    inputs are collected in the stored order, and sequences of several lengths padded with zeros.

    Args:
        teacher: its first output is logits [B, C].
        data: the samples.
        confidence: the least top probability of a sample that is kept, 0 to 1.
        batch_size: of the result; None: that of `data`.

    Returns:
        The samples that are kept, with labels int64 [N], as `data`; and how many of how many they are.

    Raises:
        InputError: `confidence` is outside 0 to 1, the answers are no finite logits [B, C], or no sample is kept.
    """
    if not 0 <= confidence <= 1:  # NaN too
        raise InputError(f"pseudo-labels: confidence={confidence} must be a probability, from 0 to 1")
    tops, labels, inputs = [], [], []
    model = copy_of(teacher).eval()
    for batch in data.batches():
        top, label = _logits(model, batch.for_teacher().inputs).softmax(-1).max(-1)
        tops.append(top)
        labels.append(label)
        inputs.append(batch.inputs)
    top, label = torch.cat(tops), torch.cat(labels)
    sure = top >= confidence
    kept = int(sure.sum())
    if not kept:
        raise InputError(
            f"pseudo-labels: of {len(sure)} samples none is kept at confidence={confidence}; the teacher's highest "
            f"top probability is {float(top.max()):.3f}"
        )
    if isinstance(data, ArrayData):
        everywhere = label.new_zeros(len(data.inputs[0])).index_copy(0, data.ids, label)
        some = data.with_targets(everywhere).subset(data.ids[sure], augmented=True)
        some.batch_size = batch_size or data.batch_size
    else:
        whole = tuple(t[sure] for t in concatenate(inputs))
        some = ArrayData(whole, label[sure], batch_size or len(inputs[0][0]))
    return Labelled(some, kept, len(sure))


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """[B, C] in float32 at least. Raises `InputError` for anything else, and where they are not finite."""
    logits = widened(first_tensor(model(*inputs)))
    if logits.dim() != 2 or logits.shape[1] < 2 or not bool(logits.isfinite().all()):
        raise InputError(f"teacher: its first output {tuple(logits.shape)} is not finite logits [B, classes]")
    return logits


# ---- inputs


@in_words
@dataclass(frozen=True, config=CONFIG)
class Prior:
    """How much each part of DeepInversion's loss counts; its authors' values for CIFAR-10.

    Yin et al., CVPR 2020, arXiv:1912.08795, section 4.1.

    Raises:
        InputError: a weight is negative or not finite.
    """

    classes: float = 1.0
    """cross-entropy towards a class that is drawn for each sample (equation 1)"""
    statistics: float = 10.0
    """distance to the batch norms' statistics, alpha_f (equation 4)"""
    variation: float = 2.5e-5
    """total variation between neighbours along all axes but the first two, alpha_tv (equation 2)"""
    energy: float = 3e-8
    """size of the inputs, alpha_l2 (equation 2)"""

    def __post_init__(self) -> None:
        if not all(0 <= w < math.inf for w in (self.classes, self.statistics, self.variation, self.energy)):
            raise InputError(f"synthesis: {self}: every weight must be finite and at least 0")


def synthesize(
    teacher: nn.Module,
    example: Tensor | Inputs,
    samples: int = 512,
    steps: int = 300,
    seed: int = 0,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    prior: Prior | None = None,
) -> ArrayData:
    """Makes inputs like those that a teacher was trained on, with its labels; the same for the same seed.

    DeepInversion: Yin et al., CVPR 2020, arXiv:1912.08795. Every batch starts as noise and takes `steps` steps of Adam
    towards the statistics that the teacher's batch norms remember. Classes are drawn evenly; the label is what the
    teacher makes of the result.

    Args:
        teacher: a module with batch norm, one float input and logits [B, C] as first output.
        example: an input of its shape, float [B, …].
        samples: how many to make, at least 2.
        steps: of Adam, for each batch.
        seed: of the noise and the classes.
        batch_size: samples that are made together, at least 2: they have the statistics together.
        learning_rate: of Adam.
        prior: weights of the loss's parts; None: those of the authors for CIFAR-10.

    Returns:
        Inputs float32 [samples, …] with labels int64 [samples].

    Raises:
        InputError: the teacher has no batch norm, which remembers nothing of its data, or other outputs than finite
            logits; the example is not one float tensor; a number is out of range; or the inputs do not stay finite.
    """
    (shape,) = [tuple(t.shape) for t in _one_float(example)]
    if samples < 2 or steps < 1 or batch_size < 2 or not 0 < learning_rate < math.inf:
        raise InputError(
            f"synthesis: samples={samples} and batch_size={batch_size} must be at least 2, steps={steps} at least 1, "
            f"learning_rate={learning_rate} above 0"
        )
    model, prior = copy_of(teacher).eval().requires_grad_(False), prior or Prior()
    _norms(model)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in torch.arange(samples).chunk(-(-samples // batch_size)):  # of like sizes: a batch has its statistics
        x = torch.randn(len(part), *shape[1:], generator=generator)
        parts.append(_inverted(model, x, prior, steps, learning_rate, generator))
    inputs = torch.cat(parts)
    with torch.no_grad():
        labels = torch.cat([_logits(model, (x,)).argmax(-1) for x in inputs.split(batch_size)])
    return ArrayData(inputs, labels, batch_size)


@torch.enable_grad()
def _inverted(
    model: nn.Module, x: Tensor, prior: Prior, steps: int, learning_rate: float, generator: torch.Generator
) -> Tensor:
    """Inputs [B, …] after `steps` steps of Adam on equation 3."""
    x = x.requires_grad_(True)
    with torch.no_grad():
        classes = _logits(model, (x,)).shape[1]
    labels = torch.randperm(max(len(x), classes), generator=generator)[: len(x)] % classes
    optimizer = torch.optim.Adam([x], learning_rate, betas=(0.5, 0.9))  # the betas of the authors' code
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with _statistics_distances(model) as distances:
            loss = prior.classes * F.cross_entropy(_logits(model, (x,)), labels)
        loss = loss + prior.statistics * torch.stack(distances).sum()
        loss = loss + prior.variation * _variation(x) + prior.energy * x.square().sum().sqrt()
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        schedule.step()
    if not bool(x.isfinite().all()):
        raise InputError(f"synthesis: the inputs are not finite after {steps} steps; lower learning_rate")
    return x.detach()


@torch.no_grad()
def statistics_gap(teacher: nn.Module, inputs: Tensor) -> float:
    """R_feature of a batch [B, …]: the distance of its batch-norm statistics from the remembered ones, over layers."""
    model = copy_of(teacher).eval()
    with _statistics_distances(model) as distances:
        model(inputs)
    return float(torch.stack(distances).sum())


@contextmanager
def _statistics_distances(model: nn.Module) -> Iterator[list[Tensor]]:
    """‖μ(x) − μ‖₂ + ‖σ²(x) − σ²‖₂ of what each batch norm is given, in the order of the calls (equation 4)."""
    distances: list[Tensor] = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        channels = inputs[0].transpose(0, 1).flatten(1)
        mean, variance = channels.mean(1), channels.var(1, correction=0)
        distances.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())

    handles = [norm.register_forward_pre_hook(note) for norm in _norms(model)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that remember. Raises `InputError` where there are none."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        others = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
        raise InputError(
            "synthesis: the teacher has no batch norm with running statistics"
            + (f" (it has {', '.join(others)})" if others else "")
            + ", so nothing in it says what its inputs were; pass unlabelled inputs and use pseudo_labels"
        )
    return norms


def _variation(x: Tensor) -> Tensor:
    """√Σ of squared differences of neighbours, for each of the axes beyond [B, C]; 0 where there are none."""
    axes = range(2, x.dim())
    return sum((x.diff(dim=a).square().sum().clamp_min(1e-12).sqrt() for a in axes), x.new_zeros(()))


def _one_float(example: Tensor | Inputs) -> Inputs:
    inputs = example if isinstance(example, tuple) else (example,)
    if len(inputs) != 1 or not inputs[0].is_floating_point():
        kinds = [f"{tuple(t.shape)} {t.dtype}" for t in inputs]
        raise InputError(f"synthesis: inputs are found by gradient, for one float tensor; the example is {kinds}")
    return inputs
