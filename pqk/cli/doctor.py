"""What this machine can do for pqk: its instruction sets, the targets that run here, what is installed and missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from typing import Any

from pqk.errors import InputError
from pqk.target.machine import installed, machine_fingerprint
from pqk.target.target import TARGETS, Target

#: what is lost without an extra
WITHOUT = {
    "bench": "no OpenVINO row in benchmarks",
    "ptq": "no neural-compressor row in the attribution table",
    "encoders": "no Hugging Face directories in or out",
    "triton": "no Triton kernels: cuda-* targets cannot be compiled",
    "report": "no report.html beside report.md",
    "demo": "`make demo` has no data",
    "test": "`make test` cannot run",
}


def examine() -> dict[str, Any]:
    """Everything `pqk doctor` says, as JSON. `problems` are those that keep pqk from working here."""
    problems = []
    required, extras = requirements()
    for name, wanted in required:
        if installed(name) is None:
            problems.append(f"{name} is not installed ({wanted} is needed): pip install '{wanted}'")
    try:
        here: str | None = Target.detect().name
    except InputError as error:
        here = None
        problems.append(str(error))
    return {
        "pqk": installed("pqk"),
        "machine": {**machine_fingerprint(), "memory_bytes": memory_bytes()},
        "target": here,
        "targets": [_target(t) for t in TARGETS],
        "required": [{"package": name, "wanted": wanted, "version": installed(name)} for name, wanted in required],
        "extras": [_extra(name, packages) for name, packages in extras.items()],
        "compiler": compiler(),
        "problems": problems,
    }


def _target(target: Target) -> dict[str, Any]:
    try:
        reason = target.why_not_here()
    except InputError as error:
        reason = str(error)
    return {
        "name": target.name,
        "runs_here": reason is None,
        "reason": reason,
        "activation": str(target.activation.dtype),
        "weight_range": [target.weight.qmin, target.weight.qmax],
        "channel_multiple": target.channel_multiple,
        "runtime": target.runtime,
    }


def _extra(name: str, packages: list[str]) -> dict[str, Any]:
    missing = [p for p in packages if installed(p) is None]
    return {
        "extra": name,
        "packages": packages,
        "missing": missing,
        "without": WITHOUT.get(name, "") if missing else None,
        "install": f"pip install 'pqk[{name}]'" if missing else None,
    }


def requirements() -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """(name, requirement) of each package that pqk needs, and the packages of each extra, from its own metadata."""
    required: list[tuple[str, str]] = []
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("pqk") or []:
        wanted, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", wanted)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if name and extra:
            extras.setdefault(extra.group(1), []).append(name.group())
        elif name:
            required.append((name.group(), wanted.strip()))
    return required, extras


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use; without one its row is left out of benchmarks."""
    named = os.environ.get("CXX")
    return next((found for c in (named, "c++", "g++", "clang++") if c and (found := shutil.which(c))), None)


def memory_bytes() -> int | None:
    """Memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
