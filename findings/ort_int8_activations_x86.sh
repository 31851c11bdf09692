#!/usr/bin/env bash
# On x86-64 ONNX Runtime runs int8 activations far slower than uint8 ones, but only where operators are written out.
#
# Versions   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64 with AVX512-VNNI, Linux, one thread
# Input      a 3 x 3 convolution, 64 -> 64 channels, 28 x 28; a product of 128 x 384 by 384 x 384; int8 weights always
# Behaviour  QLinearConv and MatMulInteger have a fast kernel for uint8 x int8 alone; int8 x int8 falls back to one that
#            is slower than float32. The same convolution as DequantizeLinear, Conv, QuantizeLinear with int8
#            activations is as fast as with uint8: the optimizer moves it to uint8 by itself. It moves nothing that is
#            already an integer operator, and no MatMulInteger.
# Seen       (fastest of 60 calls, measured in turn)
#            QLinearConv   uint8  0.167 ms   int8 1.764 ms   10.6x
#            Q/DQ Conv     uint8  0.185 ms   int8 0.180 ms    1.0x
#            MatMulInteger uint8  0.112 ms   int8 1.118 ms   10.0x
#            Conv, float32 0.534 ms
# Meaning    "int8" in the QOperator format, or a hand-made MatMulInteger with int8 input, costs an order of magnitude
#            on x86 and is right on ARM. Write uint8 activations, or leave Q/DQ pairs for the runtime to fuse.
#            CPUs that have AVX-VNNI-INT8 or AMX may have a kernel for it: there this exits with 77.
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
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

KIND = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8, np.float32: TensorProto.FLOAT}
CONV = {"pads": [1] * 4, "kernel_shape": [3, 3]}
random = np.random.default_rng(0)
images, rows = (1, 64, 28, 28), (128, 384)
filters = random.integers(-64, 65, (64, 64, 3, 3)).astype(np.int8)
matrix = random.integers(-64, 65, (384, 384)).astype(np.int8)


def call(nodes, shape, kinds, constants):
    """A function that runs the model once on random input of kind `kinds[0]`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", KIND[kinds[0]], shape)],
        [helper.make_tensor_value_info("y", kinds[1], shape)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = random.normal(0, 40, shape).astype(kinds[0])
    return lambda: session.run(None, {"x": x})


def quantized(kind):
    zero = 128 if kind == np.uint8 else 0
    number = lambda v, d=np.float32: np.array(v, d)
    return {
        "xs": number(0.5), "xz": number(zero, kind), "ys": number(50), "yz": number(zero, kind),
        "ws": number(0.01), "wz": number(0, np.int8),
    }


def written_out(kind):
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    constants = quantized(kind) | {"w": filters}
    return call([helper.make_node("QLinearConv", inputs, ["y"], **CONV)], images, (kind, KIND[kind]), constants)


def pairs(kind):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["c"], **CONV),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"]),
    ]
    return call(nodes, images, (np.float32, TensorProto.FLOAT), quantized(kind) | {"w": filters})


def product(kind):
    node = helper.make_node("MatMulInteger", ["x", "w", "xz"], ["y"])
    return call([node], rows, (kind, TensorProto.INT32), {"w": matrix, "xz": quantized(kind)["xz"]})


contenders = {
    ("QLinearConv", "uint8"): written_out(np.uint8), ("QLinearConv", "int8"): written_out(np.int8),
    ("Q/DQ Conv", "uint8"): pairs(np.uint8), ("Q/DQ Conv", "int8"): pairs(np.int8),
    ("MatMulInteger", "uint8"): product(np.uint8), ("MatMulInteger", "int8"): product(np.int8),
    ("Conv", "float32"): call(
        [helper.make_node("Conv", ["x", "w"], ["y"], **CONV)], images, (np.float32, TensorProto.FLOAT),
        {"w": filters.astype(np.float32)},
    ),
}
best = dict.fromkeys(contenders, 1e9)
for turn in range(70):
    for name, run in contenders.items():
        start = time.perf_counter()
        run()
        if turn >= 10:
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
for (operator, kind), milliseconds in best.items():
    print(f"{operator:13} {kind:7} {milliseconds:6.3f} ms")
ratio = {n: best[n, "int8"] / best[n, "uint8"] for n in ("QLinearConv", "Q/DQ Conv", "MatMulInteger")}
print("int8 takes " + ", ".join(f"{r:.1f}x as long in {n}" for n, r in ratio.items()))
holds = ratio["QLinearConv"] > 2 and ratio["MatMulInteger"] > 2 and ratio["Q/DQ Conv"] < 1.5
print("the surprise holds" if holds else "CHANGED: int8 activations are no longer slow in these two operators alone")
sys.exit(not holds)
PY
