#!/usr/bin/env bash
# Layers that a forward computes under torch.no_grad(), or with autocast off, are not quantized, and nothing says so.
#
# Versions   torch 2.13.0 (CPU), torchao 0.18.0, numpy 2.4.6
# Input      two 3 x 3 convolutions and a linear layer, images of 16 x 16, batch 4; the convolutions are called plainly,
#            under torch.no_grad() as a frozen backbone is, or under torch.autocast("cpu", enabled=False)
# Behaviour  torch.export keeps such a part as one operator with a graph of its own, and torchao's PT2E quantization
#            looks at the outer graph alone: the part is never annotated, calibrated or converted. The three models
#            compute the same before; no warning, no error, and the result of convert_pt2e runs.
# Seen       called plainly: 3 of 3 layers read dequantized weights
#            under torch.no_grad(): 1 of 3 layers read dequantized weights
#            with autocast off: 1 of 3 layers read dequantized weights
# Meaning    A model whose authors froze its backbone in forward, or kept a part in float32 by switching autocast off,
#            stays float where nearly all of its time goes. Count what was converted; replace the part by its operators
#            (torch.ops.higher_order.wrap_with_set_grad_enabled and wrap_with_autocast in the exported graph).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    && "$work/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps torchao==0.18.0 \
    || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - 2>/dev/null <<'PY'
import contextlib
import sys
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore")
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

WAYS = {
    "called plainly": contextlib.nullcontext,
    "under torch.no_grad()": torch.no_grad,
    "with autocast off": lambda: torch.autocast("cpu", enabled=False),
}
LAYERS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 10)
        self.way = way

    def forward(self, x):
        with WAYS[self.way]():
            x = self.backbone(x)
        return self.head(x.mean((2, 3)))


def quantized(way):
    """Layers of the converted model, and those among them whose weight is dequantized; and the float answer."""
    net = Net(way).eval()
    with torch.no_grad():
        answer = net(x)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    layers = []
    for module in converted.modules():
        if isinstance(module, torch.fx.GraphModule):
            layers += [n for n in module.graph.nodes if n.op == "call_function" and n.target in LAYERS]
    integer = [n for n in layers if "dequantize" in str(n.args[1].target)]
    return len(layers), len(integer), answer


found = {way: quantized(way) for way in WAYS}
for way, (layers, integer, _) in found.items():
    print(f"{way}: {integer} of {layers} layers read dequantized weights")
same = all(torch.equal(answer, found["called plainly"][2]) for _, _, answer in found.values())
holds = same and [(a, b) for a, b, _ in found.values()] == [(3, 3), (3, 1), (3, 1)]
print("the surprise holds" if holds else "CHANGED: other layers are quantized now")
sys.exit(not holds)
PY
