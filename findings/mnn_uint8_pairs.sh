#!/usr/bin/env bash
# MNN converts uint8 quantize/dequantize pairs of an ONNX file into other numbers; int8 ones are exact.
#
# Versions   MNN 3.6.1, onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64, Linux
# Input      QuantizeLinear and DequantizeLinear per tensor, scale 0.05, with uint8 and int8 zero points, on 256 random
#            values; the file is converted with mnnconvert at its defaults
# Behaviour  With uint8, whatever the zero point, every number comes out exactly 128 steps too low; a ReLU behind it
#            lets nothing through then. With int8 there is no difference. A convolution behind any such pair finds its
#            channels in the batch's place: forward() prints an error and gives an empty list instead of raising.
# Seen       int8, zero point 0 and -28, then nothing or Relu: MNN minus ONNX Runtime is 0.0 to 0.0 steps
#            uint8, zero point 128, 100 and 0, then nothing: MNN minus ONNX Runtime is -128.0 to -128.0 steps
#            uint8, zero point 128, 100 and 0, then Relu: MNN minus ONNX Runtime is -57.0 to 0.0 steps
#            all five, then Conv: no output
# Meaning    The grid that x86 runtimes want (uint8) is the one that does not survive. mnnconvert says "Converted
#            Success!" for each of these files. Convert the float file and let MNN quantize it, and compare outputs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    MNN==3.6.1 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 || { echo "packages could not be installed"; exit 2; }
cd "$work"
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" - > log <<'PY' || { status=$?; grep '^| ' log; exit $status; }
import subprocess
import sys

import MNN
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SCALE, SHAPE = 0.05, [1, 4, 8, 8]


def model(kind, zero_point, then):
    constants = {"s": np.float32(SCALE), "z": np.array(zero_point, kind)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d" if then else "y"]),
    ]
    if then == "Relu":
        nodes.append(helper.make_node("Relu", ["d"], ["y"]))
    elif then == "Conv":
        constants["w"] = np.random.default_rng(0).normal(0, 0.2, (4, 4, 3, 3)).astype(np.float32)
        nodes.append(helper.make_node("Conv", ["d", "w"], ["y"], pads=[1] * 4, kernel_shape=[3, 3]))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made


def by_mnn(x):
    convert = ["mnnconvert", "-f", "ONNX", "--modelFile", "m.onnx", "--MNNModel", "m.mnn", "--bizCode", "x"]
    said = subprocess.run(convert, check=True, capture_output=True, text=True).stdout
    assert "Converted Success" in said
    network = MNN.nn.load_module_from_file("m.mnn", ["x"], ["y"])
    outputs = network.forward([MNN.expr.const(x.ravel().tolist(), list(x.shape), MNN.expr.NCHW)])
    if not outputs:
        return None
    return np.array(MNN.expr.convert(outputs[0], MNN.expr.NCHW).read()).reshape(x.shape)


x = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
found = {}
for kind, zero_point in ((np.int8, 0), (np.int8, -28), (np.uint8, 128), (np.uint8, 100), (np.uint8, 0)):
    for then in (None, "Relu", "Conv"):
        made = model(kind, zero_point, then)
        onnx.save(made, "m.onnx")
        wanted = ort.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})[0]
        got = by_mnn(x)
        if got is None:
            found[kind, zero_point, then] = text = "no output"
        else:
            levels = (got - wanted) / SCALE
            found[kind, zero_point, then] = round(float(levels.min()), 2), round(float(levels.max()), 2)
            text = f"MNN minus ONNX Runtime is {levels.min():.1f} to {levels.max():.1f} steps"
        print(f"| {kind.__name__}, zero point {zero_point}, then {then or 'nothing'}: {text}")
shifted = [v for (kind, _, then), v in found.items() if kind == np.uint8 and not then]
exact = [v for (kind, _, then), v in found.items() if kind == np.int8 and then != "Conv"]
behind = [v for (_, _, then), v in found.items() if then == "Conv"]
holds = set(shifted) == {(-128.0, -128.0)} and set(exact) == {(0.0, 0.0)} and set(behind) == {"no output"}
print("| the surprise holds" if holds else "| CHANGED: other pairs are right now, or wrong otherwise")
sys.exit(not holds)
PY
grep '^| ' log
