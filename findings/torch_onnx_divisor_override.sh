#!/usr/bin/env bash
# PyTorch's dynamo exporter to ONNX loses `divisor_override` of average pooling and says nothing.
#
# Versions   torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, onnx-ir 1.1.0, onnxruntime 1.32.0, numpy 2.4.6
# Input      torch.nn.AvgPool2d(2, divisor_override=3) on random values from 1 to 2
# Behaviour  The file has a plain AveragePool with the kernel's size as its divisor: every output is 3/4 of what it
#            should be. ONNX has no such attribute, so the divisor needs a Mul. The export warns of nothing, and the
#            file passes the full check of onnx.checker.
# Seen       divisor_override=None: AveragePool; exported / module from 1.0000 to 1.0000; warnings about it: 0
#            divisor_override=3: AveragePool; exported / module from 0.7500 to 0.7500; warnings about it: 0
#            divisor_override=1: AveragePool; exported / module from 0.2500 to 0.2500; warnings about it: 0
# Meaning    Sum pooling written as AvgPool2d(k, divisor_override=1) is wrong by k * k after export. Compare the outputs
#            of every exported file with the module's, and write the factor as a product of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 numpy==2.4.6 \
    || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import contextlib
import io
import logging
import sys
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import torch

x = 1 + torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
ratios = {}
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # speaks of torchvision
for divisor in (None, 3, 1):
    module = torch.nn.AvgPool2d(2, divisor_override=divisor).eval()
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
        warnings.simplefilter("always")
        torch.onnx.export(module, (x,), "pool.onnx", dynamo=True, verbose=False)
    model = onnx.load("pool.onnx")
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession("pool.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ratio = got / module(x).numpy()
    operators = " ".join(n.op_type for n in model.graph.node)
    about = [w for w in warned if "divisor" in str(w.message)] + ["said"] * ("divisor" in said.getvalue())
    ratios[divisor] = ratio
    print(f"divisor_override={divisor}: {operators}; exported / module from {ratio.min():.4f} to {ratio.max():.4f}; "
          f"warnings about it: {len(about)}")
    if about:
        sys.exit("CHANGED: the exporter says that the divisor is lost")
holds = np.allclose(ratios[None], 1) and np.allclose(ratios[3], 3 / 4) and np.allclose(ratios[1], 1 / 4)
print("the surprise holds" if holds else "CHANGED: the exported file no longer ignores the divisor")
sys.exit(not holds)
PY
