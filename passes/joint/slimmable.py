"""One network in two widths over the same weights: the graph that the PQK pass trains.

It is the graph that will be deployed, captured at full width with fake-quantizers on its edges, in which

    - a batch norm that capture folded into a layer is a module of its own again, behind that layer,
    - batch norms and activation quantizers are there twice, once for each width (`TwoWidths`; Yu et al. 2019,
      "Slimmable neural networks", arXiv:1812.08928, section 3.2: one set of statistics does not serve two widths),
    - a `Mask` follows every layer whose channels may go: in the slim width it puts 0 into those that have gone.

Weights and their quantizers are shared. 0 is on every activation's grid, so a masked channel adds nothing to what reads
it, and the slim width computes what the sliced network will.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk.copies import copy_of
from pqk.core.aten import OUTPUT_AXIS
from pqk.core.graph import attach, attribute, facts, finish, free_path, operand
from pqk.passes.prune.cuts import channels_of, cut_axis
from pqk.quant.fake_quant import ActivationFakeQuant, BiasFakeQuant, WeightFakeQuant, quantizers
from pqk.quant.qparams import TINY

WidthName = Literal["full", "slim"]
KeptChannels = Callable[[str], Sequence[int] | None]
"""module path -> the output channels that it still has; None: all"""


class Mask(nn.Module):
    """Puts zero into the channels that have gone, in the slim width. `kept` is a bool [C] buffer."""

    kept: Tensor

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis, self.width = axis, "slim"
        self.register_buffer("kept", torch.ones(channels, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.width == "full":
            return x
        sizes = [1] * x.dim()
        sizes[self.axis] = -1
        return torch.where(self.kept.view(sizes), x, 0.0)  # not a product, which keeps what is infinite


class TwoWidths(nn.Module):
    """A module for each width: `slim` is the original, `full` a copy of it."""

    def __init__(self, slim: nn.Module) -> None:
        super().__init__()
        self.slim, self.full, self.width = slim, copy_of(slim, "student"), "slim"

    def forward(self, x: Tensor) -> Tensor:
        return self.slim(x) if self.width == "slim" else self.full(x)


@dataclass(frozen=True)
class Widths:
    """A graph that trains in two widths."""

    graph: fx.GraphModule
    norms: Mapping[str, str]
    """layer -> the batch norm that is folded into it at the end"""
    masks: Mapping[str, Mask]
    """module -> the mask behind it"""

    def show(self, width: WidthName) -> None:
        """Compute in this width from now on."""
        for module in self.graph.modules():
            if isinstance(module, Mask | TwoWidths):
                module.width = width

    def narrow(self, kept: KeptChannels) -> None:
        """Mask what has gone."""
        for path, mask in self.masks.items():
            channels = kept(path)
            mask.kept.fill_(channels is None)
            if channels is not None:
                mask.kept[list(channels)] = True

    def widen(self) -> None:
        """Let the full width begin with the statistics and ranges of the slim one."""
        for module in self.graph.modules():
            if isinstance(module, TwoWidths):
                module.full.load_state_dict(module.slim.state_dict())

    def quantizers(self) -> dict[str, ActivationFakeQuant | WeightFakeQuant]:
        """The quantizers of the slim width, by the names that they have in the deployed graph."""
        own = quantizers(self.graph).items()
        return {name.removesuffix(".slim"): q for name, q in own if not name.endswith(".full")}

    def trained(self, module: nn.Module) -> nn.Module:
        """A copy of `module`, which the graph was made of, with the trained tensors and the slim width's statistics."""
        module = copy_of(module, "student")
        tensors = module.state_dict()
        with torch.no_grad():
            for name, value in self.graph.state_dict().items():
                name = name.replace(".slim.", ".")
                if name in tensors:
                    tensors[name].copy_(value)  # in place: layers that share a weight go on sharing it
        return module.eval()


def two_widths(
    graph: fx.GraphModule,
    module: nn.Module,
    points: Mapping[str, str],
    paths: Sequence[str],
    calibrate: Callable[[WeightFakeQuant, Tensor], None],
) -> tuple[Widths, list[tuple[str, str]]]:
    """The training graph, made of a calibrated FAKE_QUANT graph of `module` (which is changed).

    `points` are the captured graph's, before quantizers came in; `paths` the modules whose channels may go. Also
    returns `(module, reason)` for tensors of the graph that are no parameters of the module and therefore do not train.
    """
    nodes = {n.name: n for n in graph.graph.nodes}
    modules = dict(module.named_modules())
    norms: dict[str, str] = {}
    for path, norm in modules.items():
        node = nodes.get(points.get(path, ""))
        layer = _layer_of(node, modules) if isinstance(norm, _BatchNorm) and node is not None else None
        if layer is not None and node is not None:
            _unfold(graph, node, modules[layer], path, norm, calibrate)
            norms[layer] = path
    masks = _mask(graph, nodes, modules, points, paths)
    for name, quantizer in quantizers(graph).items():
        if isinstance(quantizer, ActivationFakeQuant):
            attach(graph, name, TwoWidths(quantizer))
    widths = Widths(finish(graph), norms, masks)
    return widths, _freeze_foreign(widths, modules)


def _layer_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The layer that `node` computes, if its weight is that layer's own."""
    if node.op != "call_function" or node.target not in OUTPUT_AXIS:
        return None
    layer, _, name = _weight_path(node).rpartition(".")
    return layer if name == "weight" and layer in modules else None


