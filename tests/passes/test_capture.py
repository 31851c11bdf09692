"""What capture promises: the same numbers, one clean trainable graph with readable names, and errors that point."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

from pqk.core.program import Rewrite, replay
from pqk.errors import InputError
from pqk.passes.capture.capture import capture

aten = torch.ops.aten


def lively(module: nn.Module) -> nn.Module:
    """Batch norm statistics and affine parameters that are not the identity."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.2)
    return module.eval()


def agree(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Capture with two samples, compare on all of them and on one."""
    with torch.no_grad():
        whole, one = module(*inputs), module(*(x[:1] for x in inputs))
        graph = capture(module, tuple(x[:2] for x in inputs))
        torch.testing.assert_close(graph(*inputs), whole, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(graph(*(x[:1] for x in inputs)), one, atol=2e-6, rtol=1e-5)
    assert isinstance(graph, fx.GraphModule)
    return graph


def targets(graph: fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


class Residual(nn.Module):
    """In-place additions and activations, dropout, a shortcut of slices and a pad."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, padding=1), nn.BatchNorm2d(16)
        self.drop, self.relu = nn.Dropout(), nn.ReLU(inplace=True)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.linear(self.drop(self.relu(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, fx.GraphModule, Tensor]:
    module, x = lively(Residual()), torch.randn(5, 3, 8, 8)
    return module, agree(copy.deepcopy(module), x), x


def test_only_what_inference_needs_is_left(residual: Any) -> None:
    _, graph, _ = residual
    kinds = {aten.conv2d.default, aten.relu.default, aten.slice.Tensor, aten.pad.default, aten.add.Tensor}
    assert set(targets(graph)) == kinds | {aten.mean.dim, aten.flatten.using_ints, aten.linear.default}
    assert len(targets(graph)) == 11


def test_names_are_those_of_the_model(residual: Any) -> None:
    _, graph, _ = residual
    assert sorted(graph.state_dict()) == [
        "conv1.bias", "conv1.weight", "conv2.bias", "conv2.weight", "linear.bias", "linear.weight",
    ]  # fmt: skip
    layers = [n.meta["layer"] for n in graph.graph.nodes if n.op == "call_function"]
    assert len(set(layers)) == len(layers) and {"conv1", "conv2", "linear"} <= set(layers)
    shapes = {n.meta["layer"]: n.meta["shape"] for n in graph.graph.nodes if n.op == "call_function"}
    assert shapes["conv2"] == (None, 16, 4, 4)


def test_points_hold_what_each_module_put_out(residual: Any) -> None:
    module, graph, x = residual
    seen: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                seen[n.name] = value
            return value

    expected: dict[str, Tensor] = {}
    for name in ("bn1", "linear"):
        module.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: expected.update({n: o.clone()}))
    module(x)
    Watch(graph).run(x)
    assert "conv1" not in graph.meta["points"], "its output, before batch norm, is not in the graph"
    for name, value in expected.items():
        torch.testing.assert_close(seen[graph.meta["points"][name]], value, atol=1e-5, rtol=1e-4)


def test_the_graph_trains_copies_and_takes_channels_last(residual: Any) -> None:
    module, graph, x = residual
    copied = copy.deepcopy(graph).to(memory_format=torch.channels_last).train()
    out = copied(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, module(x), atol=2e-6, rtol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in copied.parameters())
    assert copied.meta["points"] == graph.meta["points"]


def test_replaying_gives_a_graph_that_loads_the_tensors(residual: Any) -> None:
    _, graph, x = residual
    again = replay(lively(Residual()), (x[:2],), (Rewrite("capture", {}),), {"capture": capture})
    for p in again.parameters():
        nn.init.zeros_(p)
    again.load_state_dict(graph.state_dict(), strict=True)
    assert torch.equal(again(x), graph(x))
    assert [n.name for n in again.graph.nodes] == [n.name for n in graph.graph.nodes]  # type: ignore[union-attr]


class Structure(nn.Module):
    def __init__(self, build: Any) -> None:
        super().__init__()
        self.linear, self.build = nn.Linear(3, 3), build

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.build(self.linear(x), y * 2)


@pytest.mark.parametrize("build", [lambda a, b: (a, b), lambda a, b: {"b": b, "a": a}, lambda a, b: (a, {"b": [b]})])
def test_inputs_and_outputs_keep_their_structure(build: Any) -> None:
    agree(Structure(build).eval(), torch.randn(3, 3), torch.randn(3, 3))


def test_inputs_are_called_as_the_task_calls_them() -> None:
    """Also where a layer of the model has that name."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.image(x) + y

    example = torch.randn(2, 4), torch.randn(2, 4)
    for names, expected in (
        (None, ["x", "y", "image", "add"]),
        (["image", "depth"], ["image", "depth", "image_1", "add"]),
    ):
        graph = capture(Two(), example, input_names=names)
        assert isinstance(graph, fx.GraphModule)
        nodes = [n for n in graph.graph.nodes if n.op in ("placeholder", "call_function")]
        assert [n.meta["layer"] for n in nodes] == expected


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        pytest.param(lambda: [nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)], (4, 5, 5), id="transposed"),
        pytest.param(lambda: [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)], (4, 5, 5), id="first"),
        pytest.param(lambda: [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False)], (4,), id="linear"),
        pytest.param(lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (4, 9), id="1d"),
    ],
)
def test_batch_norm_is_folded_wherever_it_stands(layers: Any, shape: tuple[int, ...]) -> None:
    graph = agree(lively(nn.Sequential(*layers())), torch.randn(4, *shape))
    assert not any("batch_norm" in str(t) for t in targets(graph))


class Shared(nn.Module):
    """One convolution used twice, with a batch norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(self.one(self.conv(x))))


def test_folding_into_a_shared_convolution_makes_two_of_it() -> None:
    graph = agree(lively(Shared()), torch.randn(3, 3, 4, 4))
    assert sum(t is aten.conv2d.default for t in targets(graph)) == 2
    assert len(graph.state_dict()) == 4


class Forms(nn.Module):
    """Operators with several spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.same = nn.Linear(8, 24), nn.Conv1d(5, 5, 3, padding="same")
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(F.silu(self.same(x))).chunk(3, dim=-1)
        a, b = F.scaled_dot_product_attention(q, k, v, scale=0.3).split([3, 5], dim=-1)
        x = F.hardswish(torch.cat([b, F.hardsigmoid(a)], -1)) @ (self.table * 2)
        return F.relu(self.inner(x)).view(x.shape[0], -1)


def test_every_spelling_becomes_the_one_that_runtimes_know() -> None:
    torch.manual_seed(0)
    graph = agree(Forms().eval(), torch.randn(4, 5, 8))
    gone = ("silu", "hardswish", "hardsigmoid", "chunk", "split", "scaled_dot_product", "view", "getitem", "padding")
    assert not [t for t in targets(graph) if any(g in str(t) for g in gone)]
    linear = [n for n in graph.graph.nodes if n.target is aten.linear.default]
    assert len(linear) == 3 and all(len(n.meta["shape"]) == 2 for n in linear)
    relu = next(n for n in graph.graph.nodes if n.target is aten.relu.default)
    assert relu.args[0] in linear, "the activation stays next to its layer"


class Strided(nn.Module):
    """Every other pixel, flattened, behind an operator in place: without that one, a flatten stays a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.relu(self.conv(x))[:, :, ::2, ::2].flatten(2).transpose(1, 2)
        return self.head(pixels).mean(1)


def test_what_is_viewed_need_not_be_contiguous() -> None:
    """The exporter writes a copy and a view then, and the copy is no operator of the graph."""
    graph = agree(Strided().eval(), torch.randn(5, 3, 8, 8))
    assert aten._unsafe_view.default not in targets(graph) and aten.view.default not in targets(graph)


def test_computed_weights_are_computed_once() -> None:
    graph = agree(weight_norm(nn.Conv2d(3, 4, 3)).eval(), torch.randn(3, 3, 6, 6))
    assert targets(graph) == [aten.conv2d.default]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x + 1  # the line that is named


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 2, -1) * 2  # the batch is a number


