#!/usr/bin/env bash
# One ONNX AveragePool with ceil_mode and counted padding has three answers in four runtimes.
#
# Versions   onnx 1.23.2, onnxruntime 1.32.0, openvino 2026.4.1, tract 0.23.9, opencv-python-headless 5.0.0.93,
#            numpy 2.4.6; x86-64, Linux
# Input      AveragePool with ceil_mode=1, operator set 20, on random values from 1 to 2, 1 x 2 x 7 x 7, where the last
#            window reaches over the edge: kernel 2 and stride 2 without padding; kernel 4, stride 3 and padding 1, the
#            padding counted and not counted
# Behaviour  What lies beyond the padded image belongs to no window: ONNX's reference, ONNX Runtime and tract divide by
#            the part of the window within it, as PyTorch does. OpenVINO and OpenCV's default engine divide by the whole
#            kernel once count_include_pad is 1; OpenCV does so without any padding, too. OpenCV's classic engine does
#            not count the padding at all in this file.
# Seen       (result / definition; not listed: 1.000 to 1.000)
#            kernel 2, stride 2, count_include_pad 1; OpenCV, default engine: 0.250 to 1.000
#            kernel 4, stride 3, padding counted; OpenVINO: 0.562 to 1.000
#            kernel 4, stride 3, padding counted; OpenCV, default engine: 0.562 to 1.000
#            kernel 4, stride 3, padding counted; OpenCV, classic engine: 1.000 to 2.250
# Meaning    PyTorch's AvgPool2d(2, ceil_mode=True) is exported with count_include_pad=1, its default, and is such a
#            file. Only the borders are wrong, which a global pooling behind it dilutes. Where a network is meant for
#            several runtimes, say count_include_pad=False if there is no padding, and otherwise pad explicitly.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 tract==0.23.9 opencv-python-headless==5.0.0.93 numpy==2.4.6 \
    || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import openvino
import tract
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

CASES = {
    "kernel 2, stride 2, count_include_pad 0": {"kernel_shape": [2, 2], "strides": [2, 2], "count_include_pad": 0},
    "kernel 2, stride 2, count_include_pad 1": {"kernel_shape": [2, 2], "strides": [2, 2], "count_include_pad": 1},
    "kernel 4, stride 3, padding counted": {
        "kernel_shape": [4, 4], "strides": [3, 3], "pads": [1] * 4, "count_include_pad": 1
    },
    "kernel 4, stride 3, padding not counted": {
        "kernel_shape": [4, 4], "strides": [3, 3], "pads": [1] * 4, "count_include_pad": 0
    },
}
x = (1 + np.random.default_rng(0).random((1, 2, 7, 7))).astype(np.float32)


def by_opencv(engine):
    network = cv2.dnn.readNetFromONNX("pool.onnx", engine)
    network.setInput(x)
    return network.forward()


def by_openvino():
    core = openvino.Core()
    return core.compile_model(core.read_model("pool.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]


def by_tract():
    return tract.onnx().load("pool.onnx").into_model().into_runnable().run([x])[0].to_numpy()


RUNTIMES = {
    "ONNX reference": lambda: ReferenceEvaluator("pool.onnx").run(None, {"x": x})[0],
    "ONNX Runtime": lambda: ort.InferenceSession("pool.onnx").run(None, {"x": x})[0],
    "tract": by_tract,
    "OpenVINO": by_openvino,
    "OpenCV, default engine": lambda: by_opencv(cv2.dnn.ENGINE_AUTO),
    "OpenCV, classic engine": lambda: by_opencv(cv2.dnn.ENGINE_CLASSIC),
}


def defined(kernel_shape, strides, count_include_pad, pads=(0,) * 4):
    """Sums over the image, divided by how much of the window lies in the padded (or the bare) image."""
    (kernel, _), (stride, _), pad = kernel_shape, strides, pads[0]
    size = x.shape[2]
    starts = [s for s in range(-pad, size, stride) if s == -pad or s - stride + kernel < size + pad]
    out = np.zeros((*x.shape[:2], len(starts), len(starts)))
    edge = pad if count_include_pad else 0
    inside = [min(s + kernel, size + edge) - max(s, -edge) for s in starts]
    for i, top in enumerate(starts):
        for j, left in enumerate(starts):
            window = x[:, :, max(top, 0):top + kernel, max(left, 0):left + kernel]
            out[:, :, i, j] = window.sum((2, 3)) / (inside[i] * inside[j])
    return out


wrong = {}
for case, attributes in CASES.items():
    wanted = defined(**attributes)
    node = helper.make_node("AveragePool", ["x"], ["y"], ceil_mode=1, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, wanted.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "pool.onnx")
    for name, run in RUNTIMES.items():
        got = np.asarray(run())
        ratio = got / wanted
        wrong[case, name] = bool(abs(ratio - 1).max() > 0.01)
        print(f"{case}; {name}: {ratio.min():.3f} to {ratio.max():.3f}")
plain, counted = "kernel 2, stride 2, count_include_pad 1", "kernel 4, stride 3, padding counted"
holds = {key for key, bad in wrong.items() if bad} == {
    (plain, "OpenCV, default engine"), (counted, "OpenVINO"),
    (counted, "OpenCV, default engine"), (counted, "OpenCV, classic engine"),
}
print("the surprise holds" if holds else "CHANGED: other runtimes divide by other sizes now")
sys.exit(not holds)
PY
