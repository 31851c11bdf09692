"""The artifact: sealed, usable without pqk, and rebuilt into the module that it came from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from evaluations import TABLE

from pqk.bench.artifact import benchmark
from pqk.bench.measure import QUICK
from pqk.compiler import compress
from pqk.data.data import ArrayData
from pqk.deploy.artifact import Artifact, write_manifest
from pqk.errors import InputError
from pqk.models.resnet import resnet
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.recipe.recipe import Recipe
from pqk.recipe.specs import TeacherSpec
from pqk.task.task import Task

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {"blocks": [2, 1], "width": 16, "classes": 4}


def task() -> Task:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, 8, 8, generator=g)
    whole = ArrayData(x, torch.arange(64) % 4, 16)
    parts = [whole.subset(torch.arange(i, i + n), augmented=False) for i, n in ((0, 16), (16, 32), (48, 16))]
    return Task(*parts[:2], validation=parts[2], input_names=("image",), output_names=("logits",))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    teacher = resnet(**ARGUMENTS)
    recipe = Recipe(
        passes=(
            Prune(macs_ratio=1.3, depth=True, multiple=8, samples=16),
            Capture(),
            Quantize(samples=16),
            Distill(epochs=1, learning_rate=1e-3),
            Convert(),
        ),
        teacher=TeacherSpec(factory="pqk.models.resnet:resnet", arguments=ARGUMENTS),
    )
    out = tmp_path_factory.mktemp("artifact") / "out"
    compress(teacher, task(), recipe, "x86-avx2", out, evaluation=TABLE)
    return out


@pytest.fixture
def copied(sealed: Path, tmp_path: Path) -> Path:
    """What ships, without the run's state."""
    shutil.copytree(sealed, tmp_path / "out", ignore=shutil.ignore_patterns(".work"))
    return tmp_path / "out"


def inputs() -> torch.Tensor:
    return next(task().evaluation.batches()).inputs[0]


@pytest.mark.parametrize(
    "name",
    ["model.onnx", "student.safetensors", "student.json", "recipe.toml", "report.json", "report.md", "report.html"],
)
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_refused(copied: Path, name: str, place: int) -> None:
    content = bytearray((copied / name).read_bytes())
    content[place] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} was changed after the compile"):
        Artifact.load(copied)


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "student.json").unlink()
    with pytest.raises(InputError, match=r"student\.json is missing; copy the whole directory"):
        Artifact.load(copied)


