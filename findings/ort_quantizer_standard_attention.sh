#!/usr/bin/env bash
# ONNX Runtime's quantizer takes ONNX's own Attention (operator set 23) for the operator of that name in com.microsoft:
# what quantize_dynamic writes of a valid model by default does not load.
#
# Versions   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; Linux, Python 3.11
# Input      a model of one standard Attention [1, 2, 4, 8] with a cache behind a MatMul with a constant weight
# Behaviour  Operators are looked up by their type alone, without their domain. Both Attentions are looked for by default;
#            the standard one becomes com.microsoft.QAttention with the standard one's inputs and outputs. No message is
#            given when it is written; the session says that the node's outputs are too many.
# Seen       before: loads and runs    after quantize_dynamic(model, out): INVALID_GRAPH, QAttention
#            with op_types_to_quantize=["MatMul"]: loads and runs, with MatMulInteger
# Meaning    Decoders in standard operators (operator set 23 and later) cannot be quantized with the tool's defaults: name
#            the operators. A check of the written file is the only way to see it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 sympy || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.CRITICAL)
HEADS, TOKENS, WIDTH = 2, 4, 8
random = np.random.default_rng(0)
weight = numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH)).astype(np.float32), "w")
nodes = [
    helper.make_node("MatMul", ["x", "w"], ["q"]),
    helper.make_node("Attention", ["q", "x", "x", "", "past_k", "past_v"], ["y", "k", "v"]),
]
info = helper.make_tensor_value_info
tensor = lambda name, tokens: info(name, TensorProto.FLOAT, [1, HEADS, tokens, WIDTH])
graph = helper.make_graph(
    nodes, "g", [tensor("x", TOKENS), tensor("past_k", 3), tensor("past_v", 3)],
    [tensor("y", TOKENS), tensor("k", 3 + TOKENS), tensor("v", 3 + TOKENS)], [weight],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "model.onnx")
quantize_dynamic("model.onnx", "default.onnx")
quantize_dynamic("model.onnx", "named.onnx", op_types_to_quantize=["MatMul"])
feeds = {n: random.standard_normal((1, HEADS, t, WIDTH)).astype(np.float32) for n, t in (("x", TOKENS), ("past_k", 3), ("past_v", 3))}


def seen(path):
    try:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        return "INVALID_GRAPH, QAttention" if "INVALID_GRAPH" in str(error) and "QAttention" in str(error) else str(error)
    return f"runs, {[list(y.shape) for y in session.run(None, feeds)]}"


found = {p: seen(p) for p in ("model.onnx", "default.onnx", "named.onnx")}
kinds = {p: Counter(n.op_type for n in onnx.load(p).graph.node) for p in ("default.onnx", "named.onnx")}
for name, said in found.items():
    print(f"{name:14} {said}")
holds = found["model.onnx"].startswith("runs") and found["named.onnx"].startswith("runs")
holds &= found["default.onnx"] == "INVALID_GRAPH, QAttention" and kinds["default.onnx"]["QAttention"] == 1
holds &= kinds["named.onnx"]["MatMulInteger"] == 1 and kinds["named.onnx"]["Attention"] == 1
sys.exit(0 if holds else 1)
PY
echo "as described"
