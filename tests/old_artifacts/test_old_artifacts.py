"""Artifacts of version 0.1.0, as they were written then: they load, run, are rebuilt and timed by every later version.

`artifacts/NAME` is a sealed artifact; `NAME.safetensors` are its teacher's weights, `NAME.npz` fixed inputs and what
came of them. Between them their plans hold every rewrite of that version, with every kind of cut and of quantizer:

    cnn      convolutions, batch norm, residual blocks: blocks removed, channels cut, static ranges
    encoder  attention, layer norms, tables: layers, heads and width cut, tables in integers, a free length; fused
    dynamic  linear layers whose inputs are quantized on the ranges of run time

`make.py`, run at that version, wrote them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from pqk import Artifact
from pqk.bench.artifact import benchmark
from pqk.bench.measure import QUICK

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).with_name("artifacts")


# ---- the teachers


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Cnn(nn.Module):
    """[B, 3, 8, 8] -> logits [B, 4]."""

    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(blocks))), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Embeddings(nn.Module):
    positions: Tensor

    def __init__(self, words: int, longest: int, width: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", torch.arange(longest)[None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.word(tokens) + self.position(self.positions[:, : tokens.shape[1]]))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.query, self.key, self.value = (nn.Linear(width, heads * size) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.size) + mask
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, self.heads * self.size)


class Layer(nn.Module):
    """Returns a tuple, as encoders do that can also tell their attention maps."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.attention, self.out = SelfAttention(width, heads, size), nn.Linear(heads * size, width)
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        x = self.one(x + self.out(self.attention(x, mask)))
        return self.two(x + self.down(F.gelu(self.up(x)))), None


class Encoder(nn.Module):
    """Tokens int64 [B, S] with their mask int64 [B, S] (0: padding) -> logits [B, 4]."""

    def __init__(self, words: int = 136, longest: int = 16, width: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embeddings, self.head = Embeddings(words, longest, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList(Layer(width, heads, 32) for _ in range(layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x, added = self.embeddings(tokens), (1.0 - mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x, _ = layer(x, added)
        return self.head(x[:, 0])


class Shifted(nn.Module):
    """A linear layer behind which a bare parameter is added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(inputs, outputs), nn.Parameter(torch.randn(1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x) + self.shift)


class Dynamic(nn.Module):
    """[B, 8] -> logits [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Shifted(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(self.one(x))))


TEACHERS: dict[str, type[nn.Module]] = {"cnn": Cnn, "encoder": Encoder, "dynamic": Dynamic}


# ---- what is expected of all


def teacher_of(name: str) -> nn.Module:
    teacher = TEACHERS[name]()
    teacher.load_state_dict(load_file(FOLDER / f"{name}.safetensors"))
    return teacher.eval()


def expected(name: str) -> tuple[list[NDArray[Any]], dict[str, NDArray[Any]]]:
    """Fixed inputs, and by what computed them the outputs: `teacher`, `model` (ONNX), `rebuilt`, `fused`."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as z:
        inputs = [z[k] for k in sorted(z) if k.startswith("input_")]
        return inputs, {k: z[k] for k in z if not k.startswith("input_")}


def assert_the_same(have: NDArray[Any], want: NDArray[Any]) -> None:
    """Equal but for ties in the layers before, which another machine may round the other way: few, and not by much."""
    assert have.shape == want.shape and have.dtype == want.dtype
    distance = np.abs(have - want) / np.abs(want).max()
    assert distance.max() <= 0.05 and (distance <= 1e-4).mean() >= 0.8
    assert (have.argmax(1) == want.argmax(1)).mean() >= 0.9


@pytest.fixture(params=TEACHERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_is_whole_and_says_what_it_is(name: str) -> None:
    artifact = Artifact.load(FOLDER / name)
    assert artifact.target.name == "x86-avx2" and artifact.manifest["seed"] == 0
    report, recipe = artifact.report, artifact.recipe
    assert report.parity is not None and report.parity.passed and report.metric is not None
    assert len(report.passes) == len(recipe.passes)
    assert len(artifact.plan) == len(json.loads((FOLDER / name / "student.json").read_text())["plan"])


def test_its_teacher_is_what_it_was(name: str) -> None:
    inputs, want = expected(name)
    with torch.no_grad():
        have = teacher_of(name)(*map(torch.from_numpy, inputs)).numpy()
    np.testing.assert_allclose(have, want["teacher"], rtol=1e-3, atol=1e-3)


def test_it_gives_the_same_answers(name: str) -> None:
    inputs, want = expected(name)
    assert_the_same(Artifact.load(FOLDER / name).run(*inputs), want["model"])


def test_it_is_rebuilt_from_its_teacher(name: str) -> None:
    """Whatever the teacher's weights are: the tensors are the saved ones, all of them."""
    inputs, want = expected(name)
    artifact = Artifact.load(FOLDER / name)
    for teacher in (teacher_of(name), TEACHERS[name]()):
        student = artifact.rebuild(teacher)
        state, saved = student.state_dict(), load_file(FOLDER / name / "student.safetensors")
        assert state.keys() == saved.keys() and all(torch.equal(state[k], saved[k]) for k in saved)
        with torch.no_grad():
            have = student(*map(torch.from_numpy, inputs)).numpy()
        assert_the_same(have, want["rebuilt"])


def test_it_is_benchmarked(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / name, tmp_path / name)
    (row,) = benchmark(Artifact.load(tmp_path / name), batches=(2,), threads=1, timing=QUICK)
    assert (row.variant, row.batch) == ("student", 2) and row.median_ms > 0
    assert row.ratio is None, "there is no teacher beside it"


def test_the_fused_student_runs_by_the_operators_of_today() -> None:
    inputs, want = expected("encoder")
    with torch.no_grad():
        have = Artifact.load(FOLDER / "encoder").student()(*map(torch.from_numpy, inputs)).numpy()
    assert_the_same(have, want["fused"])


def test_the_plans_hold_every_rewrite() -> None:
    """What the artifacts are for: as JSON, since the names are those of that version."""
    kinds: Counter[str] = Counter()
    for name in TEACHERS:
        for step in json.loads((FOLDER / name / "student.json").read_text())["plan"]:
            function, arguments = step["function"], step["arguments"]
            kinds[function] += 1
            kinds.update(f"cut {c['dim']}" for c in arguments.get("cuts", ()))
            kinds.update(f"point {p['kind']}" for p in arguments.get("points", ()))
            kinds.update(["drop a tuple"] if arguments.get("returns") else [])
    rewrites = ("cut_channels", "drop_block", "capture", "insert_fake_quant", "convert")
    cuts = ("cut out", "cut in", "cut heads", "cut values", "drop a tuple")
    points = ("point activation", "point weight", "point dynamic", "point table")
    assert {*rewrites, *cuts, *points} == set(kinds)
