#!/usr/bin/env bash
# The ONNX package's reference evaluator cannot run quantized files below operator set 19.
#
# Versions   onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6
# Input      QuantizeLinear and DequantizeLinear of two numbers, per tensor, int8, in operator sets 10 to 23
# Behaviour  DequantizeLinear is there in versions 19 and up only, so that every Q/DQ file of sets 10 to 18 raises
#            "No implementation for operator 'DequantizeLinear'", although the checker accepts it, runtimes run it, and
#            QuantizeLinear itself is implemented in version 10. Of an all-zero tensor its DynamicQuantizeLinear makes
#            another scale (1 / 255) than ONNX Runtime (1).
# Seen       sets 10, 13, 17, 18: ONNX Runtime [0.1, 0.3]; reference: No implementation for operator 'DequantizeLinear'
#            sets 19, 21, 23: both [0.1, 0.3]; converted to 21: the reference runs all of them
#            scale of zeros by DynamicQuantizeLinear: reference 0.003922, ONNX Runtime 1.000000
# Meaning    The reference is no referee for a quantized file whose float model was exported with one of those sets.
#            Convert with onnx.version_converter first, or use ONNX Runtime with graph optimizations off.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator


def model(nodes, outputs, opset, constants=()):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info(n, k, s) for n, k, s in outputs], constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made


def outcome(evaluate):
    try:
        return [round(v, 6) for v in evaluate()[0].tolist()]
    except RuntimeError as error:
        return str(error).split(" domain")[0]


x = np.array([0.11, 0.3], np.float32)
scale, zero = (numpy_helper.from_array(np.array(v), n) for v, n in ((np.float32(0.1), "s"), (np.int8(0), "z")))
pair = [
    helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
]
raised, ran = [], []
for opset in (10, 13, 17, 18, 19, 21, 23):
    file = model(pair, [("y", TensorProto.FLOAT, [2])], opset, [scale, zero])
    runtime = outcome(lambda: ort.InferenceSession(file.SerializeToString()).run(None, {"x": x}))
    reference = outcome(lambda: ReferenceEvaluator(file).run(None, {"x": x}))
    newer = outcome(lambda: ReferenceEvaluator(version_converter.convert_version(file, 21)).run(None, {"x": x}))
    (raised if isinstance(reference, str) else ran).append(opset)
    print(f"set {opset}: ONNX Runtime {runtime}; reference: {reference}; converted to 21: {newer}")
outputs = [("q", TensorProto.UINT8, [2]), ("s", TensorProto.FLOAT, []), ("z", TensorProto.UINT8, [])]
dynamic = model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], outputs, 17)
zeros = {"x": np.zeros(2, np.float32)}
session = ort.InferenceSession(dynamic.SerializeToString())
scales = ReferenceEvaluator(dynamic).run(None, zeros)[1], session.run(None, zeros)[1]
print(f"scale of zeros by DynamicQuantizeLinear: reference {scales[0]:.6f}, ONNX Runtime {scales[1]:.6f}")
holds = raised == [10, 13, 17, 18] and ran == [19, 21, 23] and scales[0] != scales[1]
print("the surprise holds" if holds else "CHANGED: other operator sets run now, or the scales agree")
sys.exit(not holds)
PY
