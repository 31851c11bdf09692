"""What a `student.pt2` may hold, checked before torch opens it. `torch.export.load` alone runs code that a file names.

It unpickles some records, evaluates the expressions of sizes as Python, looks operators up by dotted names (which reach
anything that torch imports), imports the modules that a structure of outputs names, and pastes names into the code it
makes. pqk therefore lets through what its own files hold and nothing else, and hands torch a copy in memory of the very
bytes that were checked, since two readers of one archive need not see the same records.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pqk.documents import parse_json, read_bytes
from pqk.errors import InputError, Reason, first_line

SAMPLES = "data/sample_inputs/model.pt"
MODEL = "models/model.json"
RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/(weights/weight|constants/tensor)_\d+|data/(weights/model_weights|constants/model_constants)_config\.json"
)
"""what a `student.pt2` is made of, beside the empty record of sample inputs"""
LARGEST_ARCHIVE = 1 << 36
"""bytes that a `student.pt2` may have"""

OPERATOR = re.compile(r"torch\.ops\.(aten|pqk)\.\w+\.\w+|torch\.sym_\w+|math\.\w+")
ARITHMETIC = (
    "getitem",
    "add",
    "sub",
    "mul",
    "floordiv",
    "truediv",
    "mod",
    "neg",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
)
"""the functions of Python's `operator` that are of numbers"""
REACHES_FILES = re.compile(r"torch\.ops\.aten\.\w*(from_file|save|load)\w*\.\w+")
NAME = re.compile(r"[\w.,:+\-/ ]*")
"""what is pasted into code is made of these alone"""
FREE_TEXT = ("as_string",)
"""keys whose text is an argument of an operator, which is quoted wherever it goes"""
MATHEMATICS = {
    "Symbol", "Integer", "Rational", "Mul", "Add", "Min", "Max", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv",
    "Pow", "PowByNatural", "ModularIndexing", "Where", "IntTrueDiv", "Identity", "TruncToInt", "CeilToInt",
    "FloorToInt",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "floor", "ceiling", "oo", "int_oo", "true", "false",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
}  # fmt: skip
"""the names that an expression of sizes is made of"""
SYMBOL = re.compile(r"[a-z]\w{0,20}")
ARITHMETIC_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator,
    ast.unaryop, ast.Compare, ast.cmpop,
)  # fmt: skip
FROZEN = "torch.fx.immutable_collections.immutable"
STRUCTURES = {
    "builtins.tuple": "null", "builtins.list": "null", "builtins.dict": None,
    f"{FROZEN}_list": "null", f"{FROZEN}_dict": None,
}  # fmt: skip
"""the containers of inputs and outputs, and the context that each must have; None: a list of keys"""


def checked_archive(path: Path) -> io.BytesIO:
    """A `student.pt2` as torch may read it, in memory, without its guards and sample inputs.

    Raises `InputError` for a file that cannot be read, is damaged, or holds other JSON and tensors than pqk writes.
    """
    content = read_bytes(path, LARGEST_ARCHIVE)
    try:
        records = dict(_records(content))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path} {error}") from error
        raise InputError(f"{path} is not a student.pt2 ({first_line(error)}); copy it again") from error
    if MODEL not in records:
        raise InputError(f"{path} is not a student.pt2 (it has no {MODEL}); copy it again")
    program = parse_json(records[MODEL], f"{path}: {MODEL}")
    reason = next(why_not_plain(program), None)
    if reason is not None:
        raise InputError(f"{path} holds {reason}, which may run code when opened; pqk did not write it")
    program["guards_code"] = []  # Python in text; sizes are checked by the operators themselves
    return _written(records | {MODEL: json.dumps(program).encode(), SAMPLES: b""})


