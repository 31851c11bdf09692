"""A decoder's file that gives logits of the last token alone, as one that gives them of every token.

Metrics of texts, and decisions that are compared, are those of every token. They are judged by the file that ships but
for the one node that picks the last: what it picks from is read in its place.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from pqk.errors import InputError

LAST_TOKEN = "last_token"
"""what the node is called that picks the last token, and what it makes"""


def with_every_token(model: Path | str | bytes) -> bytes:
    """The bytes of the file without the node that picks the last token. Raises `InputError` where there is none."""
    found = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else onnx.load(str(model))
    picks = [n for n in found.graph.node if n.output and n.output[0] == LAST_TOKEN]
    if len(picks) != 1:
        raise InputError(
            "the file gives logits of one token, and has no node last_token that picks it, so those of whole texts "
            "cannot be told: was it written by another tool?"
        )
    (source, *_), _ = picks[0].input, found.graph.node.remove(picks[0])
    for node in found.graph.node:
        node.input[:] = [source if name == LAST_TOKEN else name for name in node.input]
    del found.graph.value_info[:]  # shapes with one token
    for value in found.graph.output:
        sizes = value.type.tensor_type.shape.dim
        if len(sizes) == 3:  # keys and values have four axes
            sizes[1].ClearField("dim_value")
    return found.SerializeToString()
