#!/usr/bin/env bash
# OpenVINO leaves out the rounding of a convolution's quantized output where a residual Add follows.
#
# Versions   openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64 with AVX512-VNNI, Linux
# Input      a quantized residual block (uint8 activations, int8 weights per channel, 16 channels, seeded): conv, ReLU,
#            Q/DQ, conv, Q/DQ, Add with the block's input, ReLU, Q/DQ
# Behaviour  The second convolution and the Add run as one operator, which adds the convolution's *unrounded* result to
#            the shortcut: the Q/DQ pair between them is gone, and the integers that come out are exactly those of the
#            file without that pair. EXECUTION_MODE_HINT=ACCURACY changes nothing.
# Seen       OpenVINO: 8.57 % of the integers differ, by up to 1
#            OpenVINO, for accuracy: 8.57 % of the integers differ, by up to 1
#            ONNX Runtime, optimized: 0.00 % of the integers differ, by up to 0
#            OpenVINO against the file without that pair: 0.00 % of the integers differ, by up to 0
# Meaning    Rounding once less is no loss by itself, but these are not the numbers that the quantized network was
#            trained and judged with, and every residual block does it again. Compare decisions, not integers, between
#            the two runtimes, and measure accuracy in the one that is deployed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 \
    || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnxruntime as ort
import openvino
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SHAPE, STEP = 16, [1, 16, 16, 16], 4.5


def block(round_before_add):
    random = np.random.default_rng(0)
    constants, nodes = [], []

    def constant(name, value, kind=np.float32):
        constants.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def node(operator, inputs, name, **attributes):
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def rounded(value, scale, zero_point, name):
        grid = [constant(name + "_s", scale), constant(name + "_z", zero_point, np.uint8)]
        quantized = node("QuantizeLinear", [value, *grid], name + "_q")
        return node("DequantizeLinear", [quantized, *grid], name + "_d")

    def convolution(value, name):
        weight = constant(name + "_w", random.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)), np.int8)
        scale = constant(name + "_ws", random.uniform(0.005, 0.01, CHANNELS))
        zero = constant(name + "_wz", np.zeros(CHANNELS), np.int8)
        bias = constant(name + "_b", random.normal(0, 1, CHANNELS))
        weight = node("DequantizeLinear", [weight, scale, zero], name + "_wd", axis=0)
        return node("Conv", [value, weight, bias], name, pads=[1] * 4, kernel_shape=[3, 3])

    x = rounded("x", 0.02, 128, "in")
    y = convolution(rounded(node("Relu", [convolution(x, "a")], "r"), 0.15, 0, "h"), "b")
    if round_before_add:
        y = rounded(y, 3.6, 128, "c")
    y = rounded(node("Relu", [node("Add", [y, x], "s")], "o"), STEP, 0, "y")
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, SHAPE)], constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def integers(values):
    return np.rint(values / STEP).astype(int)


def by_definition(model, x):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return integers(ort.InferenceSession(model, options).run(None, {"x": x})[0])


def by_openvino(model, x, **hints):
    core = openvino.Core()
    return integers(core.compile_model(core.read_model(model), "CPU", hints)([x])[0])


def apart(a, b):
    return 100 * float((a != b).mean()), int(abs(a - b).max())


x = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
file, without = block(True), block(False)
wanted, got = by_definition(file, x), by_openvino(file, x)
differ = {
    "OpenVINO": apart(got, wanted),
    "OpenVINO, for accuracy": apart(by_openvino(file, x, EXECUTION_MODE_HINT="ACCURACY"), wanted),
    "ONNX Runtime, optimized": apart(integers(ort.InferenceSession(file).run(None, {"x": x})[0]), wanted),
    "OpenVINO against the file without that pair": apart(got, by_definition(without, x)),
}
for name, (share, most) in differ.items():
    print(f"{name}: {share:.2f} % of the integers differ, by up to {most}")
ours, accurate, fused, unpaired = (share for share, _ in differ.values())
holds = min(ours, accurate) > 3 and max(fused, unpaired) < 0.5
print("the surprise holds" if holds else "CHANGED: OpenVINO rounds before the Add, or ONNX Runtime does not")
sys.exit(not holds)
PY
