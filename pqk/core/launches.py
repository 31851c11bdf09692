"""What a graph asks of a GPU, counted by running it: launches, and the bytes that they must move.

A launch is an operator that depends on the inputs and writes memory, its own or an argument's; one that returns a view
of an argument is none. Its bytes are those of its arguments and results, each tensor once, which no cache can save.
Operators on constants alone are not counted: any runtime computes them once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pqk.core.program import Example

NONE = ("pqk::concat_buffer",)
"""operators that launch nothing: they give memory that others write"""
SEVERAL = {"pqk::int8_concat": "inputs"}
"""operators that launch once for each tensor of an argument"""


class LaunchedOp(NamedTuple):
    """One operator as it was called: `op` is its qualified name, `arguments` are by name, tensors as they were."""

    layer: str
    op: str
    arguments: dict[str, Any]


class LaunchTraffic(NamedTuple):
    launches: int
    bytes: int


def launches(module: fx.GraphModule, example: Example) -> list[LaunchedOp]:
    """Every launch of a fused student (or of any other graph) on `example`, in order."""
    return [launched for launched, _ in _run(module, example)]


def traffic(module: fx.GraphModule, example: Example) -> LaunchTraffic:
    """Launches, and bytes moved, of one pass over `example`."""
    ledger = _run(module, example)
    times = [len(op.arguments[SEVERAL[op.op]]) if op.op in SEVERAL else 1 for op, _ in ledger]
    return LaunchTraffic(sum(times), sum(size for _, size in ledger))


def _run(module: fx.GraphModule, example: Example) -> list[tuple[LaunchedOp, int]]:
    ledger = _Ledger(module)
    with torch.no_grad():
        ledger.run(*example)
    return ledger.entries


class _Ledger(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.entries: list[tuple[LaunchedOp, int]] = []
        self.computed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" or any(source in self.computed for source in n.all_input_nodes):
            self.computed.add(n)
            if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
                self._note(n, n.target, result)
        return result

    def _note(self, node: fx.Node, op: torch._ops.OpOverload, result: Any) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        inputs = _tensors((args, kwargs))
        outputs = _tensors(result)
        writes = op._schema.is_mutable or not {_storage(t) for t in outputs} <= {_storage(t) for t in inputs}
        if not writes or op._schema.name in NONE:
            return
        names = [a.name for a in op._schema.arguments]
        arguments = {a.name: a.default_value for a in op._schema.arguments}
        arguments |= dict(zip(names, args, strict=False)) | kwargs
        layer = node.meta.get("layer") or node.meta.get("custom", {}).get("layer") or node.name
        distinct = {(_storage(t), t.storage_offset(), tuple(t.shape), t.stride()): t for t in (*inputs, *outputs)}
        total = sum(t.numel() * t.element_size() for t in distinct.values())
        self.entries.append((LaunchedOp(layer, op._schema.name, arguments), total))


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
