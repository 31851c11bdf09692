"""Products of integers in training: the numbers of the float products, and their gradients."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pqk.core.aten import aten
from pqk.passes.capture.capture import capture
from pqk.passes.quantize.placement import placement
from pqk.passes.quantize.quantize import calibrate, insert_fake_quant
from pqk.quant.fake_quant import set_mode
from pqk.target.target import Target, cpu_flags
from pqk.training import integer_form as module
from pqk.training.integer_form import IntegerProduct, integer_form, why_not_in_integers
from tests.support.lowered import Inputs

CPU = torch.device("cpu")
here = pytest.mark.skipif("avx2" not in cpu_flags(), reason="integer kernels need x86 with AVX2")


class Pooled(nn.Module):
    """A layer behind a pool and a pad, which move values that stay on their grid."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.pad(F.max_pool2d(x, 2), (1, 1, 1, 1)))


LAYERS = {
    "convolution": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 9, 9)),
    "without a bias, in steps": (lambda: nn.Conv2d(6, 8, (3, 1), stride=(2, 1), dilation=2, bias=False), (6, 9, 9)),
    "moved": (Pooled, (6, 12, 12)),
    "linear": (lambda: nn.Linear(12, 7), (40, 12)),
    "linear without a bias": (lambda: nn.Linear(600, 7, bias=False), (600,)),
}


def fake_quantized(layer: nn.Module, x: Tensor, target: str = "x86-avx2") -> fx.GraphModule:
    graph, chosen = capture(layer.eval(), (x[:2],)), Target.named(target)
    assert isinstance(graph, fx.GraphModule)
    points = [point.to_json() for point in placement(graph)[0]]
    grids = {"activation": asdict(chosen.activation), "weight": asdict(chosen.weight)}
    fake = insert_fake_quant(graph, (x[:2],), points=points, learned=True, **grids)
    assert isinstance(fake, fx.GraphModule)
    calibrate(fake, Inputs(x), "mse", 99.99, len(x))  # type: ignore[arg-type]
    return fake


def products(form: nn.Module) -> list[IntegerProduct]:
    return [m for m in form.modules() if isinstance(m, IntegerProduct)]


@here
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("target", ["x86-avx2", "arm-dotprod"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_product_and_its_gradients_are_those_of_floats(
    name: str, target: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32's rounding: outputs, and the gradients of input, weight, bias and step sizes."""
    if target != "x86-avx2" and not cpu_flags() & {"avx512_vnni", "avx_vnni"}:
        pytest.skip("weights of 8 bits saturate on this CPU")
    torch.manual_seed(0)
    make, sizes = LAYERS[name]
    x = torch.randn(520, *sizes) + 0.3
    floats = fake_quantized(make(), x, target)
    integers = copy.deepcopy(floats)
    form = integer_form(integers, CPU)
    assert len(products(form)) == 1 and form is not integers
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    called = []
    kind = module.IntegerLinear if "linear" in name else module.IntegerConvolution
    monkeypatch.setattr(kind, "apply", lambda *args, apply=kind.apply: called.append(1) or apply(*args))
    results = []
    for student in (floats, form):
        own = x.clone().requires_grad_()
        y = student(own)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), own.grad))
    assert called
    for want, found in zip(*results, strict=True):
        off = (want - found).abs() > 1e-5 * want.abs().max()  # a near tie of the output's own quantizer
        assert off.float().mean() < 1e-3
    mine = dict(integers.named_parameters())
    for path, p in floats.named_parameters():
        other = mine[path].grad
        assert p.grad is not None and other is not None
        share = 0.05 if path.endswith("scale") else 1e-4  # a step's is a small difference of two large sums
        assert (p.grad - other).abs().max() <= share * p.grad.abs().max(), path


@here
def test_a_form_has_no_tensors_of_its_own_and_leaves_the_student_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 12, 12)
    student = fake_quantized(Pooled(), x)
    before = str(student.graph), {k: v.clone() for k, v in student.state_dict().items()}
    form = integer_form(student, CPU)
    assert {id(p) for p in form.parameters()} == {id(p) for p in student.parameters()}
    assert set(form.state_dict()) == set(student.state_dict()) and str(student.graph) == before[0]
    assert not products(student)
    set_mode(student, "off")
    with torch.no_grad():
        assert torch.equal(form(x), student(x))
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before[1].items())


@dataclass
class Answer:
    """As models of other libraries return it."""

    scores: Tensor
    hidden: Tensor | None = None


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.layer(x).mean((2, 3)))


@here
def test_outputs_keep_their_structure() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 9, 9)
    student = fake_quantized(Answering(), x)
    form = integer_form(student, CPU)
    with torch.no_grad():
        want, found = student(x), form(x)
    assert form is not student and isinstance(found, Answer) and found.hidden is None
    assert (want.scores - found.scores).abs().max() <= 1e-5 * want.scores.abs().max()


@here
def test_few_rows_and_what_onednn_gets_wrong_stay_in_float() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 12)
    student = fake_quantized(nn.Linear(12, 7), x)
    form = integer_form(student, CPU)
    assert len(products(form)) == 1
    with torch.no_grad():
        assert torch.equal(form(x), student(x))
    for layer in (nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2)):
        student = fake_quantized(layer, torch.randn(4, 8, 6, 6))
        assert integer_form(student, CPU) is student
        assert any(n.target in (aten.conv2d.default, aten.conv_transpose2d.input) for n in student.graph.nodes)


def test_why_a_student_trains_in_floats_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6, 9, 9)
    narrow = fake_quantized(nn.Conv2d(6, 8, 3), x)
    wide = fake_quantized(nn.Conv2d(6, 8, 3), x, "x86-vnni")
    assert why_not_in_integers(nn.Linear(2, 2), CPU) == "it is not quantized"
    assert why_not_in_integers(narrow, torch.device("cuda")) == "it trains on cuda"
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"asimddp"}))
    assert "x86 with AVX2" in str(why_not_in_integers(narrow, CPU))
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"avx2"}))
    assert why_not_in_integers(narrow, CPU) is None
    assert "saturates" in str(why_not_in_integers(wide, CPU)) and integer_form(wide, CPU) is wide
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"avx2", "avx_vnni"}))
    assert why_not_in_integers(wide, CPU) is None
