"""The command line: one JSON document, exit codes, and what bad input gets. Everything goes through `pqk.cli.run`."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_recipe import RECIPE, SOURCES

from pqk import files
from pqk.cli import app as cli
from pqk.cli import commands, console, doctor
from pqk.cli import views as describe
from pqk.errors import ParityError
from pqk.passes import PASSES
from pqk.report.schema import SCHEMA_PATH

pytestmark = pytest.mark.slow

TOY = Path(__file__).parents[1] / "support" / "toy.py"


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its factories and the teacher's weights."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copy(TOY, folder)
    (folder / "toy.toml").write_text(RECIPE)
    sys.path.insert(0, str(folder))
    try:
        import toy  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    save_file(toy.teacher().state_dict(), folder / "toy.safetensors")
    return folder


@pytest.fixture
def toy(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of that folder, and the current one."""
    shutil.copytree(toy_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def artifact(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, compiled once, with a benchmark that is too short to mean anything."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    assert cli.run(["compress", str(toy_folder / "toy.toml"), "--out", str(out), "--evaluation", "quick"]) == 0
    return out


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`json_of(code, "doctor")`: the document of a command with `--json`, the only thing on stdout."""

    def call(code: int, *arguments: str | Path) -> Any:
        capsys.readouterr()
        assert cli.run([*map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return call


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


# Without work


def test_help_needs_no_torch() -> None:
    code = "import sys; from pqk.cli.app import run; run(['--help']); print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")
    for command in ("compress", "check", "benchmark", "inspect", "report", "passes", "schema", "doctor"):
        assert command in done.stdout


def test_it_is_a_module_with_a_version() -> None:
    done = subprocess.run([sys.executable, "-m", "pqk", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pqk 0.")


@pytest.mark.parametrize(
    "arguments",
    [["compres"], ["compress"], ["compress", "a.toml"], ["compress", "a.toml", "--out", "o", "--attribution", "some"],
     ["benchmark", "x", "--threads", "0"], ["doctor", "--nonsense"]],
)  # fmt: skip
def test_usage_errors_are_bad_input(
    arguments: list[str], json_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document = json_of(2, *arguments)
    assert document["exit_code"] == 2 and "--help" in document["error"]
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("pqk: ")


def test_a_misspelt_command_names_the_nearest(json_of: Callable[..., Any]) -> None:
    assert "compress" in json_of(2, "compres")["error"]


def test_doctor_describes_the_machine(json_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    document = json_of(0, "doctor")
    assert document["problems"] == [] and document["machine"]["cores"] >= 1
    runs = {t["name"]: t["runs_here"] for t in document["targets"]}
    assert runs[document["target"]] and {"x86-avx2", "cuda-sm90"} <= set(runs)
    assert all(t["reason"] for t in document["targets"] if not t["runs_here"])
    assert {e["extra"] for e in document["extras"]} == set(doctor.WITHOUT), "what is lost without each is said"
    assert cli.run(["doctor"]) == 0
    assert document["target"] in capsys.readouterr().out


def test_every_field_of_every_pass_and_term_is_documented(json_of: Callable[..., Any]) -> None:
    document = json_of(0, "passes")
    assert [p["name"] for p in document["passes"]] == [p.name for p in PASSES]
    for entry in (*document["passes"], *document["terms"]):
        assert entry["documentation"]
        undocumented = [f["name"] for f in entry["fields"] if not f["documentation"]]
        assert undocumented == [], f"{entry['name']} has undocumented fields"


def test_types_read_like_sentences() -> None:
    assert describe.type_text({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}) == "number > 0 and < 1"
    assert describe.type_text({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}) == "integer ≥ 1 or none"
    assert describe.type_text({"type": "array", "items": {"enum": ["a", "b"]}}) == 'list of "a" or "b"'


def test_the_schema_accepts_recipes_and_refuses_mistakes(json_of: Callable[..., Any]) -> None:
    import tomllib

    schema, recipe = json_of(0, "schema"), tomllib.loads(RECIPE)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(recipe, schema)
    recipe["pass"][0]["macs_rato"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema)
    assert json_of(0, "schema", "--report")["title"] == "Report"


# With an artifact


def test_without_matplotlib_a_line_says_how_to_get_the_page(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert cli.run(["compress", str(toy_folder / "toy.toml"), "--out", str(out), "--evaluation", "quick"]) == 0
    line = "no report.html, a page with pictures: matplotlib is not installed: pip install 'pqk[report]'"
    assert line in capsys.readouterr().out.splitlines()
    assert (out / "report.md").is_file() and not (out / "report.html").exists()


def test_the_page_of_an_artifact_is_sealed(artifact: Path, tmp_path: Path, json_of: Callable[..., Any]) -> None:
    before = snapshot(artifact)
    error = json_of(2, "report", artifact, "--html")["error"]
    assert "report.html is a file of the artifact there, which manifest.json seals" in error
    assert json_of(0, "report", artifact, "--html", "--out", tmp_path / "p.html")["written"] == str(tmp_path / "p.html")
    assert (tmp_path / "p.html").read_bytes() == (artifact / "report.html").read_bytes()
    assert snapshot(artifact) == before


def test_compress_writes_what_it_says(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = {p.name for p in artifact.iterdir()}
    assert {"model.onnx", "student.safetensors", "student.json", "recipe.toml", "report.json", "manifest.json"} <= there
    assert {"report.md", "report.html"} <= there
    schema = json.loads(SCHEMA_PATH.read_text())
    jsonschema.validate(json.loads((artifact / "report.json").read_text()), schema)


def test_a_finished_compile_resumes_at_once(artifact: Path, toy_folder: Path, json_of: Callable[..., Any]) -> None:
    before = snapshot(artifact)
    document = json_of(0, "compress", toy_folder / "toy.toml", "--out", artifact, "--resume")
    assert document["out"] == str(artifact) and "model.onnx" in document["files"]
    assert document["report"]["parity"]["passed"] is True
    assert snapshot(artifact) == before


def test_an_occupied_folder_is_refused_and_left_alone(
    artifact: Path, toy_folder: Path, json_of: Callable[..., Any]
) -> None:
    before = snapshot(artifact)
    document = json_of(2, "compress", toy_folder / "toy.toml", "--out", artifact)
    assert "not empty" in document["error"] and "--resume" in document["error"]
    document = json_of(2, "compress", toy_folder / "toy.toml", "--out", artifact, "--resume", "--seed", "7")
    assert "another recipe" in document["error"]
    assert snapshot(artifact) == before


def test_inspect_tells_what_passes_did(
    artifact: Path, json_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document = json_of(0, "inspect", artifact)
    assert [p["pass"] for p in document["passes"]] == ["prune", "distill", "capture", "quantize", "convert"]
    assert document["passes"][0]["settings"] == {"macs_ratio": 1.5, "multiple": 8}
    assert any("output" in d["reason"] for d in document["passes"][0]["declined"])
    assert "cut_channels" in document["rewrites"]
    assert cli.run(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr().out
    assert "budget" in shown and "Left alone, and why" in shown and "float32 ['batch', 1, 8, 8]" in shown


def test_benchmark_never_writes(artifact: Path, json_of: Callable[..., Any]) -> None:
    before = snapshot(artifact)
    document = json_of(0, "benchmark", artifact, "--batch", "1,4", "--threads", "1", "--rounds", "5")
    assert snapshot(artifact) == before
    rows = {(r["variant"], r["batch"]): r for r in document["latency"]}
    assert set(rows) == {(v, b) for v in ("teacher_fp32", "student") for b in (1, 4)}
    assert all(r["threads"] == 1 and r["median_ms"] > 0 and r["ratio_low"] <= r["ratio_high"] for r in rows.values())
    assert document["target"] == "x86-avx2" and document["machine"]["cores"] >= 1


def test_benchmark_warns_on_another_machine(
    artifact: Path, json_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pqk.target import target

    monkeypatch.setattr(target, "machine_target", lambda: "arm-dotprod")
    assert "is not this machine" in json_of(0, "benchmark", artifact, "--rounds", "5")["warnings"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_benchmark_refuses_cuda_where_there_is_none(artifact: Path, json_of: Callable[..., Any]) -> None:
    assert "no CUDA device" in json_of(2, "benchmark", artifact, "--device", "cuda")["error"]


@pytest.mark.parametrize("batch", ["0", "1,x", "", "4,-1"])
def test_benchmark_refuses_batches_that_are_none(artifact: Path, batch: str, json_of: Callable[..., Any]) -> None:
    assert "positive numbers" in json_of(2, "benchmark", artifact, "--batch", batch)["error"]


@pytest.mark.parametrize("name", ["model.onnx", "student.safetensors", "report.json"])
def test_a_changed_byte_is_refused(artifact: Path, tmp_path: Path, name: str, json_of: Callable[..., Any]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for command in ("inspect", "benchmark"):
        document = json_of(2, command, copy)
        assert name in document["error"] and "sha256" in document["error"]


def test_a_missing_file_is_named(artifact: Path, tmp_path: Path, json_of: Callable[..., Any]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / "student.json").unlink()
    assert "student.json is missing" in json_of(2, "inspect", copy)["error"]


def test_an_unfinished_compile_says_where_it_stands(
    artifact: Path, tmp_path: Path, json_of: Callable[..., Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / ".work" / "04-convert")
    document = json_of(0, "inspect", copy)
    assert document["kind"] == "unfinished"
    assert document["finished"] == ["00-prune", "01-distill", "02-capture", "03-quantize"]
    assert "--resume" in json_of(2, "benchmark", copy)["error"]


# Bad input


def test_inspecting_a_recipe_imports_nothing_of_the_users(toy: Path, json_of: Callable[..., Any]) -> None:
    (toy / "toy.toml").write_text(RECIPE.replace("toy:", "no_such_module:"))
    document = json_of(0, "inspect", "toy.toml")
    assert document["teacher"]["factory"] == "no_such_module:teacher"
    assert document["passes"][0]["stage"] == "MODULE" and document["passes"][-1]["produces"] == "INT8"


def fault(name: str) -> tuple[str, str]:
    return 'factory = "toy:task"', f'factory = "toy:task"\narguments = {{ fault = "{name}" }}'


RECIPES = {
    "not TOML": (("[teacher]", "[teacher"), ["toy.toml", "TOML"]),
    "unknown key": (("macs_ratio", "macs_rato"), ["pass 1", "macs_rato", 'did you mean "macs_ratio"']),
    "unknown pass": (('"distill"', '"destill"'), ["pass 2", "destill", 'did you mean "distill"']),
    "unknown table": (("[target]", "[targets]"), ['did you mean "target"']),
    "unknown target": (("x86-avx2", "x86-avx3"), ["x86-avx3", "x86-avx2"]),
    "wrong type": (("epochs = 1", 'epochs = "many"'), ["epochs", "many"]),
    "impossible value": (("epochs = 1", "epochs = -1"), ["epochs", "-1", "greater than 0"]),
    "illegal order": (('"capture"', '"convert"'), ["pass 3", "convert", "MODULE"]),
    "no teacher": (('[teacher]\nfactory = "toy:teacher"\nweights = "toy.safetensors"', ""), ["[teacher]", "factory"]),
    "no module": (("toy:teacher", "toyy:teacher"), ["cannot import toyy"]),
    "no function": (("toy:teacher", "toy:teach"), ["teach", 'did you mean "teacher"']),
    "wrong argument": (('"toy:task"', '"toy:task"\narguments = { falt = 1 }'), ["falt"]),
    "not a task": (fault("no task"), ["toy:task", "str", "pqk.Task"]),
    "labels out of range": (fault("labels"), ["labels run from", "4 classes"]),
    "NaN in data": (fault("nan"), ["sample 17", "NaN"]),
    "empty loader": (fault("empty"), ["empty"]),
    "example that does not fit": (fault("example"), ["example", "(2, 3, 8, 8)"]),
    "output without tensors": (
        ('"toy:teacher"', '"toy:teacher"\narguments = { output = "text" }'),
        ["output is a str", "tensor"],
    ),
    "NaN from the teacher": (('"toy:teacher"', '"toy:teacher"\narguments = { output = "nan" }'), ["NaN"]),
    "missing weights": (("toy.safetensors", "gone.safetensors"), ["gone.safetensors", "--data"]),
    "cuda target": (("x86-avx2", "cuda-sm90"), ["cuda-sm90", "fuse"]),
}


@pytest.mark.parametrize("what", RECIPES)
def test_bad_recipes_and_data(what: str, toy: Path, json_of: Callable[..., Any]) -> None:
    (old, new), fragments = RECIPES[what]
    assert old in RECIPE
    (toy / "toy.toml").write_text(RECIPE.replace(old, new, 1))
    document = json_of(2, "compress", "toy.toml", "--out", "out")
    assert document["exit_code"] == 2
    for fragment in fragments:
        assert fragment in document["error"], document["error"]
    assert not (toy / "out").exists()


def wrong_keys(path: Path) -> None:
    save_file({f"model.{k}": v for k, v in load_file(path).items()}, path)


def wrong_shapes(path: Path) -> None:
    tensors = load_file(path)
    save_file({**tensors, "head.weight": torch.zeros(10, 32)}, path)


def poisoned(path: Path) -> None:
    tensors = load_file(path)
    save_file({**tensors, "head.weight": torch.full((4, 32), torch.nan)}, path)


WEIGHTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), ["toy.safetensors", "not a whole safetensors"]),
    "empty": (lambda p: p.write_bytes(b""), ["toy.safetensors", "not a whole safetensors"]),
    "a pickle": (lambda p: torch.save({"a": torch.zeros(1)}, p), ["pickle", "safetensors only"]),
    "wrong keys": (wrong_keys, ["missing", "unexpected", "model.first.0.bias"]),
    "wrong shapes": (wrong_shapes, ["head.weight", "(10, 32)", "(4, 32)"]),
    "NaN": (poisoned, ["head.weight", "NaN"]),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_bad_weights(what: str, toy: Path, json_of: Callable[..., Any]) -> None:
    spoil, fragments = WEIGHTS[what]
    spoil(toy / "toy.safetensors")
    document = json_of(2, "compress", "toy.toml", "--out", "out")
    for fragment in fragments:
        assert fragment in document["error"], document["error"]
    assert not (toy / "out").exists()


def test_unreadable_recipes(toy: Path, json_of: Callable[..., Any]) -> None:
    (toy / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("gone.toml", "binary.toml", "."):
        for command in (["compress", name, "--out", "out"], ["check", name]):
            assert "cannot read the recipe" in json_of(2, *command)["error"]
    assert "no such file" in json_of(2, "inspect", "gone.toml")["error"]
    assert "manifest.json" in json_of(2, "inspect", toy)["error"]


def test_no_training_data_says_what_can_be_done(toy: Path, json_of: Callable[..., Any]) -> None:
    (toy / "toy.toml").write_text(
        RECIPE.replace('factory = "toy:task"', 'factory = "toy:task"\narguments = { train = false }')
    )
    document = json_of(2, "compress", "toy.toml", "--out", "out")
    assert "no training data" in document["error"] and "post-training" in document["error"]
    assert not (toy / "out").exists()


def test_settings_that_name_nothing(toy: Path, json_of: Callable[..., Any]) -> None:
    for setting, fragment in {
        "distill.epoch=3": 'did you mean "epochs"',
        "distil.epochs=3": 'did you mean "distill"',
        "distill.epochs": "pass.key=value",
        "distill.epochs=none": "epochs",
        "distill@2.epochs=1": "numbered from 1",
    }.items():
        document = json_of(2, "compress", "toy.toml", "--out", "out", "--set", setting)
        assert fragment in document["error"], document["error"]
    assert "x86-avx2" in json_of(2, "compress", "toy.toml", "--out", "out", "--target", "x86-avx")["error"]
    assert "no such folder" in json_of(2, "check", "toy.toml", "--data", "nowhere")["error"]
    assert not (toy / "out").exists()


def test_out_is_a_file(toy: Path, json_of: Callable[..., Any]) -> None:
    assert "is a file" in json_of(2, "compress", "toy.toml", "--out", "toy.safetensors")["error"]


def test_a_full_disk(toy: Path, json_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    document = json_of(2, "compress", "toy.toml", "--out", "out")
    assert "No space left on device" in document["error"] and "safetensors" in document["error"]
    left = [p.name for p in (toy / "out").rglob("*") if p.is_file() and p.suffix != ".npy"]
    assert set(left) <= {"run.json", "journal.jsonl", ".lock"}


# Exit codes and manners


def test_parity_failure_is_three(toy: Path, json_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ParityError("parity: first.0 differs by 3 LSB")

    monkeypatch.setattr(commands, "compile_student", fails)
    document = json_of(3, "compress", "toy.toml", "--out", "out")
    assert document == {"error": "parity: first.0 differs by 3 LSB", "exit_code": 3}


def test_an_interrupt_says_how_to_go_on(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "compile_student", stops)
    assert cli.run(["compress", "toy.toml", "--out", "my out", "--seed", "3"]) == 130
    assert "pqk compress toy.toml --out 'my out' --seed 3 --resume" in capsys.readouterr().err
    assert cli.run(["compress", "toy.toml", "--out", "o", "--resume"]) == 130
    assert capsys.readouterr().err.count("--resume") == 1


def test_only_rank_zero_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["schema"]) == 0 and cli.run(["benchmark", "gone"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""


def test_progress_is_quiet_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(console.observer(as_json=False), console.Bars)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(console.observer(as_json=False), console.Bars)
    assert not isinstance(console.observer(as_json=True), console.Bars)


def test_bars_nest_and_leave_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    bars = console.Bars()
    with bars.task("outer", 2) as outer:
        with bars.task("inner", 3) as inner:
            inner(0, "")
            inner(3, "loss 0.5")
        outer(2)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith(("outer:", "inner:"))]
    assert [line.split(":")[0] for line in lines] == ["inner", "outer"]
    assert lines[0].endswith("loss 0.5") and shown.out == "" and bars.progress is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_clock(seconds: float, text: str) -> None:
    assert console.clock(seconds) == text


def test_listed_is_short() -> None:
    assert console.listed({"a": 1, "b": [1, 2]}) == "a 1, b 1, 2"
    assert console.listed({"losses": [0.123456, True]}) == "losses 0.1235, true"
    assert console.listed(list(range(100))) == "100 entries"


@pytest.mark.slow
def test_the_command_line_gives_clauses_and_the_exit_code(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy / "contract.toml").write_text(SOURCES + '[target]\nname = "arm-dotprod"\n[contract]\nmax_size_mb = 9\n')
    clauses = ["--max-size-mb", "0.00001", "--budget", "2 epochs"]
    out = ["--out", str(tmp_path / "out"), "--evaluation", "quick", "--json"]
    code = cli.run(["compress", str(toy / "contract.toml"), *out, *clauses])
    answer = json.loads(capsys.readouterr().out)
    assert code == 4 and answer["exit_code"] == 4 and "max_size_mb" in answer["error"], answer


def test_check_says_that_the_search_begins_there(toy: Path, json_of: Callable[..., Any]) -> None:
    text = SOURCES + '[target]\nname = "arm-dotprod"\n[contract]\nmax_size_mb = 9\n'
    (toy / "contract.toml").write_text(text)
    assert json_of(0, "check", "contract.toml")["begins_search"]
    assert not json_of(0, "check", "toy.toml")["begins_search"]


def test_the_recipe_that_ships_makes_a_student_again_where_it_says(toy: Path, artifact: Path) -> None:
    text = (artifact / "recipe.toml").read_text()
    assert text.startswith("# Written by a compile.")
    assert str(artifact.parent) not in text and str(toy) not in text, "no path of this machine"
    shutil.copyfile(artifact / "recipe.toml", toy / "again.toml")  # beside the recipe that was compiled
    assert cli.run(["compress", "again.toml", "--out", "again", "--evaluation", "quick"]) == 0
    assert (toy / "again" / "student.safetensors").read_bytes() == (artifact / "student.safetensors").read_bytes()
