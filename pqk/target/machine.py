"""Describes this machine for reports; nothing in it identifies its owner."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pqk.errors import InputError
from pqk.target.target import cpu_flags, machine_target

LIBRARIES = ("torch", "onnxruntime", "onnx", "numpy", "torch-pruning", "openvino", "neural-compressor", "triton")
#: the instruction sets that decide how fast integer and float kernels are
ISA = ("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm", "sve")


BF16 = ("avx512_bf16", "amx_bf16", "bf16")
#: any of these lets a CPU multiply bfloat16; without one torch does it piece by piece

log = logging.getLogger(__name__)


def machine_fingerprint() -> dict[str, Any]:
    """CPU, instruction sets, cores usable by this process, system, Python, library versions and the target's name.

    `target` is None where no integer target fits the CPU, `gpu` where there is none.
    """
    try:
        target: str | None = machine_target()
    except InputError:
        target = None
    return {
        "cpu": cpu_model(),
        "isa": sorted(cpu_flags() & set(ISA)),
        "cores": usable_cores(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "target": target,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name in LIBRARIES if (version := installed(name)) is not None},
    }


def usable_cores() -> int:
    """Cores that this process may run on (a container is often given fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def autocast(device: str, precision: str) -> torch.autocast:
    """bfloat16 autocast where `precision` is "bf16"; on a CPU without bfloat16 none, since float32 is faster there."""
    enabled = precision == "bf16" and not (device == "cpu" and bf16_is_slow())
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


@cache
def bf16_is_slow() -> bool:
    """Whether bfloat16 would be slower than float32 on this CPU; logged once."""
    flags = cpu_flags()
    missing = bool(flags) and not flags & set(BF16)
    if missing:
        log.warning(
            'precision "bf16": this CPU has no bfloat16 instructions (%s), without which it takes several times as '
            "long as float32; float32 is used",
            ", ".join(BF16),
        )
    return missing


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