@pytest.mark.parametrize(("module", "line"), [(Branch(), "if x.sum() > 0"), (FixedBatch(), "x.reshape(3, 2, -1)")])
def test_what_cannot_be_captured_is_named_with_its_line(
    module: nn.Module, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as error:
        capture(module, (torch.randn(3, 4),))
    assert line in str(error.value) and "test_capture.py:" in str(error.value) and "capture: " in str(error.value)
    assert capfd.readouterr() == ("", ""), "the library never prints"


class Folded(nn.Module):
    """Patches as rows and back, as MobileViT has them, behind an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        b, c, h, w = x.shape
        x = x.reshape(b * c * h // 2, 2, w // 2, 2).transpose(1, 2)
        x = x.reshape(b, c, h * w // 4, 4).transpose(1, 3).reshape(b * 4, h * w // 4, c)
        x = self.linear(x).contiguous().view(b, 4, h * w // 4, c)
        x = x.transpose(1, 3).reshape(b * c * h // 2, w // 2, 2, 2)
        return x.transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_views_of_what_lies_otherwise_in_memory(memory: torch.memory_format) -> None:
    net = Folded().to(memory_format=memory)  # type: ignore[call-overload]
    graph = agree(lively(net), torch.randn(3, 3, 8, 8).contiguous(memory_format=memory))
    graph(torch.randn(2, 3, 8, 8)).sum().backward()


class Standardized(nn.Conv2d):
    """As normalizer-free networks have it: the weight is standardized in `forward`."""

    def __init__(self, how: str) -> None:
        super().__init__(3, 4, 3)
        self.gain, self.how = nn.Parameter(torch.full((4, 1, 1, 1), 1.5)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "var_mean":
            var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
            weight = (self.weight - mean) * torch.rsqrt(var + 1e-5) * self.gain
        else:
            rows = self.weight.reshape(1, 4, -1)
            rows = F.batch_norm(rows, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
            weight = rows.reshape_as(self.weight)
        y = F.conv2d(x, weight, self.bias)
        return y.relu_() if self.how == "in place" else y


@pytest.mark.parametrize("how", ["var_mean", "batch_norm", "in place"])
def test_weights_that_forward_computes_are_constants_that_train(how: str) -> None:
    graph = agree(lively(Standardized(how)), torch.randn(3, 3, 6, 6))
    convolution, *rest = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert convolution.target is aten.conv2d.default and convolution.args[1].op == "get_attr" and len(rest) < 2
    assert isinstance(graph.get_parameter(str(convolution.args[1].target)), nn.Parameter)


def test_batch_norm_by_the_statistics_of_its_input_is_not_folded() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    x = 2 * torch.randn(3, 3, 6, 6) + 1
    with torch.no_grad():
        expected = net.eval()(x)
        torch.testing.assert_close(capture(net, (x[:2],))(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.RReLU(), nn.RReLU(0.1, 0.5, inplace=True), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Dropout2d()],
)
def test_what_is_drawn_in_training_only_is_plain(layer: nn.Module) -> None:
    graph = agree(nn.Sequential(nn.Conv2d(3, 4, 1), layer).eval(), torch.randn(4, 3, 5, 5))
    assert set(targets(graph)) <= {aten.conv2d.default, aten.leaky_relu.default}


class Selected(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": x.sum(1), "positive": x[x[:, 0] > 0]}


def test_an_output_whose_size_depends_on_values_is_refused_by_line() -> None:
    with pytest.raises(InputError, match=r"output positive depends on the values .* at test_capture.py:\d+: 'return"):
        capture(Selected(), (torch.randn(4, 8),))


class Drawing(nn.Module):
    """Random numbers in evaluation mode, in one of the ways that people have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "dropout":
            return F.dropout(y, 0.5, training=True)
        if self.how == "attention":
            return F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], dropout_p=0.1)[:, 0]
        if self.how == "bernoulli":
            return y * torch.bernoulli(torch.full_like(y, 0.5))
        if self.how == "randperm":
            return y[:, torch.randperm(6)]
        return y + torch.randn_like(y)