def _weight_path(node: fx.Node) -> str:
    source = operand(node, 1)
    return str((operand(source) if source.op == "call_module" else source).target)


def _behind(graph: fx.GraphModule, node: fx.Node, path: str, module: nn.Module) -> None:
    """Call `module`, attached at `path`, on the value of `node`; all who read the value read the result."""
    attach(graph, path, module)
    with graph.graph.inserting_after(node):
        call = graph.graph.create_node("call_module", path, (node,), name=path.replace(".", "_"))
    call.meta.update(facts(node))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _unfold(
    graph: fx.GraphModule,
    node: fx.Node,
    layer: nn.Module,
    path: str,
    norm: _BatchNorm,
    calibrate: Callable[[WeightFakeQuant, Tensor], None],
) -> None:
    """Give `node` its layer's own weight and bias, and the batch norm behind it."""
    weight = attribute(graph, _weight_path(node))
    weight.data.copy_(layer.weight.data)
    quantizer = attribute(graph, str(operand(node, 1).target)) if operand(node, 1).op == "call_module" else None
    if isinstance(quantizer, WeightFakeQuant):
        calibrate(quantizer, weight.detach())
    bias: Any = None
    if isinstance(layer.bias, Tensor):
        bias = operand(node, 2)
        bias = operand(bias) if bias.op == "call_module" else bias  # the accumulator's grid is that of the folded bias
        attribute(graph, str(bias.target)).data.copy_(layer.bias.data)
    node.args = (*node.args[:2], bias, *node.args[3:])
    _behind(graph, node, path, TwoWidths(copy_of(norm, "student")))


def _mask(
    graph: fx.GraphModule,
    nodes: Mapping[str, fx.Node],
    modules: Mapping[str, nn.Module],
    points: Mapping[str, str],
    paths: Sequence[str],
) -> dict[str, Mask]:
    """Masks behind those of `paths` whose output is a value of the graph (that of a folded layer is its norm's)."""
    masks: dict[str, Mask] = {}
    for path in paths:
        node, channels = nodes.get(points.get(path, "")), channels_of(modules[path], "out")
        if node is None or channels is None:
            continue
        masks[path] = Mask(channels, cut_axis(modules[path]))
        after = next((u for u in node.users if isinstance(_called(graph, u), TwoWidths)), node)
        _behind(graph, after, free_path(graph, f"masks.{path.replace('.', '_')}"), masks[path])
    return masks


def _called(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return attribute(graph, str(node.target)) if node.op == "call_module" else None


def _freeze_foreign(widths: Widths, modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Freezes the parameters of the graph that are none of the module's: they could not be carried back."""
    declined = []
    own = {f"{path}.{name}".lstrip(".") for path, m in modules.items() for name, _ in m.named_parameters(recurse=False)}
    inside = tuple(f"{path}." for path in (*widths.quantizers(), *widths.norms.values()))
    for name, parameter in widths.graph.named_parameters():
        if name not in own and not name.startswith(inside):
            parameter.requires_grad_(False)
            declined.append((name, "not trained: it was computed by capture from several of the model's parameters"))
    return declined


def carry(widths: Widths, student: fx.GraphModule, slim: nn.Module, kept: KeptChannels) -> list[str]:
    """Copies to the deployed graph's quantizers what those of the same name have learned.

    Returns the names of those that have none of that name.


    `slim` is the sliced module that `student` was captured from. Folding its batch norm multiplies the weights of
    output channel c by g_c = gamma_c / sqrt(var_c + eps), so the channel's step is multiplied by |g_c|: the integers
    stay, and those of a channel with g_c < 0 change their sign, for which the symmetric grid has room.
    """
    learned, layers, unmatched = widths.quantizers(), dict(slim.named_modules()), []
    weights = {str(n.target): str(operand(n).target) for n in student.graph.nodes if n.op == "call_module"}
    with torch.no_grad():
        for name, quantizer in quantizers(student).items():
            old = learned.get(name)
            if isinstance(quantizer, ActivationFakeQuant) and isinstance(old, ActivationFakeQuant):
                quantizer.load_state_dict(old.state_dict())
            elif isinstance(quantizer, WeightFakeQuant) and isinstance(old, WeightFakeQuant):
                layer = weights[name].rpartition(".")[0]
                if layer not in layers:
                    continue  # made by capture, it did not train: its step is the one that suits its weight
                channels = kept(layer)
                scale = old.qparams().scale
                scale = scale if channels is None else scale[list(channels)]
                quantizer.scale.copy_((scale * _norm_factor(widths, slim, layer)).clamp(min=TINY))
            else:
                unmatched.append(name)
        for node in student.graph.nodes:
            if isinstance(bias := _called(student, node), BiasFakeQuant):
                bias.fit(attribute(student, str(operand(node).target)))
    return unmatched


def _norm_factor(widths: Widths, slim: nn.Module, layer: str) -> Tensor | float:
    """|g_c| of the batch norm behind `layer`, float32 [C]; 1 without one."""
    if layer not in widths.norms:
        return 1.0
    norm = slim.get_submodule(widths.norms[layer])
    assert isinstance(norm, _BatchNorm) and norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    return (factor if norm.weight is None else factor * norm.weight.detach().double().abs()).float()
