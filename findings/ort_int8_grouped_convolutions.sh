#!/usr/bin/env bash
# Grouped INT8 convolutions take longer in ONNX Runtime than the ungrouped one that has many times their arithmetic.
#
# Versions   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64 with AVX512-VNNI, Linux, one thread
# Input      a 3 x 3 convolution, 64 -> 64 channels, 28 x 28, in 1 to 64 groups: QLinearConv (uint8 activations, int8
#            weights) and float32 Conv; and 12 -> 12 against 16 -> 16 channels, 32 x 32, ungrouped
# Behaviour  The more groups, the slower: with 32 groups QLinearConv has a 32nd of the arithmetic of the whole
#            convolution and takes several times as long, and several times as long as float32, which stays level.
#            Depthwise ones (as many groups as channels) are out of the pattern and fast. 12 channels take longer
#            than 16.
# Seen       (fastest of 60 calls, measured in turn)
#            64 channels in  1 groups,  28.9 MMAC: int8 0.194 ms, float32 0.585 ms
#            64 channels in  4 groups,   7.2 MMAC: int8 0.288 ms, float32 0.215 ms
#            64 channels in 16 groups,   1.8 MMAC: int8 0.791 ms, float32 0.300 ms
#            64 channels in 32 groups,   0.9 MMAC: int8 1.451 ms, float32 0.282 ms
#            64 channels in 64 groups,   0.5 MMAC: int8 0.079 ms, float32 0.100 ms
#            12 channels in  1 groups,   1.3 MMAC: int8 0.091 ms, float32 0.079 ms
#            16 channels in  1 groups,   2.4 MMAC: int8 0.060 ms, float32 0.081 ms
# Meaning    Networks of grouped convolutions (ResNeXt, RegNet) can get slower by INT8, and turning a convolution
#            into groups to save MACs does not save INT8 time. Leave grouped layers in float, or do not group. Pruning
#            to a number of channels that is no multiple of 16 can cost more time than it saves.
#            On CPUs without VNNI it was not looked at: there this exits with 77.
set -euo pipefail
if [ "$(uname -m)" != x86_64 ] || ! grep -qwE 'avx512_vnni|avx_vnni' /proc/cpuinfo; then
    echo "needs an x86-64 CPU with VNNI: cannot be shown here"
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

random = np.random.default_rng(0)


def call(kind, channels, size, groups):
    """A function that runs one convolution once."""
    shape = [1, channels, size, size]
    attributes = {"pads": [1] * 4, "kernel_shape": [3, 3], "group": groups}
    weight = random.integers(-64, 65, (channels, channels // groups, 3, 3))
    if kind == "int8":
        constants = {
            "xs": np.float32(0.5), "xz": np.uint8(128), "w": weight.astype(np.int8), "ws": np.float32(0.01),
            "wz": np.int8(0), "ys": np.float32(50), "yz": np.uint8(128),
        }
        node = helper.make_node("QLinearConv", ["x", *constants], ["y"], **attributes)
        element, x = TensorProto.UINT8, random.integers(0, 256, shape).astype(np.uint8)
    else:
        constants = {"w": weight.astype(np.float32)}
        node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
        element, x = TensorProto.FLOAT, random.normal(0, 1, shape).astype(np.float32)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), options)
    return lambda: session.run(None, {"x": x})


shapes = [(64, 28, groups) for groups in (1, 4, 16, 32, 64)] + [(12, 32, 1), (16, 32, 1)]
contenders = {(kind, *shape): call(kind, *shape) for shape in shapes for kind in ("int8", "float32")}
best = dict.fromkeys(contenders, 1e9)
for turn in range(70):
    for name, run in contenders.items():
        start = time.perf_counter()
        run()
        if turn >= 10:
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
for channels, size, groups in shapes:
    int8, float32 = (best[kind, channels, size, groups] for kind in ("int8", "float32"))
    mmac = channels * channels // groups * 9 * size * size / 1e6
    print(f"{channels} channels in {groups:2} groups, {mmac:5.1f} MMAC: int8 {int8:.3f} ms, float32 {float32:.3f} ms")
whole, split = best["int8", 64, 28, 1], best["int8", 64, 28, 32]
narrow, wider = best["int8", 12, 32, 1], best["int8", 16, 32, 1]
print(f"32 groups take {split / whole:.1f}x as long as none in int8, "
      f"{split / best['float32', 64, 28, 32]:.1f}x as long as in float32; "
      f"12 channels take {narrow / wider:.1f}x as long as 16")
holds = split > 2 * whole and split > 2 * best["float32", 64, 28, 32] and narrow > 1.15 * wider
print("the surprise holds" if holds else "CHANGED: grouped or narrow convolutions are no longer slow in int8")
sys.exit(not holds)
PY
