"""`pqk kernels`: what a student launches on each architecture, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lowered import int8_graph
from torch import nn

from pqk.cli import app as cli
from pqk.cli import commands
from pqk.deploy.artifact import write_manifest
from pqk.deploy.torch_emitter import emit_torch
from pqk.errors import InputError
from pqk.gpu import static_checks as gpu_proof
from pqk.gpu.codegen import Code
from pqk.gpu.static_checks import of_student, problems
from pqk.gpu.traffic import programs
from pqk.kernels.common import triton
from pqk.models.resnet import resnet
from pqk.passes.fuse.fuse import fuse, launches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton.INTERPRETED, reason=triton.TRITON_MISSING or "Triton is not interpreted here"),
]


def sealed(folder: Path, net: nn.Module, x: torch.Tensor) -> Path:
    """A folder as a compile leaves it, as far as `pqk kernels` reads it."""
    torch.manual_seed(0)
    fused, _ = fuse(int8_graph(net, x))
    emit_torch(fused, (x[:2],), folder / "student.pt2")
    for name in ("report.json", "recipe.toml", "student.safetensors", "student.json"):
        (folder / name).touch()
    port = {"name": "x", "dtype": "float32", "shape": ["batch", *x.shape[1:]]}
    write_manifest(folder, {"inputs": [port], "outputs": [], "target": "cuda-sm80", "seed": 0})
    return folder


def test_alike_layers_are_one_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    fused, _ = fuse(int8_graph(resnet((2, 1, 1)), x))
    called = launches(fused, (x[:1],))
    rows = of_student(called, ["sm_80", "sm_90"])
    assert sorted(name for row in rows for name in row.layers) == sorted(each.layer for each in called)
    assert len(rows) < len(called)
    for row in rows:
        assert set(row.plans) == {"sm_80", "sm_90"}
        assert row.op.startswith("pqk::") and all(len(runs) == 1 for runs in row.plans.values())
        assert all(programs(run) > 0 for runs in row.plans.values() for run in runs)


def test_a_launch_is_planned_for_the_gpu_that_runs_it() -> None:
    """Hopper gets tiles of 64 rows where Ampere gets what fills its cores."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    fused, _ = fuse(int8_graph(nn.Sequential(nn.Linear(64, 128)), x))
    (linear,) = [row for row in of_student(launches(fused, (x,)), ["sm_80", "sm_90"]) if "linear" in row.op]
    blocks = {name: run.constexprs["BLOCK_M"] for name, (run,) in linear.plans.items()}
    assert blocks["sm_90"] >= 64 > blocks["sm_80"]


def test_from_a_folder_to_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sealed(tmp_path, nn.Sequential(nn.Linear(64, 32)), torch.randn(16, 64))
    assert cli.run(["kernels", str(folder), "--arch", "sm_80", "--batch", "16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == [] and document["batch"] == 16
    (assumed,) = document["predictions_assume"]
    assert assumed["gpu"] == "A100 80GB SXM" and "data sheet" in assumed["source"]
    linear = next(layer for layer in document["layers"] if layer["op"] == "pqk::int8_linear")["on"]["sm_80"]
    (code,) = linear["launches"]
    assert code["integer"] and code["spills"] == 0 and code["reason"] is None
    assert linear["traffic"]["stray"] == 0 and 0 < linear["traffic"]["ratio"] <= 1.1
    assert linear["traffic"]["int8_macs"] >= 16 * 32 * 64
    assert linear["predicted"]["microseconds"] > 0


def made(**changes: Any) -> dict[str, Any]:
    """A layer of a document, of one launch for sm_80 that meets every bar, with changes."""
    code = {"kernel": "k", "grid": [4], "warps": 4, "reason": None, "shared_limit": 1000, "integer": ["IMMA"],
            "matrix": {"IMMA": 2}, "registers": 40, "spills": 0, "shared": 512, "tensor_memory": 0,
            "occupancy": 0.5}  # fmt: skip
    traffic = {"moved": 110, "ratio": 1.1, "once": 100, "issued": 400, "stray": 0, "int8_macs": 1}
    there = {
        "launches": [{k: changes.get(k, v) for k, v in code.items()}],
        "traffic": {k: changes.get(k, v) for k, v in traffic.items()},
        "traffic_reason": None,
        "predicted": {"microseconds": 2.5, "bound": "memory"},
    }
    return {"layers": ["fc", "fc2"], "op": "pqk::int8_linear", "on": {"sm_80": there}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"spills": 3}, "3 spills"),
        ({"ratio": 1.11}, "1.11 times"),
        ({"stray": 1}, "1 accesses outside"),
        ({"integer": []}, "without an integer matrix instruction"),
        ({"integer": [], "int8_macs": 0}, None),
        ({"shared": 1001}, "1001 bytes of shared memory"),
        ({"occupancy": 0.0}, "no program fits"),
        ({"reason": "ptxas: no"}, "did not compile: ptxas: no"),
    ],
)
def test_bars(changes: dict[str, Any], said: str | None) -> None:
    found = problems(made(**changes))
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and found[0].startswith("pqk::int8_linear (fc), sm_80"))


def test_tables_show_every_launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assumed = [gpu_proof.arch_named("sm_80").document()]
    foreign = {"layers": ["softmax"], "op": "aten::softmax", "on": {"sm_80": {
        "launches": [], "traffic": None, "traffic_reason": "not a kernel of pqk", "predicted": None}}}  # fmt: skip
    document = {"predictions_assume": assumed, "layers": [made(), foreign], "problems": []}
    monkeypatch.setattr(gpu_proof, "check_launches_statically", lambda *_, **__: document)
    monkeypatch.setenv("COLUMNS", "160")
    answer = commands.kernels(None, ["sm_80"], 1, as_json=False)
    assert answer.exit_code == 0
    from pqk.cli.console import write

    write(answer, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("fc +1", "IMMA", "2.500", "predicted, not measured", "A100 80GB SXM", "aten::softmax", "every bar"):
        assert word in shown, word
    document["problems"] = ["something"]
    assert commands.kernels(None, ["sm_80"], 1, as_json=False).exit_code == 1


def test_what_cannot_be_proven_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["kernels"]) == cli.run(["kernels", str(tmp_path), "--cases"]) == 2
    with pytest.raises(InputError, match='"sm_91"'):
        gpu_proof.check_launches_statically(None, ["sm_91"])
    with pytest.raises(InputError, match="manifest"):
        gpu_proof.check_launches_statically(tmp_path, ["sm_80"])
    monkeypatch.setattr(gpu_proof, "TRITON_MISSING", "Triton is not installed")
    with pytest.raises(InputError, match="not installed"):
        gpu_proof.check_launches_statically(None, ["sm_80"])


@pytest.mark.full
def test_the_cases_meet_every_bar() -> None:
    document = gpu_proof.check_launches_statically(None, ["sm_80"])
    assert document["problems"] == []
    assert {layer["op"] for layer in document["layers"]} == {m.__name__.rpartition(".")[2] for m in gpu_proof.KERNELS}


def test_a_code_is_what_json_says_of_it() -> None:
    code = Code({"IMMA": 1}, 32, 0, 0, 0, 1.0)
    assert Code(**json.loads(json.dumps(code.__dict__))) == code
