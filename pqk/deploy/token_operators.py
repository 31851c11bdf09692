"""A decoder's graph in ONNX's own operators: RMS norm, rotary embedding, and attention with its cache.

Operator set 23 has one operator for each of what a causal model spells out in twenty, and a small model pays the start
of every operator for every token. Where no quantizer stands inside, the spelled-out form gives way to the operator;
torch computes it by `torch.onnx.ops`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.onnx.ops  # registers them
from torch import fx

from pqk.copies import copy_of
from pqk.core.aten import DEQUANTIZE, QUANTIZE, aten
from pqk.core.attention import MATMUL, SOFTMAX
from pqk.core.graph import arguments, call, calls, finish, operand, replace, shape
from pqk.deploy.decoder_operators import GROUPED, LENGTHS
from pqk.deploy.generation import stored
from pqk.deploy.sibling_products import join_siblings
from pqk.deploy.token_axes import rows_to_tokens

OPERATOR_SET = 23
ROTARY = torch.ops.onnx.RotaryEmbedding.opset23
ATTENTION = torch.ops.onnx.Attention.opset23
OF_SOURCE = ".encoder."
"""what the names of kept keys and values have that are of a source, and not of the tokens before"""
NEEDING = (ROTARY, ATTENTION, aten.rms_norm.default)


def needs_operator_set(graph_module: Any) -> bool:
    """Whether a graph has operators that came with operator set 23."""
    return isinstance(graph_module, fx.GraphModule) and any(n.target in NEEDING for n in graph_module.graph.nodes)


def with_token_operators(graph_module: fx.GraphModule, *, grouped: bool = False) -> fx.GraphModule:
    """The same graph (unchanged) with ONNX's operators for rotary embeddings and attention, on tokens [B, S, C].

    Args:
        graph_module: as `with_past` gives it.
        grouped: attention with a cache is ONNX Runtime's `GroupQueryAttention`.

    Returns:
        A graph over the same weights that computes the same to rounding. What has another form than those known here
        stays as it is.
    """
    found = copy_of(graph_module, "student")
    assert isinstance(found, fx.GraphModule)
    rows_to_tokens(found)
    join_siblings(found)
    halves: dict[fx.Node, fx.Node] = {}
    spread: dict[fx.Node, fx.Node] = {}
    for node in calls(found.graph, aten.add.Tensor):
        _rotate(found, node, halves)
    lengths = _lengths(found.graph) if grouped else None
    for node in calls(found.graph, SOFTMAX):
        _attend(found, node, spread, lengths)
    return finish(found)


# ---- heads


def _flat(x: fx.Node) -> fx.Node:
    """Heads [B, H, S, D] as [B, S, H * D], at the insertion point."""
    batch, heads, length, width = shape(x)
    assert heads is not None and width is not None
    flat = (batch, length, heads * width)
    if _is_turn(x):
        turned = operand(x)
        if turned.target in (aten.reshape.default, aten.unflatten.int) and shape(operand(turned)) == flat:
            return operand(turned)
    else:
        turned = call(x.graph, aten.transpose.int, (x, 1, 2), x, shape=(batch, length, heads, width))
    return call(x.graph, aten.flatten.using_ints, (turned, 2, 3), turned, shape=flat)


def _is_turn(x: fx.Node) -> bool:
    """Whether `x` swaps heads and tokens."""
    return x.target is aten.transpose.int and tuple(x.args[1:]) == (1, 2)


def _put_heads(graph_module: fx.GraphModule, old: fx.Node, flat: fx.Node) -> None:
    """Put `flat` [B, S, H * D] in the place of heads `old` [B, H, S, D], at the insertion point."""
    batch, heads, length, width = shape(old)
    view = call(old.graph, aten.unflatten.int, (flat, 2, [heads, width]), old, shape=(batch, length, heads, width))
    replace(graph_module, old, call(old.graph, aten.transpose.int, (view, 1, 2), old))


def _joined(node: fx.Node, axis: int) -> list[fx.Node]:
    """What `node` joins along an axis; nothing where it is another operator, or joins along another one."""
    if node.target is not aten.cat.default:
        return []
    a = arguments(node)
    return list(a["tensors"]) if a["dim"] in (axis, axis - len(shape(node))) else []


# ---- rotary embedding (Su et al. 2021, "RoFormer", arXiv:2104.09864; in halves, as GPT-NeoX has it)


def _rotate(graph_module: fx.GraphModule, node: fx.Node, halves: dict[fx.Node, fx.Node]) -> None:
    """One operator in the place of a rotary embedding whose last sum is `node`, if it is one.

    `halves` are the first halves of cos and sin that are there already.
    """
    found = _rotary(node)
    if found is None:
        return
    x, cos, sin = found
    whole, width = node, shape(x)[-1]
    if x.target is aten.slice.Tensor and tuple(x.args[1:]) == (3, 0, width):  # it turns the first ones of each head
        joined = next(iter(node.users))
        if len(node.users) > 1 or not _joins(joined, node, operand(x), width):
            return
        x, whole = operand(x), joined
    graph = graph_module.graph
    for angle in {cos, sin} - {*halves}:
        halves[angle] = _half(angle)
    with graph.inserting_before(whole):
        flat = _flat(x)
        turned = call(graph, ROTARY, (flat, halves[cos], halves[sin]), flat, layer=whole.meta["layer"])
        turned.kwargs = {"num_heads": shape(x)[1], **({} if whole is node else {"rotary_embedding_dim": width})}
        _put_heads(graph_module, whole, turned)


def _rotary(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x [B, H, S, D], and cos and sin [B, S, D] of two same halves, of `x * cos + turned(x) * sin`; else None."""
    if len(node.meta.get("shape", ())) != 4 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    left, right = operand(node), operand(node, 1)
    if {left.target, right.target} != {aten.mul.Tensor} or len(node.args) > 2:
        return None
    x, turned = operand(left), operand(right)
    if turned.target is not aten.cat.default or len(shape(x)) != 4 or not _turns(turned, x):
        return None
    angles = [_angles(product.args[1]) for product in (left, right)]
    cos, sin = angles
    return None if cos is None or sin is None else (x, cos, sin)


