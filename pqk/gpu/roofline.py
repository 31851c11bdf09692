"""The GPUs that kernels are compiled for: their limits, and the time below which a launch cannot fall on them.

A roofline (Williams, Waterman & Patterson 2009, "Roofline: an insightful visual performance model") is the larger of
two times: moving the bytes at the peak bandwidth, and doing the multiplications at the peak rate of as many cores as
there are programs. It is *predicted* from data sheets and counts, never measured; launch latency, occupancy and every
instruction that is not a matrix one are left out, so a real launch takes longer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pqk.errors import InputError, nearest
from pqk.kernels.common.gpu import OLDEST, Gpu

REGISTERS = 512
"""32-bit registers of a lane in each of a core's four schedulers (NVIDIA: 65536 / 4 / 32; AMD: 512 a SIMD lane)"""
GRANULE = 8
"""registers are given to a warp in eights"""
SCHEDULERS = 4


@dataclass(frozen=True)
class Arch:
    """What a kernel is compiled for, its limits, and the peaks of the GPU that stands for it.

    A *core* is a streaming multiprocessor or compute unit; a *warp* is AMD's wavefront. Peaks are dense, not sparse.
    """

    name: str
    gpu: str
    cores: int
    int8_ops: float
    """operations a second; a multiply-accumulate is two"""
    float16_ops: float
    bandwidth: float
    """bytes a second of the GPU's memory"""
    source: str
    shared: int
    """bytes of shared memory that one program may have"""
    shared_core: int
    """bytes of a core, for all programs on it"""
    shared_reserved: int
    """bytes that each program costs besides its own"""
    warps: int
    """most warps on a core"""
    programs: int
    """most programs on a core"""
    lanes: int = 32
    tensor_memory: int | None = None
    """columns of tensor memory of a core"""

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def planned(self) -> Gpu:
        """What launches are planned for."""
        digits = self.name.removeprefix("sm_")
        return Gpu(OLDEST if self.amd else (int(digits[:-1]), int(digits[-1])), self.cores, self.shared)

    def document(self) -> dict[str, Any]:
        """The peaks that a prediction assumes, as JSON."""
        whole = asdict(self)
        return {k: whole[k] for k in ("name", "gpu", "cores", "int8_ops", "float16_ops", "bandwidth", "source")}


# Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA reference guide
# and LLVM's AMDGPUUsage. Data sheets that quote peaks with sparsity are halved.
ARCHES: tuple[Arch, ...] = (
    Arch(
        "sm_80", "A100 80GB SXM", 108, 624e12, 312e12, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet",
        shared=163 * 1024, shared_core=164 * 1024, shared_reserved=1024, warps=64, programs=32,
    ),
    Arch(
        "sm_89", "L4", 58, 242.5e12, 121e12, 0.3e12, "NVIDIA L4 Tensor Core GPU data sheet",
        shared=99 * 1024, shared_core=100 * 1024, shared_reserved=1024, warps=48, programs=24,
    ),
    Arch(
        "sm_90", "H100 SXM", 132, 1979e12, 989.5e12, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet",
        shared=227 * 1024, shared_core=228 * 1024, shared_reserved=1024, warps=64, programs=32,
    ),
    Arch(
        "sm_100", "B200", 148, 4500e12, 2250e12, 8e12, "NVIDIA HGX B200 data sheet",
        shared=227 * 1024, shared_core=228 * 1024, shared_reserved=1024, warps=64, programs=32, tensor_memory=512,
    ),
    Arch(
        "gfx942", "MI300X", 304, 2614.9e12, 1307.4e12, 5.3e12, "AMD Instinct MI300X accelerator data sheet",
        shared=64 * 1024, shared_core=64 * 1024, shared_reserved=0, warps=32, programs=16, lanes=64,
    ),
)  # fmt: skip


def arch_named(name: str) -> Arch:
    """Raises `InputError` for one that is not in `ARCHES`."""
    arch = next((a for a in ARCHES if a.name == name), None)
    if arch is None:
        raise InputError(f'there is no architecture "{name}" among those compiled for{nearest(name, names())}')
    return arch


def names() -> list[str]:
    return [a.name for a in ARCHES]


def occupancy(arch: Arch, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> float:
    """An upper bound on the share of a core's warps that programs of this size can fill, 0 where none fits.

    `warps` a program, `registers` a lane, `shared` in bytes, `tensor_memory` in columns, all a program's.
    """
    allocated = -(-max(registers, 1) // GRANULE) * GRANULE
    by_registers = SCHEDULERS * (REGISTERS // allocated)
    fit = [arch.programs, min(arch.warps, by_registers) // warps]
    if (each := shared + arch.shared_reserved) > 0:
        fit.append(arch.shared_core // each if shared <= arch.shared else 0)
    if tensor_memory:
        fit.append((arch.tensor_memory or 0) // tensor_memory)
    return min(fit) * warps / arch.warps


@dataclass(frozen=True)
class Prediction:
    """The least time of a launch, from data sheets and counts; never measured."""

    microseconds: float
    bound: str
    """what it waits for: `memory` or `matrix units`"""


def least_time(arch: Arch, moved: int, int8_macs: int, float_macs: int, programs: int) -> Prediction:
    """The roofline of a launch that moves `moved` bytes and multiplies in `programs` programs.

    No more cores can multiply than there are programs.
    """
    share = min(1.0, programs / arch.cores) if programs else 1.0
    memory = moved / arch.bandwidth
    matrix = (2 * int8_macs / arch.int8_ops + 2 * float_macs / arch.float16_ops) / share
    return Prediction(max(memory, matrix) * 1e6, "memory" if memory >= matrix else "matrix units")