@pytest.mark.parametrize("missing", ["model.onnx", "student.json"])
def test_a_manifest_that_lists_too_little_is_refused(copied: Path, missing: str) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"][missing], manifest["sha256"]
    manifest["format"] = 1  # which stated no digest
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"does not list {missing}"):
        Artifact.load(copied)


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("target", lambda m: m.update(target=3)),
    ("seed", lambda m: m.update(seed="0")),
    ("files", lambda m: m.update(files=[])),
    (r"files\.model\.onnx", lambda m: m["files"].update({"model.onnx": "a digest"})),
    (r"files\.model\.onnx\.sha256", lambda m: m["files"]["model.onnx"].update(sha256="../secret")),
    (r"files\.model\.onnx\.bytes", lambda m: m["files"]["model.onnx"].update(bytes=-1)),
    (r"inputs\.0\.shape", lambda m: m["inputs"][0]["shape"].__setitem__(1, -3)),
    (r"inputs\.0\.shape", lambda m: m["inputs"][0]["shape"].__setitem__(1, 10**12)),
    (r"inputs\.0\.dtype", lambda m: m["inputs"][0].update(dtype="object")),
    (r"inputs", lambda m: m.pop("inputs")),
    ("a sample of image has more than", lambda m: m["inputs"][0].update(shape=["batch", 1 << 20, 1 << 20])),
    ("its values do not have the sha256 that it states", lambda m: m.update(sha256="0" * 64)),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_manifest_with_other_values_is_refused(copied: Path, number: int) -> None:
    """Also where there is no digest that says so."""
    where, change = CHANGES[number]
    manifest = json.loads((copied / "manifest.json").read_text())
    if number < len(CHANGES) - 1:
        del manifest["sha256"]
        manifest["format"] = 1
    change(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json was changed.*{where}"):
        Artifact.load(copied)


@pytest.mark.parametrize("key", ["seed", "preprocessing", "target", "pqk", "outputs"])
def test_no_value_of_the_manifest_changes_unseen(copied: Path, key: str) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest[key] = {"seed": 1, "preprocessing": {"mean": 0.5}, "target": "arm-i8mm"}.get(key, [])
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was changed after it was written"):
        Artifact.load(copied)
    del manifest["sha256"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was changed or is of another version of pqk: it has no sha256"):
        Artifact.load(copied)


def test_another_compile_s_teacher_is_not_timed(sealed: Path, tmp_path: Path) -> None:
    """The ratio would be to another network."""
    shutil.copytree(sealed, tmp_path / "out")
    teacher = next((tmp_path / "out" / ".work" / "proof").glob("teacher*.onnx"))
    shutil.copy(tmp_path / "out" / "model.onnx", teacher)
    for path in teacher.parent.glob("teacher*.onnx"):
        shutil.copy(tmp_path / "out" / "model.onnx", path)
    with pytest.raises(InputError, match=r"teacher.*\.onnx is not the teacher of this compile"):
        benchmark(Artifact.load(tmp_path / "out"), threads=1, timing=QUICK)


def test_a_manifest_never_reaches_outside(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"sha256": "0" * 64, "bytes": 1}
    del manifest["sha256"]
    manifest["format"] = 1
    (copied.parent / "secret").write_text("x")
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="missing"):
        Artifact.load(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not a manifest of format 2"),
        ('{"format": 3}', "of format 2 or before"),
    ],
)
def test_another_manifest_is_refused(copied: Path, text: str, message: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Artifact.load(copied)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is not a pqk artifact"):
        Artifact.load(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(InputError, match="did not finish; go on with --resume"):
        Artifact.load(tmp_path)


def test_it_runs_arrays_and_tensors_of_any_batch(sealed: Path) -> None:
    artifact, x = Artifact.load(sealed), inputs()
    whole = artifact.run(x)
    assert whole.shape == (16, 4) and whole.dtype == np.float32
    np.testing.assert_array_equal(artifact.run(x.numpy()), whole)
    np.testing.assert_array_equal(np.concatenate([artifact.run(x[i : i + 1]) for i in range(16)]), whole)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 9), r"image is float32 \[2, 3, 8, 9\]; it must be float32 \['batch', 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"float32 \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "image is float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(sealed: Path, x: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Artifact.load(sealed).run(x)
    with pytest.raises(InputError, match=r"2 inputs given; the model takes \['image'\]"):
        Artifact.load(sealed).run(x, x)


ELSEWHERE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pqk", "torch"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Nothing())
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
assert [i.name for i in session.get_inputs()] == ["image"] and [o.name for o in session.get_outputs()] == ["logits"]
numpy.save("out.npy", session.run(None, {"image": numpy.load("in.npy")})[0])
assert not {"pqk", "torch"} & set(sys.modules)
try:
    import pqk
except ImportError:
    sys.exit(0)
sys.exit("pqk could be imported")
"""


def test_the_onnx_file_alone_gives_the_same_answers(sealed: Path, tmp_path: Path) -> None:
    """Nothing beside it, and neither pqk nor torch to import."""
    shutil.copy(sealed / "model.onnx", tmp_path)
    np.save(tmp_path / "in.npy", inputs().numpy())
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), Artifact.load(sealed).run(inputs()))


def test_the_onnx_file_names_no_path_of_this_machine(sealed: Path) -> None:
    content = (sealed / "model.onnx").read_bytes()
    for word in (str(Path.cwd()), str(Path.home()), "site-packages", "Traceback", "stack_trace", ".py"):
        assert word.encode() not in content, word


@pytest.mark.parametrize("given", [True, False])
def test_it_is_rebuilt_into_the_module_that_was_compiled(sealed: Path, copied: Path, given: bool) -> None:
    """From a teacher of any weights; its integers are those of the file with ONNX Runtime's optimizations off."""
    torch.manual_seed(9)
    student = Artifact.load(copied).rebuild(resnet(**ARGUMENTS) if given else None)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copied / "model.onnx", options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        have = student(inputs()).numpy()
    want = session.run(None, {"image": inputs().numpy()})[0]
    step = np.abs(np.diff(np.unique(want))).min()  # of the output's grid
    assert np.abs(have - want).max() <= 2.01 * step and (have.argmax(1) == want.argmax(1)).mean() > 0.9


def test_a_teacher_that_the_plan_does_not_fit_is_refused(copied: Path) -> None:
    with pytest.raises(InputError, match="plan"):
        Artifact.load(copied).rebuild(resnet((1, 1), width=8, classes=4))


def test_without_a_factory_the_teacher_must_be_given(copied: Path) -> None:
    artifact = Artifact.load(copied)
    text = artifact.recipe
    (copied / "recipe.toml").write_text(Recipe(passes=text.passes).dumps())
    with pytest.raises(InputError, match="pass it as teacher"):
        artifact.rebuild()


def test_it_is_benchmarked_beside_the_teacher_and_writes_nothing(sealed: Path, copied: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in sealed.rglob("*")}
    rows = benchmark(Artifact.load(sealed), batches=(1, 2), threads=1, timing=QUICK)
    assert [(r.variant, r.batch) for r in rows] == [(v, b) for b in (1, 2) for v in ("teacher_fp32", "student")]
    assert {p: p.stat().st_mtime_ns for p in sealed.rglob("*")} == before
    assert {r.variant for r in benchmark(Artifact.load(copied), threads=1, timing=QUICK)} == {"student"}


def test_no_pickle_is_in_it(sealed: Path) -> None:
    for path in sealed.rglob("*"):
        if path.is_file():
            known = {".onnx", ".safetensors", ".json", ".jsonl", ".toml", ".md", ".html", ".npy"}
            assert path.name == ".lock" or path.suffix in known, path
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")


def test_hidden_files_are_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    (tmp_path / ".b").write_text("2")
    (tmp_path / ".work").mkdir()
    write_manifest(tmp_path, {"x": 1})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [*manifest["files"]] == ["a.json"] and manifest["files"]["a.json"]["bytes"] == 1 and manifest["x"] == 1
