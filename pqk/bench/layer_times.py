"""Where the time of an ONNX file goes: ONNX Runtime's own profile of its operators, summed by layer.

Operators are those of the graph that is executed, after the runtime's fusions. One that reads a weight is of the
weight's layer; one without weights is of the layer that ended last among those it reads from. The profiler makes every
operator some microseconds longer, so that shares of a network of small operators are less exact than those of a large
one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pqk.bench.contenders import Feeds
from pqk.core.onnxruntime_session import session
from pqk.deploy.onnx_ops import MACS, in_integers, plain_name
from pqk.report.layer_times import LayerTime, NetworkTimes
from pqk.scratch import ScratchFolder

WARM, CALLS, SECONDS, EVENTS = 3, 25, 1.0, 8_000
"""calls that are not counted, and the most that are: so many, in so long, of so many operators in all"""
FEWEST = 5
INPUTS = "inputs"
"""what works on the inputs before the first layer"""
KERNEL = "_kernel_time"


def conditions() -> str:
    """How it is measured, in a sentence."""
    return (
        f"ONNX Runtime's profiler, one network after the other: the median of at most {CALLS} calls after {WARM}. It "
        "makes every operator some microseconds longer, so what counts are shares, not sums. An operator without "
        "weights counts to the last layer before it."
    )


def layer_times(model: Path, feeds: Feeds, variant: str, *, threads: int = 2) -> NetworkTimes:
    """The layers of an ONNX file on some feeds, in the order of execution.

    Raises:
        InputError: ONNX Runtime refuses the model.
    """
    with ScratchFolder("profile") as folder:
        executed = Path(folder) / "executed.onnx"
        run = session(model, threads=threads, save_to=executed, profile_to=Path(folder) / "profile")
        began = time.perf_counter()
        for _ in range(WARM):
            run.run(None, dict(feeds))
        a_call = (time.perf_counter() - began) / WARM
        written, graph = (onnx.load(path, load_external_data=False).graph for path in (model, executed))
        for _ in range(max(FEWEST, min(CALLS, int(SECONDS / a_call), EVENTS // max(1, len(graph.node))))):
            run.run(None, dict(feeds))
        calls = list(_calls(json.loads(Path(run.end_profiling()).read_text())))[WARM:]
    of_node = {name: float(np.median([nodes[name] for _, nodes in calls])) for name in calls[0][1]}
    return NetworkTimes(
        variant=variant,
        layers=tuple(_summed(graph, layers_of(graph, written), of_node)),
        call_ms=float(np.median([whole for whole, _ in calls])),
    )


def _calls(events: list[dict[str, Any]]) -> Iterator[tuple[float, Counter[str]]]:
    """Milliseconds of each call and of its operators by name; a call is written after its operators."""
    nodes: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(KERNEL):
            nodes[event["name"].removesuffix(KERNEL)] += event["dur"] / 1e3
        elif event["cat"] == "Session" and event["name"] == "model_run":
            yield event["dur"] / 1e3, nodes
            nodes = Counter()


def _summed(graph: onnx.GraphProto, layers: Sequence[str], of_node: Mapping[str, float]) -> Iterator[LayerTime]:
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node, layer in zip(graph.node, layers, strict=True):
        nodes.setdefault(layer, []).append(node)
    for layer, own in nodes.items():
        products = [in_integers(n.op_type, _attributes(n)) for n in own if n.op_type in MACS]
        # nodes of one name have one entry together
        spent = sum(of_node.get(name, 0.0) for name in {n.name for n in own})
        yield LayerTime(
            layer=layer,
            operators=tuple(dict.fromkeys(n.op_type for n in own)),
            milliseconds=spent,
            integer=all(products) if products else None,
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def layers_of(graph: onnx.GraphProto, written: onnx.GraphProto | None = None) -> list[str]:
    """The layer of every node, in order: the path of the module whose weights it reads.

    Where `graph` is what a runtime made of `written`, nodes that kept their names in it keep their layers, too, though
    their weights were laid out anew.
    """
    known = {} if written is None else _layers_by_name(written)
    made: dict[str, int] = {name: i for i, node in enumerate(graph.node) for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: list[str] = []
    for node in graph.node:
        own = _read(node, ".weight") or _read(node, ".bias") or _kept(node, known)
        if not own and node.op_type in MACS and any(name and name not in made for name in node.input[1:]):
            # A weight that the exporter laid out anew has no name; the bias that is added next has.
            behind = readers.get(node.output[0], [])
            own = [layer for r in behind for layer in _read(r, ".bias") if layer not in _read(r, ".weight")]
        before = [made[name] for name in node.input if name in made]
        found.append(own[0] if own else found[max(before)] if before else INPUTS)
    return found


def _layers_by_name(graph: onnx.GraphProto) -> dict[str, str]:
    """The layer of every node and of what it makes."""
    of_nodes = zip(graph.node, layers_of(graph), strict=True)
    return {name: layer for node, layer in of_nodes for name in (node.name, *node.output) if name}


def _kept(node: onnx.NodeProto, known: Mapping[str, str]) -> list[str]:
    """The layer of the node that this one was made of, as its name says."""
    return [known[name] for name in map(plain_name, (node.name, *node.output)) if name in known][:1]


def _read(node: onnx.NodeProto, kind: str) -> list[str]:
    """The layers whose weights or biases a node reads. A grid's scale may be shared, and says nothing."""
    names = [name for name in node.input if not name.endswith(("_scale", "_zero_point"))]
    return [name.partition(kind)[0] for name in names if kind in name]
