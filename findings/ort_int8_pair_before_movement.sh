#!/usr/bin/env bash
# On x86-64 ONNX Runtime refuses a valid int8 Q/DQ pair before a Reshape or Transpose, from operator set 21 on.
#
# Versions   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64 with AVX512-VNNI, Linux
# Input      QuantizeLinear and DequantizeLinear of int8 or uint8, then a Reshape or a Transpose, then a Relu
# Behaviour  The session is not made: an error of type inference names a QuantizeLinear that is not in the file. The
#            optimizer puts a pair behind the movement, which from operator set 21 on states its type, and then turns
#            int8 into uint8 for the kernels of x86, all but that statement. onnx's checker accepts the file; the basic
#            optimizations and none at all run it; operator set 20 and uint8 are unaffected.
# Seen       operator set 20  int8  Reshape runs, Transpose runs    uint8  Reshape runs, Transpose runs
#            operator set 21  int8  Reshape FAIL, Transpose FAIL    uint8  Reshape runs, Transpose runs
#            FAIL: Node (m_q) Op (QuantizeLinear) [TypeInferenceError] output_dtype INT8 does not match y_zero_point
#            type UINT8.
#            operator set 21, int8, Reshape: ORT_DISABLE_ALL runs, ORT_ENABLE_BASIC runs, ORT_ENABLE_EXTENDED FAIL
# Meaning    Tools that quantize signed activations to int8, as NNCF 3.4 does behind a GRU or a Transpose, write files of
#            operator set 21 that load on ARM and not on x86. Write uint8 activations, or operator set 20, or ask for
#            basic optimizations and lose the integer kernels.
set -euo pipefail
if [ "$(uname -m)" != x86_64 ] || ! grep -qw avx2 /proc/cpuinfo \
    || grep -qwE 'avx_vnni_int8|amx_int8' /proc/cpuinfo; then
    echo "needs an x86-64 CPU with AVX2 and without AVX-VNNI-INT8 and AMX: cannot be shown here"
    exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SHAPE = (2, 3, 4)
MOVED = {"Reshape": (2, 12), "Transpose": (4, 2, 3)}
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")


def model(opset, kind, movement):
    node = (
        helper.make_node("Reshape", ["d", "shape"], ["m"])
        if movement == "Reshape"
        else helper.make_node("Transpose", ["d"], ["m"], perm=[2, 0, 1])
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node,
        helper.make_node("Relu", ["m"], ["y"]),
    ]
    constants = {"scale": np.array(0.05, np.float32), "zero": np.array(0 if kind == np.int8 else 128, kind)}
    if movement == "Reshape":
        constants["shape"] = np.array(MOVED[movement], np.int64)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, MOVED[movement])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def outcome(opset, kind, movement, level="ORT_ENABLE_EXTENDED"):
    """`runs`, or the error of making the session."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    try:
        session = ort.InferenceSession(model(opset, kind, movement), options)
    except Exception as error:
        return str(error)
    x = np.random.default_rng(0).normal(0, 1, SHAPE).astype(np.float32)
    want = np.maximum(np.clip(np.rint(x / 0.05), -128, 127) * 0.05, 0)
    want = want.reshape(MOVED[movement]) if movement == "Reshape" else want.transpose(2, 0, 1)
    assert np.abs(session.run(None, {"x": x})[0] - want).max() < 1e-4
    return "runs"


found, errors = {}, set()
for opset in (20, 21):
    for kind in (np.int8, np.uint8):
        for movement in MOVED:
            said = found[opset, kind, movement] = outcome(opset, kind, movement)
            if said != "runs":
                errors.add(said)
            shown = "runs" if said == "runs" else "FAIL"
            print(f"operator set {opset}  {kind.__name__:5}  {movement:9} {shown}")
for said in errors:
    print(said)
levels = {level: outcome(21, np.int8, "Reshape", level) for level in LEVELS}
print({level: "runs" if said == "runs" else "FAIL" for level, said in levels.items()})
fails = {key for key, said in found.items() if said != "runs"}
holds = fails == {(21, np.int8, movement) for movement in MOVED} and all("output_dtype INT8" in e for e in errors)
holds = holds and [said == "runs" for said in levels.values()] == [True, True, False]
print("the surprise holds" if holds else "CHANGED: int8 pairs before a movement are loaded, or refused otherwise")
sys.exit(not holds)
PY
