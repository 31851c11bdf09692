"""Random numbers in a traced graph: a network that draws them in evaluation mode has no answer that could be kept."""

from __future__ import annotations

import torch
from torch import fx

from pqk.core.graph import arguments
from pqk.errors import InputError
from pqk.passes.capture.traced_axes import node_line


def refuse_draws(graph: fx.Graph) -> None:
    """Raises `InputError`, naming the operator and the line, where a traced graph draws random numbers."""
    for node in graph.nodes:
        if _draws(node):
            name, line = node.target._schema.name.removeprefix("aten::"), node_line(node)
            where = f", at {line}" if line else ""
            raise InputError(
                f"capture: the model draws random numbers in evaluation mode: {name}{where}. It answers "
                "otherwise each time, and a compiled file cannot be held against that: draw in training mode only "
                "(F.dropout(x, p, self.training)), or take what is drawn in as an input"
            )


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws as it is called here: dropout in evaluation mode does not."""
    tags = getattr(node.target, "tags", ())
    if not node.users or torch.Tag.nondeterministic_seeded not in tags:
        return False
    given = arguments(node)
    training = next((given[name] for name in ("train", "training") if name in given), True)
    share = next((given[name] for name in ("p", "dropout_p", "dropout") if name in given), 1.0)
    return bool(training) and share != 0
