#!/usr/bin/env bash
# torch-pruning cuts the wrong columns of a linear layer behind a channels-last flatten, and nothing raises.
#
# Versions   torch-pruning 1.6.1, torch 2.13.0, numpy 2.4.6
# Input      Conv2d(3, 8) on 8 x 8 images, then permute(0, 2, 3, 1).flatten(1) (the order of networks that came from
#            Keras or TFLite) and Linear(8 * 64, 5); the same with flatten(1) alone, and a flip of the channels before a
#            second convolution. Channels 1 and 3 of the convolution are cut.
# Behaviour  The dependency graph knows how many channels a reshape makes of one, not in which order: a permute or a
#            flip of axes passes indices through unchanged. It takes columns 64..127 and 192..255 of the linear layer,
#            which are pixels of all channels. Shapes fit, check_pruning_group() says True, the network runs.
# Seen       flatten: check_pruning_group True; cut and silenced network differ by up to 0.000000,
#            outputs are up to 0.537
#            channels-last flatten: check_pruning_group True; ... by up to 0.729283, outputs are up to 0.495
#            flip: check_pruning_group True; ... by up to 0.135248, outputs are up to 0.153
# Meaning    The damage looks like pruning's usual loss of accuracy, and fine-tuning hides part of it. After each cut,
#            compare with the uncut network whose consumers have those channels' weights at zero: it must be equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    torch-pruning==1.6.1 torch==2.13.0 numpy==2.4.6 || { echo "packages could not be installed"; exit 2; }
cd "$work"
"$work/venv/bin/python" - <<'PY'
import copy
import sys
import warnings

import torch
import torch_pruning
from torch import nn

warnings.filterwarnings("ignore")
CUT = [1, 3]


class Flatten(nn.Module):
    def __init__(self, channels_last):
        super().__init__()
        self.channels_last = channels_last
        self.first, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 5)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head((x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1))


class Flip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu().flip(1)).mean((2, 3)))


results = {}
for name, build in {
    "flatten": lambda: Flatten(False), "channels-last flatten": lambda: Flatten(True), "flip": Flip
}.items():
    torch.manual_seed(0)
    network, x = build().eval(), torch.randn(16, 3, 8, 8)
    silenced = copy.deepcopy(network)  # the channels that go are exact zeros behind the ReLU
    with torch.no_grad():
        silenced.first.weight[CUT] = 0
        silenced.first.bias[CUT] = 0
        whole, wanted = network(x), silenced(x)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=x)
    group = graph.get_pruning_group(network.first, torch_pruning.prune_conv_out_channels, idxs=CUT)
    fine = graph.check_pruning_group(group)
    group.prune()
    with torch.no_grad():
        error = (network(x) - wanted).abs().max().item()
    results[name] = fine, error
    print(f"{name}: check_pruning_group {fine}; cut and silenced network differ by up to {error:.6f}, "
          f"outputs are up to {whole.abs().max().item():.3f}")
good = results.pop("flatten")
holds = good[0] and good[1] < 1e-5 and all(fine and error > 0.01 for fine, error in results.values())
print("the surprise holds" if holds else "CHANGED: these cuts are right now, or refused")
sys.exit(not holds)
PY