@pytest.mark.parametrize("how", ["dropout", "attention", "bernoulli", "randperm", "randn_like"])
def test_random_numbers_in_evaluation_mode_are_refused_by_line(how: str) -> None:
    with pytest.raises(InputError, match=rf"draws random numbers in evaluation mode: \w*{how}.*test_capture.py:\d+"):
        capture(Drawing(how).eval(), (torch.randn(2, 6),))


class Cached(nn.Module):
    """Keys and values behind those of a cache that is empty, as decoders join them."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        key = torch.cat([torch.tensor([]), self.key(x)], dim=-2)
        value = torch.cat([x[:, :0], self.value(x), x], dim=1)
        return torch.cat([key, value], dim=1)


def test_what_has_no_values_is_not_joined() -> None:
    graph = agree(Cached().eval(), torch.randn(5, 3, 8))
    joins = [n for n in graph.graph.nodes if n.target is aten.cat.default]
    assert [len(n.args[0]) for n in joins] == [2, 2]


class Masked(nn.Module):
    """Attention as decoders have it: causal, with a mask of booleans, with keys that several heads share."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.how = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.how == "shared":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.how == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        mask = (x[:, None, :, :1] > 0) & (x[:, None, None, :, 0] > 0)  # a query below 0 attends to nothing
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["shared", "causal", "mask"])
def test_attention_of_every_kind_becomes_products(how: str) -> None:
    torch.manual_seed(0)
    graph = agree(Masked(how).eval(), torch.randn(6, 5, 16))
    assert aten.scaled_dot_product_attention.default not in targets(graph)
    assert targets(graph).count(aten.matmul.default) == 2
    out = graph(torch.randn(6, 5, 16))
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in graph.parameters())


