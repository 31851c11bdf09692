"""The machine that will run the student, and the integer grid that its kernels can run exactly.

x86 without VNNI multiplies u8 by s8 with `vpmaddubsw`, which adds two products in 16 bits and saturates: weights are
kept within ±64 there (255 * 64 * 2 = 32640 < 2**15), and every output is exact. That grid is exact on every x86, so an
`x86-avx2` student also runs, exactly, on machines with VNNI; the reverse is not true.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from pqk.errors import InputError, Reason, nearest
from pqk.quant.qparams import U8, Grid
from pqk.settings import CONFIG, in_words

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""instruction sets of x86 that add products of u8 and s8 in 32 bits, so that nothing saturates"""
ISA_ORDER = {"x86-avx2": ("x86-avx2", "x86-vnni"), "x86-vnni": ("x86-vnni",)}
"""target -> the machines it runs on with the numbers it was trained for"""


@in_words
@dataclass(frozen=True, config=CONFIG)
class Target:
    """What will run the student, and the integers that its kernels compute exactly on."""

    name: str
    """its name in recipes, such as "x86-avx2" """
    activation: Grid
    """the integers of activations, one scale a tensor"""
    weight: Grid
    """the integers of weights, one scale an output channel"""
    channel_multiple: int
    """kernels are fastest at multiples of this many channels"""
    runtime: Literal["onnxruntime", "triton"]
    """what executes the student"""

    @staticmethod
    def named(name: str) -> Target:
        """Finds the target of that name.

        Args:
            name: one of `TARGETS`.

        Returns:
            The target.

        Raises:
            InputError: there is none; it names the nearest known one.
        """
        for target in TARGETS:
            if target.name == name:
                return target
        raise InputError(f'unknown target "{name}"{nearest(name, (t.name for t in TARGETS))}')

    @staticmethod
    def detect() -> Target:
        """Finds the target that this machine's CPU is.

        Raises:
            InputError: no target fits the CPU.
        """
        return Target.named(machine_target())

    def why_not_measured(self) -> Reason | None:
        """Why a compile cannot time this target's students, nor read what its runtime executes; None where it can.

        A compile measures in ONNX Runtime. Triton students are timed on their GPU, by `pqk benchmark --device cuda`.
        """
        if self.runtime == "triton":
            return f"target {self.name}: student.pt2 is timed on its GPU: pqk benchmark DIR --device cuda"
        return self.why_not_here()

    def why_not_here(self) -> Reason | None:
        """Why the numbers of this target are not this machine's; None where they are."""
        machine = machine_target()
        if self.name.startswith("cuda"):
            capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
            if capability is None:
                return f"target {self.name} needs a CUDA device and this machine ({machine}) has none"
            have = 10 * capability[0] + capability[1]
            need = int(self.name.removeprefix("cuda-sm"))
            return None if have >= need else f"target {self.name} is newer than this machine's GPU (sm{have})"
        if machine in ISA_ORDER.get(self.name, (self.name,)):
            return None
        return f"target {self.name} is not this machine, which is {machine}: the integer kernels differ"


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as the kernel reports them; empty where it does not."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


@cache
def machine_target() -> str:
    """Name of the target that this CPU is."""
    flags, machine = cpu_flags(), platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        if flags & VNNI:
            return "x86-vnni"
        if "avx2" in flags or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            return "x86-avx2"
    if machine in ("aarch64", "arm64"):
        # Apple's kernels report no flags; every Apple silicon CPU has the dot product.
        return "arm-i8mm" if "i8mm" in flags else "arm-dotprod"
    raise InputError(f"no integer target fits this CPU ({machine}); x86-64 with AVX2 or 64-bit Arm is needed")


S8 = Grid("int8", -128, 127, symmetric=False)
S8_SYMMETRIC = Grid("int8", -127, 127, symmetric=True)
S7_SYMMETRIC = Grid("int8", -64, 64, symmetric=True)

TARGETS: tuple[Target, ...] = (
    Target("x86-avx2", U8, S7_SYMMETRIC, 16, "onnxruntime"),
    Target("x86-vnni", U8, S8_SYMMETRIC, 16, "onnxruntime"),
    Target("arm-dotprod", S8, S8_SYMMETRIC, 8, "onnxruntime"),
    Target("arm-i8mm", S8, S8_SYMMETRIC, 8, "onnxruntime"),
    Target("cuda-sm80", S8_SYMMETRIC, S8_SYMMETRIC, 32, "triton"),
    Target("cuda-sm89", S8_SYMMETRIC, S8_SYMMETRIC, 32, "triton"),
    Target("cuda-sm90", S8_SYMMETRIC, S8_SYMMETRIC, 32, "triton"),
    Target("cuda-sm100", S8_SYMMETRIC, S8_SYMMETRIC, 32, "triton"),
)
