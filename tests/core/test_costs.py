"""What a network costs on paper, beside what a person counts by hand: eval mode, one sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk import Task
from pqk.core.costs import count_macs, why_not_counted
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.models.resnet import resnet20
from pqk.passes import Prune
from pqk.target.target import Target

T, D, H, FF, B = 5, 8, 6, 16, 2
"""tokens, width, state, hidden width of an encoder layer, batch"""


class Returned(nn.Module):
    """A recurrent layer or attention, whose first output is the network's."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(*(x,) * self.times)[0]
        return result


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(D, D, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x, x)
        return result


def encoder(layers: int) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, FF, batch_first=True), layers)


def attends() -> nn.Module:
    return nn.MultiheadAttention(D, 2, batch_first=True)


class Handing(nn.Module):
    """Hands a view of a parameter of its own to a layer, as class tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, T, D)), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.token.expand(len(x), -1, -1)) + self.layer(x)


TOKENS, VECTOR, IMAGE = (B, T, D), (B, D), (B, 3, 8, 8)
ATTENTION = 4 * T * D * D + 2 * T * T * D
"""four projections, the product of queries and keys, and that of shares and values"""
KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(D, 3), TOKENS, T * D * 3),
    "linear of a view of a parameter": (Handing, TOKENS, 2 * T * D * 3),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), IMAGE, 6 * 6 * 4 * 3 * 3 * 3),
    "grouped convolution": (lambda: nn.Conv2d(3, 6, 3, groups=3), IMAGE, 6 * 6 * 6 * 3 * 3),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE, 8 * 8 * 3 * 4 * 3 * 3),
    "matmul": (lambda: Function(lambda x: x @ x.mT), TOKENS, T * T * D),
    "einsum": (lambda: Function(lambda x: torch.einsum("btd,bsd->bts", x, x)), TOKENS, T * T * D),
    "matrix by vector": (lambda: Function(lambda x: x @ torch.ones(D)), TOKENS, T * D),
    "added product": (lambda: Function(lambda x: torch.addmv(torch.ones(B), x, torch.ones(D))), VECTOR, D),
    "bilinear": (Pair, VECTOR, 3 * D * (D + 1)),
    "sdpa": (lambda: Function(lambda x: F.scaled_dot_product_attention(x, x, x)), (B, 2, T, D), 2 * 2 * T * T * D),
    "attention": (lambda: Returned(attends(), 3), TOKENS, ATTENTION),
    "encoder": (lambda: encoder(2), TOKENS, 2 * (ATTENTION + 2 * T * D * FF)),
    "LSTM": (lambda: Returned(nn.LSTM(D, H, batch_first=True)), TOKENS, T * 4 * H * (D + H)),
    "GRU": (lambda: Returned(nn.GRU(D, H, batch_first=True)), TOKENS, T * 3 * H * (D + H)),
    "RNN": (lambda: Returned(nn.RNN(D, H, batch_first=True)), TOKENS, T * H * (D + H)),
    "LSTM, two layers, both ways": (
        lambda: Returned(nn.LSTM(D, H, num_layers=2, bidirectional=True, batch_first=True)),
        TOKENS,
        2 * T * 4 * H * (D + H) + 2 * T * 4 * H * (2 * H + H),
    ),
    "LSTM cell": (lambda: Returned(nn.LSTMCell(D, H)), VECTOR, 4 * H * (D + H)),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", KNOWN)
def test_known_counts(name: str, frozen: bool) -> None:
    """A frozen network in eval mode is what torch runs by operators of its own."""
    make, size, macs = KNOWN[name]
    module = make().requires_grad_(not frozen)
    seen = count_macs(module, (torch.randn(size),))
    assert seen == macs and {p.requires_grad for p in module.parameters()} <= {not frozen}
    assert why_not_counted(module, (torch.randn(size),)) is None


def test_the_fused_layers_are_what_they_were() -> None:
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            count_macs(encoder(1), (torch.randn(TOKENS),))
            assert torch.backends.mha.get_fastpath_enabled() is enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


@torch.library.custom_op("pqktest::hidden_product", mutates_args=())
def hidden_product(x: Tensor, weight: Tensor) -> Tensor:
    """What a library of its own computes: a product that no counter sees."""
    return x @ weight


class Hidden(nn.Module):
    """Its matrices multiply in an operator of their own; `beside`, in one that is counted."""

    def __init__(self, beside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.head = nn.Linear(D, beside)
        self.table = nn.Parameter(torch.randn(4, D))
        self.embedding = nn.Embedding(1000, D)

    def forward(self, x: Tensor) -> Tensor:
        x = hidden_product(x, self.weight) + self.table[x[:, 0].long() * 0] + self.embedding(x[:, 1].long() * 0)
        result: Tensor = self.head(x)
        return result


def test_an_operator_that_is_not_counted_is_named() -> None:
    x = torch.rand(B, D)
    said = why_not_counted(Hidden(1), (x,))
    assert said is not None and "pqktest.hidden_product" in said and f"of {D * D} values" in said
    assert "embedding" not in said and "index" not in said
    assert why_not_counted(Hidden(80), (x,)) is None, "640 MACs are counted beside 64 values"


def test_committed_results_are_counted_as_they_were() -> None:
    assert count_macs(resnet20(), (torch.randn(B, 3, 32, 32),)) == 40_551_040, "models/results/resnet20_cifar10.json"


def test_a_budget_in_macs_that_cannot_be_counted_is_refused() -> None:
    teacher, x = Hidden(1).eval().requires_grad_(False), torch.rand(8, D)
    part = ArrayData(x, torch.zeros(8, 1), 4)
    task = Task(train=part, evaluation=part, validation=part, loss=lambda outputs, y: ((outputs - y) ** 2).mean(1))
    program = Program(teacher, teacher, Stage.MODULE, Target.named("x86-avx2"), RunContext())
    with pytest.raises(InputError, match=r"macs_ratio = 1.5: .*pqktest\.hidden_product.*parameters_ratio"):
        Prune(macs_ratio=1.5).apply(program, task)
