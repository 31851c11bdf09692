"""The best layer of low rank on data, from the second moments of a layer's responses.

A layer answers its inputs with responses y = W x + b (for a convolution x is the patch under the kernel). Of all affine
maps of rank r, M x + c, that with the least mean of |y - M x - c|² is

    M = P W,   c = P b + (I - P) E[y],   P = U U',   U the r first eigenvectors of Cov(y)

and that mean is the sum of the other eigenvalues (Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks for
Classification and Detection", arXiv:1505.06798, section 3.1). It is what whitening the inputs leads to: with S the
Cholesky factor of Cov(x), the singular values of W S, cut off after r (Wang et al. 2024, "SVD-LLM", arXiv:2403.07378,
section 3.1; Chen et al. 2021, "DRONE", NeurIPS), have U as their left vectors, since W S S' W' = Cov(y), and their
squares are its eigenvalues. Nothing is inverted this way, so inputs that never vary do no harm, a kernel's patches need
not be laid out, and at full rank P is I: the layer is what it was, on any input.

The two halves are U' W and U, where any scale may be moved from one side to the other, channel by channel. They are
quantized later, with one step for the values between them and one for each row of a weight. With the channel of size s
made one of size s^a, rounding those values costs (max s^2a) Σ s^(2-2a) and rounding the rows of the second weight
(max s^(2-2a)) Σ s^2a, whose sum is least at a = 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pqk.data.structures import Inputs
from pqk.passes.prune.low_rank import LowRank, WeightedLayer, empty_halves, weighted_layer

ROWS = 1 << 16
"""responses of one call that are looked at, at most: a convolution answers thousands of patches a sample"""
AT_ONCE = 1 << 28
"""bytes of moments that are held at once"""


@dataclass
class Responses:
    """What a layer answered: the count of responses, their sum [C], and that of their products [C, C], in float64."""

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def none(cls, channels: int) -> Responses:
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, channels, dtype=torch.float64))

    def add(self, responses: Tensor) -> None:
        """Takes in more of them, [N, C]."""
        rows = responses[:: -(-len(responses) // ROWS) or 1].cpu().double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        return self.products / self.count - torch.outer(self.mean, self.mean)


@torch.no_grad()
def responses_of(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Inputs], at_once: int = AT_ONCE
) -> dict[str, Responses]:
    """The responses of `layers` of a model in eval mode, without their biases; a layer never called has count 0.

    The data is run over again for every `at_once` bytes of moments.
    """
    inputs = list(batches)
    found: dict[str, Responses] = {}
    for some in _portions(model, layers, at_once):
        own = {path: Responses.none(weighted_layer(model, path).weight.shape[0]) for path in some}
        handles = [model.get_submodule(path).register_forward_hook(_observer(own[path])) for path in some]
        try:
            for batch in inputs:
                model(*batch)
        finally:
            for handle in handles:
                handle.remove()
        found |= own
    return found


def _portions(model: nn.Module, layers: Sequence[str], at_once: int) -> list[list[str]]:
    """The layers in portions whose moments fit into `at_once` bytes, or that are one layer."""
    portions: list[list[str]] = []
    free = 0
    for path in layers:
        needed = 8 * weighted_layer(model, path).weight.shape[0] ** 2
        if needed > free:
            portions.append([])
            free = at_once
        portions[-1].append(path)
        free -= needed
    return portions


def _observer(responses: Responses) -> Callable[[WeightedLayer, tuple[Tensor, ...], Tensor], None]:
    def observe(layer: WeightedLayer, args: tuple[Tensor, ...], output: Tensor) -> None:
        axis = -1 if isinstance(layer, nn.Linear) else -layer.weight.ndim + 1
        rows = output.detach().movedim(axis, -1).flatten(0, -2)
        responses.add(rows if layer.bias is None else rows - layer.bias)

    return observe


@dataclass(frozen=True)
class Spectrum:
    """The principal responses of a layer: what of them any rank keeps, and the halves of that rank."""

    mean: Tensor
    """E[W x], [C]"""
    variances: Tensor
    """the eigenvalues of their covariance, falling, [C]"""
    directions: Tensor
    """its eigenvectors in columns, [C, C]"""

    @classmethod
    def of(cls, responses: Responses) -> Spectrum:
        variances, directions = torch.linalg.eigh(responses.covariance)
        return cls(responses.mean, variances.flip(0).clamp_min(0), directions.flip(1))

    def error(self, rank: int) -> float:
        """The mean squared distance of the best layer of this rank from the layer's responses."""
        return float(self.variances[rank:].sum())

    @torch.no_grad()
    def halves(self, layer: WeightedLayer, rank: int) -> LowRank:
        """The best two layers with `rank` channels between them in the place of `layer`, which stays as it is."""
        directions = self.directions[:, :rank]
        sizes = (self.variances[:rank] + (directions.T @ self.mean).square()).sqrt()
        scales = sizes.clamp_min(1e-6 * float(sizes.max().clamp_min(1e-30))).sqrt()
        halves, weight = empty_halves(layer, rank), layer.weight.detach().cpu().double()
        reduce, expand = halves.reduce, halves.expand
        reduce.weight.copy_((directions.T @ weight.flatten(1) / scales[:, None]).view(reduce.weight.shape))
        expand.weight.copy_((directions * scales).view(expand.weight.shape))
        bias = self.mean - directions @ (directions.T @ self.mean)
        assert expand.bias is not None
        expand.bias.copy_(bias if layer.bias is None else bias + layer.bias.detach().cpu().double())
        return halves


def spectra(model: nn.Module, layers: Sequence[str], batches: Iterable[Inputs]) -> Mapping[str, Spectrum]:
    """The spectrum of each of these layers that the model calls on the data."""
    return {path: Spectrum.of(r) for path, r in responses_of(model, layers, batches).items() if r.count}
