"""Write the artifacts that `test_old_artifacts.py` reads; to be run at version 0.1.0: `python make.py [FOLDER]`.

Timings in their reports are too short to mean anything.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_old_artifacts import TEACHERS
from torch import Tensor, nn

from pqk import Artifact, Recipe, Task, benchmark, compress, proof
from pqk.data import ArrayData
from pqk.passes import Capture, Convert, Distill, Fuse, Prune, Quantize
from pqk.program import Pass

proof.measure = functools.partial(benchmark.measure, rounds=5, burst=1, warm=1, pause=0.0)
proof._elsewhere = lambda *arguments: []

AGAIN = Distill(epochs=2, learning_rate=1e-3, teach_from=0.1)
PASSES: dict[str, tuple[Pass, ...]] = {
    "cnn": (
        Prune(macs_ratio=1.3, depth=True, width=False, samples=64),
        Prune(macs_ratio=1.9, multiple=4, importance="taylor", samples=64),
        Distill(epochs=4, learning_rate=0.02),
        Capture(),
        Quantize(samples=64),
        AGAIN,
        Convert(),
        Fuse(),
    ),
    "encoder": (
        Prune(macs_ratio=1.3, depth=True, width=False, samples=64),
        Prune(macs_ratio=4.0, multiple=8, scope="per_layer", samples=64),
        Distill(epochs=12, learning_rate=5e-3, optimizer="adamw"),
        Capture(),
        Quantize(samples=64),
        AGAIN,
        Convert(),
        Fuse(),
    ),
    "dynamic": (
        Prune(macs_ratio=1.5, multiple=8),
        Distill(epochs=4, learning_rate=0.02),
        Capture(),
        Quantize(activations="dynamic", samples=64),
        AGAIN,
        Convert(),
    ),
}
AXES = {"tokens": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}


def samples(name: str, count: int = 384) -> tuple[tuple[Tensor, ...], Tensor]:
    """(inputs, labels) of four classes that can be told apart."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    if name == "encoder":  # each class has words of its own, among others
        own = torch.randint(0, 16, (count, 12), generator=g) + 16 * labels.view(-1, 1) + 1
        other = torch.randint(1, 136, (count, 12), generator=g)
        tokens = torch.where(torch.rand(count, 12, generator=g) < 0.5, own, other)
        mask = (torch.arange(12) < torch.randint(6, 13, (count, 1), generator=g)).long()
        return (tokens * mask, mask), labels
    shape = (3, 8, 8) if name == "cnn" else (8,)
    means = torch.randn(4, *shape, generator=g)
    return (means[labels] + torch.randn(count, *shape, generator=g),), labels


def task(name: str) -> Task:
    inputs, labels = samples(name)
    whole = ArrayData(inputs, labels, 32)
    parts = [whole.subset(torch.arange(*span), augmented=False) for span in ((0, 256), (256, 320), (320, 384))]
    names = {"cnn": ("image",), "encoder": ("tokens", "mask"), "dynamic": ("features",)}[name]
    axes = AXES if name == "encoder" else None
    return Task(
        parts[0], parts[2], parts[1], input_names=names, output_names=("logits",), dynamic_axes=axes,
        preprocessing={"what": "drawn at random"},
    )  # fmt: skip


def trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = TEACHERS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(20):
        for batch in task(name).need_train("teacher").batches(epoch, epoch):
            loss = F.cross_entropy(model.train()(*batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def make(name: str, folder: Path) -> None:
    teacher = trained(name)
    save_file(teacher.state_dict(), folder / f"{name}.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / name
        artifact = compress(teacher, task(name), Recipe(passes=PASSES[name]), "x86-avx2", out, seed=0)
        metric = artifact.report.metric
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(out, folder / name, ignore=shutil.ignore_patterns(".work"))
    artifact = Artifact.load(folder / name)
    inputs = tuple(x[320:336] for x in samples(name)[0])
    with torch.no_grad():
        values = {"teacher": teacher(*inputs).numpy(), "rebuilt": artifact.rebuild(teacher)(*inputs).numpy()}
        if (folder / name / "student.pt2").exists():
            values["fused"] = artifact.student()(*inputs).numpy()
    values["model"] = artifact.run(*inputs)
    arrays = {f"input_{i}": x.numpy() for i, x in enumerate(inputs)}
    np.savez(folder / f"{name}.npz", **arrays, **values)
    size = sum(p.stat().st_size for p in folder.rglob("*") if name in p.relative_to(folder).parts[0])
    print(f"{name}: {size / 1000:.0f} kB, metric {metric}")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in sys.argv[2:] or TEACHERS:
        make(name, folder)


if __name__ == "__main__":
    main()