def _records(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Names without the archive's own folder, and contents. Raises `InputError`, without the path, for foreign ones."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if sum(e.file_size for e in entries) > len(content) or any(e.compress_type for e in entries):
            raise InputError("holds compressed records, which pqk does not write; copy it again")
        if (
            len({e.filename for e in entries}) < len(entries)
            or len({e.filename.partition("/")[0] for e in entries}) != 1
        ):
            raise InputError("holds several records of one name, or several folders; copy it again")
        foreign = [e.filename for e in entries if _is_foreign(archive, e.filename)]
        if foreign:
            raise InputError(f"holds {', '.join(foreign[:4])}, which may run code when opened; pqk did not write it")
        for e in entries:
            yield e.filename.partition("/")[2], archive.read(e)


def _is_foreign(archive: zipfile.ZipFile, name: str) -> bool:
    record = name.partition("/")[2]
    if record == SAMPLES:
        return archive.getinfo(name).file_size > 0
    if not RECORDS.fullmatch(record):
        return True
    return record.endswith("_config.json") and _pickled(parse_json(archive.read(name), name))


def _pickled(config: Any) -> bool:
    entries = config.get("config", {}) if isinstance(config, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        return True
    return any(entry.get("use_pickle", True) is not False for entry in entries.values())


def _written(records: dict[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as out:
        for record, content in records.items():
            out.writestr(zipfile.ZipInfo(f"student/{record}"), content)
    buffer.seek(0)
    return buffer


def why_not_plain(program: Any, key: str = "") -> Iterator[Reason]:
    """What in a serialized program is more than tensors, operators, sizes and names: a few words each.

    `program` is what `models/model.json` holds, and `key` the key that it stands under.
    """
    if isinstance(program, dict):
        for name, value in program.items():
            if not NAME.fullmatch(name) or (name == "as_operator" and value is not None):
                yield f"the name {name[:60]!r}"
            elif name == "metadata" and isinstance(value, dict):
                yield from _why_not_noted(value)
            elif name != "guards_code":
                yield from why_not_plain(value, name)
    elif isinstance(program, list):
        for value in program:
            yield from why_not_plain(value, key)
    elif isinstance(program, str) and not _is_plain(program, key):
        yield f"{key} {program[:60]!r}"


def _why_not_noted(metadata: dict[str, Any]) -> Iterator[Reason]:
    """A node's metadata: pqk writes the name of its layer, and nothing that torch would look up."""
    if metadata and (set(metadata) != {"custom"} or not isinstance(metadata["custom"], str)):
        yield f"the metadata {', '.join(metadata)[:60]!r}"


def _is_plain(text: str, key: str) -> bool:
    if key == "target":
        module, _, function = text.rpartition(".")
        known = OPERATOR.fullmatch(text) and not REACHES_FILES.fullmatch(text)
        return bool(known) or (module == "_operator" and function in ARITHMETIC)
    if key == "expr_str":
        return _is_arithmetic(text)
    if key in ("in_spec", "out_spec"):
        return _is_structure(text)
    return key in FREE_TEXT or NAME.fullmatch(text) is not None


def _is_arithmetic(text: str) -> bool:
    """Whether an expression of sizes is made of numbers, symbols and mathematics alone. It is parsed, never run."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) < 10_000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    return tree is not None and all(_is_number(node) for node in ast.walk(tree))


def _is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in MATHEMATICS
    if isinstance(node, ast.Name):
        return node.id in MATHEMATICS or SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        name = isinstance(node.value, str) and SYMBOL.fullmatch(node.value) is not None
        return name or (isinstance(node.value, int | float) and abs(node.value) < 1 << 63)
    return isinstance(node, ARITHMETIC_NODES)


def _is_structure(text: str) -> bool:
    """Whether a structure of inputs or outputs is of plain containers, and names no module to import."""
    try:
        document = parse_json(text.encode(), "a structure")
    except (InputError, UnicodeEncodeError):
        return False
    level: list[Any] = [document[1]] if isinstance(document, list) and len(document) == 2 else [None]
    while level:
        for spec in level:
            children = spec.get("children_spec") if isinstance(spec, dict) else None
            if not isinstance(children, list) or not _is_container(spec.get("type"), spec.get("context")):
                return False
        level = [child for spec in level for child in spec["children_spec"]]
    return True


def _is_container(kind: object, context: object) -> bool:
    if kind is None:
        return context in (None, "null")
    if not isinstance(kind, str) or kind not in STRUCTURES or not isinstance(context, str):
        return False
    try:
        keys = parse_json(context.encode(), "keys")
    except (InputError, UnicodeEncodeError):
        return False
    plain = isinstance(keys, list) and all(isinstance(k, str | int) for k in keys)
    return plain if STRUCTURES[kind] is None else context == STRUCTURES[kind]