class Bounded(nn.Module):
    """Clamps by buffers: by numbers, on one side, and by infinities until weights are loaded."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("low", -0.5), ("high", 0.5), ("open", float("inf"))):
            self.register_buffer(name, torch.tensor(value))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.layer(x), self.low, self.high)
        return torch.clamp(torch.clamp(x, -self.open, self.open) * 2, max=self.high)


def test_clamps_by_constants_are_clamps_by_numbers() -> None:
    graph = agree(Bounded().eval(), torch.randn(5, 8))
    clamps = [n for n in graph.graph.nodes if "clamp" in str(n.target)]
    assert [(n.target, n.args[1:]) for n in clamps] == [
        (aten.clamp.default, (-0.5, 0.5)),
        (aten.clamp.default, (None, 0.5)),
    ]


class Frozen(nn.Module):
    """Convolutions without gradients, the second in a part where autocast is switched off (or on), in another one."""

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
            x.relu_()
            with torch.autocast("cpu", enabled=self.autocast):
                x = self.second(x.float()) * x.shape[-1]
        with torch.set_grad_enabled(False):
            x = F.relu(x)
        return self.head(x.float().mean((2, 3)))


def test_what_is_computed_without_gradients_or_autocast_is_plain_operators_that_train() -> None:
    torch.manual_seed(0)
    graph = agree(Frozen().eval(), torch.randn(4, 3, 8, 8))
    assert targets(graph).count(aten.conv2d.default) == 2
    assert all(isinstance(t, torch._ops.OpOverload) for t in targets(graph))
    graph(torch.randn(2, 3, 8, 8)).sum().backward()
    assert graph.get_parameter("first.weight").grad is not None


def test_parts_in_lower_precision_are_refused() -> None:
    with pytest.raises(InputError, match=r'under torch.autocast\("cpu", torch.bfloat16\).*enabled=False'):
        capture(Frozen(autocast=True), (torch.randn(2, 3, 8, 8),))
