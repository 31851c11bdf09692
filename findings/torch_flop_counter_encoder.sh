#!/usr/bin/env bash
# PyTorch's own FLOP counter counts nothing at all for an encoder in the very mode in which it is measured.
#
# Versions   torch 2.13.0, numpy 2.4.6
# Input      torch.nn.TransformerEncoder, 2 layers, width 64, 4 heads, feed-forward 256, texts of 16 tokens, batch 2
# Behaviour  In eval mode under torch.no_grad() every layer is one fused operator, for which FlopCounterMode has no
#            formula and which it does not take apart: the count is 0. With gradients recorded, or without the fast
#            path, it is that of the six matrices of each layer; the two products of attention itself are left out on a
#            CPU in any case. torch.nn.LSTM is 0 in both modes, torch.nn.GRU is counted in both.
# Seen       TransformerEncoder: 0 without gradients, 6,291,456 with; its matrices alone are 6,291,456
#            LSTM: 0 without gradients, 0 with; its matrices alone are 2,097,152
#            GRU: 1,572,864 without gradients, 1,572,864 with; its matrices alone are 1,572,864
#            TransformerEncoder without its fast path: 6,291,456 without gradients
# Meaning    A pruning budget in FLOPs that is taken from this counter says that an encoder is free, and an LSTM too.
#            Count with gradients on, or after torch.backends.mha.set_fastpath_enabled(False), and hold the result
#            against a formula of one's own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

warnings.filterwarnings("ignore")
torch.manual_seed(0)
batch, tokens, width, inner, layers = 2, 16, 64, 256, 2
x = torch.randn(batch, tokens, width)
layer = torch.nn.TransformerEncoderLayer(width, 4, inner, dropout=0, batch_first=True)
networks = {
    "TransformerEncoder": torch.nn.TransformerEncoder(layer, layers),
    "LSTM": torch.nn.LSTM(width, width, batch_first=True),
    "GRU": torch.nn.GRU(width, width, batch_first=True),
}
multiply_adds = {
    "TransformerEncoder": layers * batch * tokens * (4 * width**2 + 2 * width * inner),  # without attention's products
    "LSTM": batch * tokens * 4 * 2 * width**2,
    "GRU": batch * tokens * 3 * 2 * width**2,
}


def count(network, gradients):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
        network(x)
    return counter.get_total_flops()


found = {}
for name, network in networks.items():
    network.eval()
    found[name] = count(network, False), count(network, True)
    print(f"{name}: {found[name][0]:,} without gradients, {found[name][1]:,} with; "
          f"its matrices alone are {2 * multiply_adds[name]:,}")
torch.backends.mha.set_fastpath_enabled(False)
slow = count(networks["TransformerEncoder"], False)
print(f"TransformerEncoder without its fast path: {slow:,} without gradients")
holds = (
    found["TransformerEncoder"] == (0, 2 * multiply_adds["TransformerEncoder"])
    and slow == 2 * multiply_adds["TransformerEncoder"]
    and found["LSTM"] == (0, 0)
    and found["GRU"] == (2 * multiply_adds["GRU"],) * 2
)
print("the surprise holds" if holds else "CHANGED: the counts are others now")
sys.exit(not holds)
PY
