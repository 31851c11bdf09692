"""SmoothQuant: the float network stays what it is, the quantized one hears more; what cannot be smoothed says why."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.passes.capture.capture import capture
from pqk.passes.quantize.quantize import Quantize
from pqk.passes.quantize.smoothing import find_pairs, smooth
from pqk.target.target import Target

WIDTH, LOUD = 16, 5


class Layer(nn.Module):
    """An encoder's layer, its norms before (pre) or behind the residual additions; one channel of a norm is loud."""

    def __init__(self, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():
            for norm in (self.first, self.second):
                norm.weight[LOUD] = 60.0
            for reader in (self.q, self.k, self.v, self.up):
                reader.weight[:, LOUD] /= 60.0
            self.v.weight[3] *= 40.0
            self.out.weight[:, 3] /= 40.0

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attend(self.first(x))
            return x + self.down(F.gelu(self.up(self.second(x))))
        x = self.first(x + self.attend(x))
        return self.second(x + self.down(F.gelu(self.up(x))))


class Inputs:
    """As much of a task as quantize reads."""

    generates = False

    def __init__(self, x: Tensor) -> None:
        self.x, self.example = x, (x[:2],)

    def calibration(self, limit: int) -> Iterator[tuple[Tensor, ...]]:
        yield (self.x[:limit],)


def inputs() -> Tensor:
    return torch.randn(32, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def layer(pre: bool) -> Layer:
    torch.manual_seed(0)
    return Layer(pre).eval()


def decibels(want: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def test_the_float_network_stays_and_the_quantized_one_hears_more() -> None:
    x, model = inputs(), layer(pre=True)
    graph = capture(copy.deepcopy(model), (x[:2],))
    with torch.no_grad():
        want = model(x)
        student = copy.deepcopy(graph)
        done, declined = smooth(student, [(x,)], 0.5)
        assert done == ["q", "k", "v", "out", "up"] and declined == []
        torch.testing.assert_close(student(x), graph(x), rtol=0, atol=1e-6)
        heard = []
        for alpha in (None, 0.5):
            program = Program(model, copy.deepcopy(graph), Stage.GRAPH, Target.named("x86-vnni"), RunContext())
            config = Quantize(calibration="minmax", samples=32, smooth=alpha)
            heard.append(decibels(want, config.apply(program, Inputs(x)).student(x)))  # type: ignore[arg-type]
    assert heard[1] > heard[0] + 6, heard


@pytest.mark.slow
def test_what_the_residual_stream_reads_is_not_smoothed() -> None:
    x, model = inputs(), layer(pre=False)
    graph = capture(copy.deepcopy(model), (x[:2],))
    pairs, declined = find_pairs(graph)
    assert [(p.source.meta["layer"], [r.meta["layer"] for r in p.readers]) for p in pairs] == [("v", ["out"])]
    assert declined == [("first", "not smoothed: add reads its output as well")]
    program = Program(model, graph, Stage.GRAPH, Target.named("x86-vnni"), RunContext())
    program = Quantize(samples=32, smooth=0.5).apply(program, Inputs(x))  # type: ignore[arg-type]
    assert program.details["smoothed"] == ["out"]
    assert any(d.layer == "first" and "not smoothed" in d.reason for d in program.declined)


def test_shared_parameters_are_not_smoothed() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(self.a(self.norm(x))))

    graph = capture(Shared().eval(), (inputs()[:2],))
    pairs, declined = find_pairs(graph)
    assert pairs == [] and all("shared" in why for _, why in declined) and len(declined) == 2


def test_alpha_is_a_share() -> None:
    with pytest.raises(ValueError, match="smooth"):
        Quantize(smooth=1.5)