def _turns(turned: fx.Node, x: fx.Node) -> bool:
    """Whether `turned` is the second half of each head of x, negated, and then the first."""
    width, parts = shape(x)[-1], _joined(turned, 3)
    if width is None or width % 2 or len(parts) != 2:
        return False
    negated, first = parts
    if negated.target is not aten.neg.default:
        return False
    return _is_part(operand(negated), x, width // 2, width) and _is_part(first, x, 0, width // 2)


def _is_part(node: Any, x: fx.Node, start: int, end: int) -> bool:
    """Whether `node` is x[..., start:end]."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor or operand(node) is not x:
        return False
    a, size = arguments(node), shape(x)[-1]
    assert size is not None
    return a["dim"] in (3, -1) and (a["start"] or 0) == start and a["step"] == 1 and min(a["end"], size) == end


def _joins(joined: fx.Node, turned: fx.Node, x: fx.Node, width: int | None) -> bool:
    """Whether `joined` is the turned first ones of each head of `x`, and the others as they are."""
    parts, size = _joined(joined, 3), shape(x)[-1]
    if len(parts) != 2 or width is None or size is None:
        return False
    return parts[0] is turned and _is_part(parts[1], x, width, size)


def _angles(node: Any) -> fx.Node | None:
    """cos or sin [B, S, D] before its axis of heads, where its two halves are the same."""
    if not isinstance(node, fx.Node) or node.target is not aten.unsqueeze.default or node.args[1] != 1:
        return None
    whole = operand(node)
    return whole if _joined_halves(whole) is not None else None


def _joined_halves(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from the one that joins two same halves to `node`, each of the one before and numbers alone."""
    found = [node]
    while node.target in (aten.mul.Tensor, aten.cos.default, aten.sin.default):
        if any(isinstance(a, fx.Node) for a in node.args[1:]):
            return None
        node = operand(node)
        found.insert(0, node)
    parts = _joined(node, 2)
    return found if len(parts) == 2 and parts[0] is parts[1] else None


def _half(whole: fx.Node) -> fx.Node:
    """The first half of cos or sin, computed from half of the angles: [B, S, D / 2]."""
    path = _joined_halves(whole)
    assert path is not None
    node = _joined(path[0], 2)[0]
    half, last = shape(node), whole
    for step in path[1:]:
        with whole.graph.inserting_after(last):
            node = last = call(whole.graph, step.target, (node, *step.args[1:]), step, shape=half)
    return node


# ---- attention with a cache


@dataclass(frozen=True)
class _Attention:
    """`softmax(scale * query keys + seen) values` of a graph with a cache."""

    query: fx.Node
    """[B, H, S, D]"""
    key: fx.Node
    value: fx.Node
    """kept ones and new ones, joined: [B, G, P + S, D]"""
    seen: fx.Node | None
    """[B, 1, S, P + S]; instead of one head all, where they differ, and instead of S tokens one, where they do not"""
    scale: float
    cap: float
    """what scores are bounded by before the mask is added; 0: nothing"""
    output: fx.Node
    """[B, H, S, D]"""


def _attend(
    graph_module: fx.GraphModule,
    softmax: fx.Node,
    spread: dict[fx.Node, fx.Node],
    lengths: tuple[fx.Node, fx.Node] | None,
) -> None:
    """One operator in the place of the attention around `softmax`, if it is one with a cache and in float.

    `spread` is what is seen by each token that is there already, where all see the same; with `lengths` of texts the
    operator is ONNX Runtime's.
    """
    found = _attention(softmax)
    if found is None:
        return
    graph = graph_module.graph
    kept = [stored(n) for n in (found.key, found.value)]
    (past_key, new_key), (past_value, new_value) = (_joined(n, 2) for n in kept)
    in_integers = kept[0] is not found.key
    heads, groups = shape(found.query)[1], shape(found.key)[1]
    seen = found.seen
    if seen is not None and shape(seen)[2] == 1 and seen not in spread:
        with graph.inserting_before(softmax):
            length = graph.call_function(aten.sym_size.int, (found.query, 2))
            sizes = (*shape(seen)[:2], None, shape(seen)[3])
            spread[seen] = call(graph, aten.expand.default, (seen, [-1, -1, length, -1]), seen, shape=sizes)
    if seen is not None:
        seen = spread.get(seen, seen)
    # Of a source there may be no new ones, which the operator does not take, and it keeps floats alone.
    if OF_SOURCE in str(past_key.meta["layer"]) or (in_integers and lengths is None):
        with graph.inserting_before(softmax):
            whole = call(graph, ATTENTION, (found.query, found.key, found.value, seen), found.output)
            whole.kwargs = _numbers(found)
            replace(graph_module, found.output, call(graph, operator.getitem, (whole, 0), found.output))
        return
    with graph.inserting_before(softmax):
        new = [_rounded(n) if in_integers else _flat(n) for n in (new_key, new_value)]
        sources = (_flat(found.query), *new)
        values = shape(found.output)
        flat = (values[0], values[2], heads * values[3])  # type: ignore[operator]
        if lengths is None:
            all_four = call(graph, ATTENTION, (*sources, seen, past_key, past_value), softmax, shape=flat)
            all_four.kwargs = {"q_num_heads": heads, "kv_num_heads": groups, **_numbers(found)}
        else:
            steps = [operand(n, 1) for n in (new_key, new_value)] if in_integers else []
            numbers = (heads, groups, found.scale, found.cap, *steps)
            all_four = call(
                graph, GROUPED, (*sources, past_key, past_value, *lengths, seen, *numbers), softmax, shape=flat
            )
        answer, keys, kept_values = (
            call(graph, operator.getitem, (all_four, i), like, **changed)
            for i, (like, changed) in enumerate(((softmax, {"shape": flat}), (kept[0], {}), (kept[1], {})))
        )
    ends = graph.output_node()
    for old, whole in zip(kept, (keys, kept_values), strict=True):  # others that read them are spelled-out forms
        ends.replace_input_with(old, whole)
    with graph.inserting_before(found.output):
        _put_answer(graph_module, found.output, answer)


def _rounded(integers: fx.Node) -> fx.Node:
    """What `integers` [B, G, S, D] stand for, made as tokens [B, S, G * D], at the insertion point."""
    flat = _flat(operand(integers))
    q = call(flat.graph, QUANTIZE, (flat, *integers.args[1:]), integers, shape=shape(flat))
    return call(flat.graph, DEQUANTIZE, (q, *integers.args[1:3]), flat, layer=integers.meta["layer"])


def _lengths(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """How many tokens there are, of each text and as a number, counted from the mask."""
    *_, last = inputs = [n for n in graph.nodes if n.op == "placeholder"]
    mask = inputs[1]
    with graph.inserting_after(last):
        both = call(graph, LENGTHS, (mask,), mask, dtype=torch.int32)
    with graph.inserting_after(both):
        total = call(graph, operator.getitem, (both, 1), mask, shape=(), dtype=torch.int32)
        return call(graph, operator.getitem, (both, 0), mask, shape=shape(mask)[:1], dtype=torch.int32), total


def _numbers(found: _Attention) -> dict[str, Any]:
    """The scale of an attention, and its cap where it has one."""
    return {"scale": found.scale} | ({"softcap": found.cap} if found.cap else {})


def _attention(softmax: fx.Node) -> _Attention | None:
    """The attention around `softmax`; None where it has another form, such as quantizers inside."""
    scores, seen = operand(softmax), None
    shares = _only_user(softmax)
    if shares is None or shares.target is not MATMUL:
        return None
    if scores.target is aten.add.Tensor and len(scores.args) == 2:
        scores, seen = operand(scores), _once(operand(scores, 1))
    scores, cap = _uncapped(scores)
    if scores.target is not MATMUL or (seen is not None and len(shape(seen)) != 4):
        return None
    rows, turned = operand(scores), operand(scores, 1)
    if rows.target is not aten.mul.Tensor or not isinstance(rows.args[1], float):
        return None
    query, output = operand(rows), _only_user(shares)
    if query.target is not aten.reshape.default or output is None or output.target is not aten.reshape.default:
        return None
    query = operand(query)
    key, value = operand(turned), operand(shares, 1)
    if turned.target is not aten.transpose.int or not all(_is_kept(stored(n)) for n in (key, value)):
        return None
    return _Attention(query, key, value, seen, rows.args[1], cap, output)


def _uncapped(scores: fx.Node) -> tuple[fx.Node, float]:
    """Scores before `tanh(scores / cap) * cap` (Gemma 2), and the cap; 0 where there is none."""
    if scores.target is not aten.mul.Tensor or not isinstance(scores.args[1], float):
        return scores, 0.0
    cap, tanh = scores.args[1], operand(scores)
    if tanh.target is not aten.tanh.default or operand(tanh).target is not aten.div.Tensor:
        return scores, 0.0
    return (operand(operand(tanh)), cap) if operand(tanh).args[1] == cap else (scores, 0.0)


def _is_kept(node: fx.Node) -> bool:
    """Whether `node` is what was kept and what is new, joined along the tokens."""
    parts = _joined(node, 2)
    return len(parts) == 2 and parts[0].op == "placeholder"


def _once(seen: fx.Node) -> fx.Node:
    """What one head of a group sees: each sees the same."""
    parts = _joined(seen, 2)
    return parts[0] if len({*parts}) == 1 else seen


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _put_answer(graph_module: fx.GraphModule, output: fx.Node, answer: fx.Node) -> None:
    """Put `answer` [B, S, H * D] where the heads `output` [B, H, S, D] are joined again, or read otherwise."""
    for turn in [u for u in output.users if _is_turn(u)]:
        for joined in [u for u in turn.users if shape(u) == shape(answer) and u.target in _JOINING]:
            replace(graph_module, joined, answer)
    _put_heads(graph_module, output, answer)


_JOINING = (aten.reshape.default, aten.flatten.using_ints)
