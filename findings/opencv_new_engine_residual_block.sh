#!/usr/bin/env bash
# OpenCV 5's default engine refuses a quantized residual block that its own older engine runs exactly.
#
# Versions   opencv-python-headless 5.0.0.93, onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64, Linux
# Input      a quantized residual block (uint8 activations, int8 weights per channel, 16 channels, seeded): conv, ReLU,
#            Q/DQ, conv, Q/DQ, Add with the block's input, ReLU, Q/DQ; and the same without its first ReLU, its last
#            one, and both
# Behaviour  With both ReLUs cv2.dnn.readNetFromONNX succeeds and the first forward() raises an assertion of its own
#            about an argument without a buffer. Either ReLU alone runs. ENGINE_CLASSIC, the engine of OpenCV 4, runs
#            all four and gives the integers of the definition (ONNX Runtime with optimizations off).
# Seen       first ReLU True, last ReLU True, default engine: raised on forward(): bufidx >= 0
#            the three others, default engine: 0.00 %, 0.02 % and 0.02 % of the integers differ
#            all four, classic engine: 0.00 % of the integers differ
# Meaning    A file that loads is not one that runs: call forward() once when a network is loaded. For such ResNets ask
#            for cv2.dnn.readNetFromONNX(file, cv2.dnn.ENGINE_CLASSIC).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    opencv-python-headless==5.0.0.93 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 \
    || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - 2> log <<'PY' || { status=$?; tail -3 log; exit $status; }
import sys

import cv2
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SHAPE, STEP = 16, [1, 16, 16, 16], 4.5


def block(first_relu, last_relu):
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
    y = convolution(x, "a")
    y = rounded(node("Relu", [y], "r"), 0.15, 0, "h") if first_relu else rounded(y, 0.3, 128, "h")
    y = node("Add", [rounded(convolution(y, "b"), 3.6, 128, "c"), x], "s")
    y = rounded(node("Relu", [y], "o"), STEP, 0, "y") if last_relu else rounded(y, STEP, 128, "y")
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, SHAPE)], constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


def integers(values):
    return np.rint(values / STEP).astype(int)


def forward(engine, x):
    """(share of integers that differ in percent, what was raised)"""
    try:
        network = cv2.dnn.readNetFromONNX("block.onnx", engine)
    except cv2.error as error:
        return 100.0, "on reading: " + error.err
    try:
        network.setInput(x)
        return 100 * float((integers(network.forward()) != wanted).mean()), ""
    except cv2.error as error:
        return 100.0, "on forward(): " + error.err


x = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
holds = True
for first in (True, False):
    for last in (True, False):
        model = block(first, last)
        onnx.save(model, "block.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        wanted = integers(ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0])
        for name, engine in (("default", cv2.dnn.ENGINE_AUTO), ("classic", cv2.dnn.ENGINE_CLASSIC)):
            share, raised = forward(engine, x)
            print(f"first ReLU {first}, last ReLU {last}, {name} engine: "
                  + (f"raised {raised}" if raised else f"{share:.2f} % of the integers differ"))
            if name == "default" and first and last:
                holds &= raised.startswith("on forward()")
            else:
                holds &= not raised and share < 0.5
print("the surprise holds" if holds else "CHANGED: other blocks run now, or with other results")
sys.exit(not holds)
PY
