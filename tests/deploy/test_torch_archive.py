"""What a `student.pt2` may hold: each thing that torch would run, import or paste into code is refused before that."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pqk.deploy.torch_archive import MODEL, checked_archive, why_not_plain
from pqk.errors import InputError

OLD = Path(__file__).parents[1] / "old_artifacts" / "artifacts"
Program = dict[str, Any]


@pytest.fixture
def program() -> Program:
    """The program of a student of version 0.1.0: an encoder with a free length."""
    with zipfile.ZipFile(OLD / "encoder" / "student.pt2") as archive:
        found: Program = json.loads(archive.read(f"student/{MODEL}"))
    return found


def node(program: Program) -> Program:
    found: Program = program["graph_module"]["graph"]["nodes"][0]
    return found


def sizes(program: Program) -> list[Program]:
    found: list[Program] = program["graph_module"]["graph"]["tensor_values"]["tokens"]["sizes"]
    return found


def spec(kind: str, context: str) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


SPOILS: dict[str, Callable[[Program], Any]] = {
    "a function of a module that torch imports": lambda p: node(p).update(target="torch.os.getcwd"),
    "an operator of Python's that calls": lambda p: node(p).update(target="_operator.call"),
    "an operator that opens a file": lambda p: node(p).update(target="torch.ops.aten.from_file.default"),
    "an operator of no one": lambda p: node(p).update(target="#secret.operator"),
    "an operator as an argument": lambda p: node(p)["inputs"].append({"arg": {"as_operator": "torch.os.getcwd"}}),
    "an expression that calls": lambda p: sizes(p)[0]["as_expr"].update(expr_str="__import__('os').getcwd()"),
    "an expression with an attribute": lambda p: sizes(p)[0]["as_expr"].update(expr_str="Symbol('s0').__class__"),
    "an expression of a comprehension": lambda p: sizes(p)[0]["as_expr"].update(expr_str="[x for x in (1,)][0]"),
    "an expression without an end": lambda p: sizes(p)[0]["as_expr"].update(expr_str="Integer(9)**9**9**9**9**9" * 500),
    "an expression in brackets": lambda p: sizes(p)[0]["as_expr"].update(expr_str="(" * 5000 + ")" * 5000),
    "a name with code": lambda p: node(p).update(name="x=print('here')"),
    "a parameter with a quotation mark": lambda p: p["graph_module"]["signature"]["input_specs"].append(
        {"parameter": {"arg": {"name": "p"}, "parameter_name": 'a"b'}}
    ),
    "notes that torch looks up": lambda p: node(p)["metadata"].update(nn_module_stack="a,b,torch.os.getcwd"),
    "a structure that imports": lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
        out_spec=spec("collections.defaultdict", '{"default_factory_module": "os", "default_factory_name": "getcwd"}')
    ),
    "a structure of a class": lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
        out_spec=spec("secret.Class", "null")
    ),
}


def test_a_program_of_pqk_is_plain(program: Program) -> None:
    assert [*why_not_plain(program)] == []
    for name in ("encoder", "cnn"):
        assert checked_archive(OLD / name / "student.pt2").getbuffer().nbytes


@pytest.mark.parametrize("what", SPOILS)
def test_what_may_run_code_is_refused(program: Program, what: str, tmp_path: Path) -> None:
    SPOILS[what](program)
    assert [*why_not_plain(program)]
    path = tmp_path / "student.pt2"
    write(path, {MODEL: json.dumps(program).encode()})
    with pytest.raises(InputError, match=r"student\.pt2 holds .*may run code when opened; pqk did not write it"):
        checked_archive(path)


def write(path: Path, changed: dict[str, bytes], kind: int = zipfile.ZIP_STORED, folder: str = "student") -> None:
    """A student of version 0.1.0 with other records."""
    with zipfile.ZipFile(OLD / "encoder" / "student.pt2") as source, zipfile.ZipFile(path, "w", kind) as out:
        records = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
        for name, content in (records | changed).items():
            out.writestr(f"{folder}/{name}", content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": zipfile.ZIP_DEFLATED}, "holds compressed records, which pqk does not write"),
        ({"changed": {"../secret": b"x"}}, r"holds student/\.\./secret, which may run code"),
        ({"changed": {MODEL: b"[" * 100_000}}, "nested too deeply"),
        ({"changed": {MODEL: b"{"}}, r"cannot read .*models/model\.json"),
    ],
)
def test_an_archive_is_stored_whole_and_of_known_records(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "student.pt2", **({"changed": {}} | change))
    with pytest.raises(InputError, match=message):
        checked_archive(tmp_path / "student.pt2")


def test_a_byte_of_a_tensor_is_missed(tmp_path: Path) -> None:
    """By the check sum of its record, which torch does not ask for."""
    content = bytearray((OLD / "encoder" / "student.pt2").read_bytes())
    with zipfile.ZipFile(OLD / "encoder" / "student.pt2") as archive:
        place = archive.getinfo("student/data/weights/weight_0").header_offset + 70
    content[place] ^= 1
    (tmp_path / "student.pt2").write_bytes(content)
    with pytest.raises(InputError, match=r"is not a student\.pt2 .*CRC"):
        checked_archive(tmp_path / "student.pt2")
