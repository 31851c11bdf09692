"""A captured decoder as its file is written: with a cache, in ONNX's operators for tokens, and in the form chosen."""

from __future__ import annotations

from typing import Any

from torch import fx

from pqk.core.aten import DEQUANTIZE, DYNAMIC, MULTIPLY, NBITS, QUANTIZE, aten
from pqk.core.graph import call, calls, finish, operand, shape
from pqk.deploy.decoder_operators import GROUPED, HEAD_STEP, LAST
from pqk.deploy.generation import Cache, with_past
from pqk.deploy.token_operators import with_token_operators
from pqk.errors import InputError, Reason
from pqk.task.decoder_form import DecoderForm

PRODUCTS = (aten.linear.default, MULTIPLY, NBITS)
"""what the last product may be, that with the vocabulary"""
QUANTIZING = (QUANTIZE, DEQUANTIZE, DYNAMIC)


def deployed_decoder(graph: fx.GraphModule, form: DecoderForm) -> tuple[fx.GraphModule, Cache]:
    """A captured decoder (unchanged) as model.onnx computes it, and what its cache holds.

    Args:
        graph: of a `Decoder`: `input_ids` and `attention_mask` int64 [B, S] to logits [B, S, V].
        form: how the file is written.

    Returns:
        A graph over the same weights: as `with_past` gives it, in fewer operators, with logits [B, 1, V] where those of
        the last token are asked for.

    Raises:
        InputError: `graph` cannot be given a cache, or not be written in this form.
    """
    grouped = form.attention == "grouped"
    continuing, cache = with_past(graph, by_mask=grouped)
    if grouped and (reason := why_not_grouped(cache)) is not None:
        raise InputError(reason)
    found = with_token_operators(continuing, grouped=grouped)
    spelled = len(cache.entries) - len([*calls(found.graph, GROUPED)])
    if grouped and spelled:
        raise InputError(
            f'decoder_form: attention = "grouped" is for attention in float from end to end, and in {spelled} of '
            f'{len(cache.entries)} layers a quantizer stands inside; use activations = "dynamic" or "blockwise" of '
            'quantize, or attention = "standard"'
        )
    if form.logits == "last":
        _pick_last(found)
    return found, cache


def why_not_grouped(cache: Cache) -> Reason | None:
    """Why `GroupQueryAttention` cannot have keys and values of these sizes, else None."""
    for layer, entry in enumerate(cache.entries):
        use = 'use attention = "standard"'
        if entry.key_width != entry.value_width:
            return (
                f'decoder_form: attention = "grouped" takes keys and values of one width, and those of layer {layer} '
                f"are {entry.key_width} and {entry.value_width} wide; {use}"
            )
        if entry.key_width % HEAD_STEP:
            return (
                f'decoder_form: attention = "grouped" takes heads whose width is a multiple of {HEAD_STEP}, and those '
                f"of layer {layer} are {entry.key_width} wide; {use}"
            )
    return None


def _pick_last(found: fx.GraphModule) -> None:
    """Have the product with the vocabulary, and what is behind it, read the last token alone. In place."""
    graph = found.graph
    ends: Any = graph.output_node().args[0]
    mask = [n for n in graph.nodes if n.op == "placeholder"][1]
    behind: list[fx.Node] = [ends[0]]
    while behind[-1].target not in PRODUCTS and behind[-1].args and isinstance(behind[-1].args[0], fx.Node):
        behind.append(operand(behind[-1]))
    product = behind[-1]
    source = operand(product) if product.target in PRODUCTS else product
    while source.target in QUANTIZING or "getitem" in str(source.target):
        behind.append(source)
        source = operand(source)
    if product.target not in PRODUCTS or len(shape(source)) != 3:
        raise InputError(
            f'decoder_form: logits = "last" is for logits that a linear layer makes of tokens [B, S, C], and here '
            f'{product.meta.get("layer", product.name)} makes them; use logits = "all"'
        )
    reader = behind[-1]
    batch, _, width = shape(source)
    with graph.inserting_before(reader):
        picked = call(graph, LAST, (source, mask), source, shape=(batch, 1, width))
    reader.replace_input_with(source, picked)
    for node in behind:
        if len(node.meta.get("shape", ())) == 3:
            node.meta["shape"] = (batch, 1, shape(node)[-1])
    finish(found)
