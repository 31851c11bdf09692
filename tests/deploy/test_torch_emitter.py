"""`student.pt2`: no pickle in it, the same file for the same student, the numbers of what it was made from."""

from __future__ import annotations

import json
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowered import Encoder, int8_graph
from torch import Tensor, fx

from pqk.core.onnxruntime_session import OnnxModel
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.deploy.torch_archive import SAMPLES, checked_archive
from pqk.deploy.torch_emitter import emit_torch, load_student
from pqk.errors import InputError
from pqk.models.resnet import resnet
from pqk.passes.fuse.fuse import fuse, launches

pytestmark = pytest.mark.slow

Made = tuple[fx.GraphModule, fx.GraphModule, Path, Tensor]
Spoiled = Callable[[dict[str, bytes]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A ResNet with random weights: its INT8 graph, the fused student, its file, and inputs."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    path, int8 = tmp_path_factory.mktemp("emitted") / "student.pt2", int8_graph(resnet((1, 1, 1)), x)
    fused, _ = fuse(int8)
    emit_torch(fused, (x[:2],), path)
    return int8, fused, path, x


def test_it_holds_no_pickle(made: Made) -> None:
    """Every record is JSON, a word, or raw tensor memory: none reads as a pickle or as an archive of pickles."""
    path = made[2]
    assert checked_archive(path).getbuffer().nbytes
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert records.pop(SAMPLES) == b""
    for name, content in records.items():
        assert not content.startswith(b"PK"), name
        assert not name.endswith((".pkl", ".pt", ".so", ".py")), name
        if name.endswith(".json"):
            json.loads(content)
        elif name.startswith("data/"):
            assert name.startswith("data/weights/weight_"), name
            assert not is_pickle(content), name
        else:
            content.decode("ascii")


def is_pickle(content: bytes) -> bool:
    try:
        return content[:1] == b"\x80" and any(op.name == "STOP" for op, _, _ in pickletools.genops(content))
    except ValueError:
        return False


def test_it_says_nothing_of_where_it_was_made(made: Made) -> None:
    with zipfile.ZipFile(made[2]) as archive:
        model = archive.read("student/models/model.json").decode()
    for told in ("File ", ".py", str(Path.home()), str(Path(__file__).parent)):
        assert told not in model
    assert "layer1.0.conv2" in model


def test_the_same_student_is_the_same_file(made: Made, tmp_path: Path) -> None:
    int8, _, path, x = made
    emit_torch(fuse(int8)[0], (x[:2],), tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_it_computes_what_was_emitted(made: Made, batch: int) -> None:
    _, fused, path, x = made
    student = load_student(path)
    with torch.no_grad():
        assert torch.equal(student(x[:batch]), fused(x[:batch]))


def test_it_agrees_with_onnx_runtime(made: Made, tmp_path: Path) -> None:
    int8, _, path, x = made
    emit_onnx(int8, (x[:2],), tmp_path / "model.onnx", ["input"])
    with torch.no_grad():
        ours, theirs = load_student(path)(x), OnnxModel(tmp_path / "model.onnx", x)(x)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("target", ["x86-avx2", pytest.param("cuda-sm80", marks=pytest.mark.full)])
def test_an_encoder_layer_agrees_with_onnx_runtime(target: str, tmp_path: Path) -> None:
    """Decisions on 99.5 % of the samples and, as attention is not the runtime's arithmetic, 30 dB of SQNR."""
    torch.manual_seed(0)
    x = torch.randn(256, 7, 12)
    int8 = int8_graph(Encoder(), x, target=target)
    emit_torch(fuse(int8)[0], (x[:2],), tmp_path / "student.pt2")
    emit_onnx(int8, (x[:2],), tmp_path / "model.onnx", ["input"])
    with torch.no_grad():
        ours = load_student(tmp_path / "student.pt2")(x)
        theirs = OnnxModel(tmp_path / "model.onnx", x, optimized=target == "x86-avx2")(x)
    assert isinstance(theirs, Tensor)
    noise = float((ours - theirs).square().mean() / theirs.square().mean())
    assert float(theirs.std()) > 0.1 and noise < 1e-3, noise
    apart = int((ours.argmax(1) != theirs.argmax(1)).sum())
    assert apart <= 0.005 * len(x), apart


def test_launches_of_a_loaded_student_have_their_layers(
    made: Made,
) -> None:
    _, fused, path, x = made
    want, got = launches(fused, (x[:1],)), launches(load_student(path), (x[:1],))
    assert [(o.layer, o.op) for o in got] == [(o.layer, o.op) for o in want]
    assert got[1].op == "pqk::int8_conv2d" and got[1].layer == "conv1"
    assert got[1].arguments["x"].shape == (1, 16, 16, 3) and got[1].arguments["stride"] == [1, 1]


def test_a_fresh_process_loads_it_without_pqk_s_passes(
    made: Made,
) -> None:
    code = (
        "import sys, torch, pqk.kernels\n"
        f"m = torch.export.load({str(made[2])!r}).module()\n"
        "assert m(torch.zeros(3, 3, 16, 16)).shape == (3, 10)\n"
        "assert 'pqk.passes' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda r: r.update({f"student/{SAMPLES}": b"\x80\x02."}), "sample_inputs"),
        (lambda r: r.update({"student/data/aotinductor/model/model.so": b""}), "aotinductor"),
        (lambda r: r.update({"student/data/weights/model.pt": b""}), r"weights/model\.pt"),
        (lambda r: r.update({"student/data/constants/custom_obj_0": b""}), "custom_obj_0"),
        (lambda r: r.update({"student/extra/readme": b""}), "extra"),
        (
            lambda r: r.update(
                {
                    "student/data/weights/model_weights_config.json": r[
                        "student/data/weights/model_weights_config.json"
                    ].replace(b'"use_pickle": false', b'"use_pickle": true', 1)
                }
            ),
            "model_weights_config",
        ),
    ],
)
def test_what_pqk_did_not_write_is_never_opened(made: Made, tmp_path: Path, spoil: Spoiled, named: str) -> None:
    with zipfile.ZipFile(made[2]) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    spoil(records)
    path = tmp_path / "spoiled.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=rf"{named}.*may run code"):
        load_student(path)


def test_damaged_and_missing_files_are_named(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(made[2].read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.pt2 is not a student\.pt2"):
        load_student(path)
    with pytest.raises(InputError, match=r"cannot read .*gone\.pt2"):
        load_student(tmp_path / "gone.pt2")
