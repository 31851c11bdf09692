"""Ahead-of-time compilation: what machine code says, what is said where there is none, and every kernel's bars."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pqk import kernels
from pqk.errors import InputError, PqkError
from pqk.gpu.codegen import SASS, Code, CompileJob, compile_all, job, read_amd
from pqk.gpu.roofline import ARCHES, Arch, arch_named, least_time, occupancy
from pqk.kernels import int8_linear
from pqk.kernels.common.gpu import planning_for
from pqk.kernels.common.launch import Launch
from pqk.kernels.common.triton import TRITON_MISSING

pytestmark = pytest.mark.slow

needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))
MATMULS = ("int8_linear", "int8_conv2d", "int8_attention")
WORKERS = 2

SPILLING = """
import triton
import triton.language as tl

@triton.jit
def crowded(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x / tl.sum(x))
"""


def planned(module: Any, case: Any, arch: Arch) -> Launch:
    """On the meta device: compiling needs no memory."""
    with planning_for(arch.planned):
        return module.specialize(case)


def stem(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


def assert_bars(name: str, run: Launch, code: Code | str, arch: Arch) -> None:
    """What issue 3 asks of the machine code of each kernel."""
    assert isinstance(code, Code), f"{name}: {code}"
    assert code.spills == 0, f"{name} on {arch.name}: {code}"
    assert 0 < code.registers <= 512 and code.shared <= arch.shared and code.occupancy > 0, f"{name}: {code}"
    if name in MATMULS:
        assert code.integer, f"{name} on {arch.name}: no integer matrix instruction in {code.matrix}"
        if arch.name in ("sm_80", "sm_89"):
            assert all(i.startswith("IMMA") for i in code.integer), code.integer
        if arch.name == "sm_90" and run.constexprs["BLOCK_M"] < 64:
            assert all(i.startswith("IMMA") for i in code.integer), code.integer
        if arch.amd:
            assert all(i.endswith("i8") for i in code.integer), code.integer


# Machine code


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[Launch, Code | str]]:
    """The first case of each kernel for sm_80, and a linear layer of many rows for sm_90, in one go."""
    ampere, hopper = arch_named("sm_80"), arch_named("sm_90")
    runs = {stem(m): (planned(m, m.CASES[0], ampere), "sm_80") for m in kernels.KERNELS}
    runs["hopper"] = (planned(int8_linear, int8_linear.Case(128, 256, 256), hopper), "sm_90")
    codes = compile_all([job(run, arch) for run, arch in runs.values()], WORKERS)
    return {name: (run, code) for (name, (run, _)), code in zip(runs.items(), codes, strict=True)}


@needs_triton
@pytest.mark.parametrize("module", kernels.KERNELS, ids=stem)
def test_every_kernel_compiles_without_spills(module: Any, compiled: dict[str, tuple[Launch, Code | str]]) -> None:
    assert_bars(stem(module), *compiled[stem(module)], arch_named("sm_80"))


@needs_triton
def test_hopper_multiplies_in_warp_groups(compiled: dict[str, tuple[Launch, Code | str]]) -> None:
    run, code = compiled["hopper"]
    assert run.constexprs["BLOCK_M"] >= 64 and isinstance(code, Code)
    assert any(i.startswith("IGMMA") for i in code.integer), code.matrix
    assert_bars("int8_linear", run, code, arch_named("sm_90"))


@needs_triton
def test_failures_are_reasons_and_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spills, one that is not there, one that takes the compiler down, and the first again."""
    (tmp_path / "spilling.py").write_text(SPILLING)
    (tmp_path / "deadly.py").write_text(
        "import os, sys\nsys.stderr.write('out of luck')\nsys.stderr.flush()\nos._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])))
    types = {"x_ptr": "*fp32", "BLOCK": "constexpr"}
    full = CompileJob("spilling:crowded", "sm_80", types, {"BLOCK": 1 << 14}, [], num_warps=1, num_stages=1)
    roomy = replace(full, num_warps=16)
    absent, deadly = replace(full, kernel="spilling:absent"), replace(full, kernel="deadly:kernel")
    done: list[int] = []
    spilled, fits, missing, died, again = compile_all([full, roomy, absent, deadly, full], advance=done.append)
    assert isinstance(spilled, Code) and spilled.spills > 0 and again == spilled
    assert isinstance(fits, Code) and fits.spills == 0 and fits.integer == []
    assert isinstance(missing, str) and "absent" in missing
    assert isinstance(died, str) and "exit code 7" in died and "out of luck" in died
    assert sum(done) == 4  # equal jobs are compiled once


@pytest.mark.full
@needs_triton
@pytest.mark.parametrize("arch", ARCHES, ids=lambda a: a.name)
@pytest.mark.parametrize("module", kernels.KERNELS, ids=stem)
def test_every_case_compiles_without_spills(module: Any, arch: Arch) -> None:
    runs = [planned(module, case, arch) for case in module.CASES]
    for run, code in zip(runs, compile_all([job(run, arch.name) for run in runs], WORKERS), strict=True):
        assert_bars(stem(module), run, code, arch)


# Reading


def test_instructions_are_found_behind_predicates() -> None:
    text = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;    /* 0x00000a00ff017624 */
                                                                              /* 0x000fe400078e00ff */
        /*0010*/              @!P0 LDL.LU R3, [R1+0x8] ;                      /* 0x0000080001037983 */
        /*10a20*/             @P1  IMMA.16832.S8.S8.SAT R4, R8.ROW, R2.COL, R4 ;  /* 0x0 */
        /*0030*/             @!UP2 UTCIMMA tmem[UR22], gdesc[UR4], tmem[UR15], tmem[UR8], idesc[UR9], !UPT ; /* 0x0 */
    """
    assert SASS.findall(text) == ["IMAD.MOV.U32", "LDL.LU", "IMMA.16832.S8.S8.SAT", "UTCIMMA"]


def test_amd_metadata() -> None:
    text = "\n".join(
        [
            "\tv_mfma_i32_16x16x32_i8 v[0:3], v[4:5], v[6:7], v[0:3]",
            "\tv_mfma_i32_16x16x32_i8 v[0:3], v[4:5], v[6:7], v[0:3]",
            "    .agpr_count:     8",
            "    .sgpr_spill_count: 1",
            "    .vgpr_count:     36",
            "    .vgpr_spill_count: 2",
        ]
    )
    assert read_amd(text) == {"matrix": {"v_mfma_i32_16x16x32_i8": 2}, "registers": 36, "spills": 2}
    with pytest.raises(PqkError, match="vgpr_spill_count"):
        read_amd(text.replace(".vgpr_spill_count", ".other"))


def test_integer_instructions_are_told_from_others() -> None:
    names = ["HMMA.16816.F32", "IMMA.16832.S8.S8.SAT", "IGMMA.64x64x32.S8.S8", "UTCIMMA", "UTCHMMA",
             "v_mfma_i32_32x32x16_i8", "v_mfma_f32_16x16x16_f16"]  # fmt: skip
    code = Code(dict.fromkeys(names, 1), 32, 0, 0, 0, 1.0)
    assert code.integer == [names[1], names[2], names[3], names[5]]


@needs_triton
def test_a_job_is_specialized_as_a_launch_is() -> None:
    """Multiples of 16 and ones are known to the compiler; AMD's also knows of small tensors."""
    run = int8_linear.specialize(int8_linear.Case(1, 33, 64))
    made = job(run, "sm_80")
    assert made.constants["M"] == 1 and made.types["M"] == "constexpr" and made.types["x_ptr"] == "*i8"
    facts = {run.kernel.arg_names[i]: facts for i, facts in made.attributes}
    assert facts["K"] == facts["x_ptr"] == [["tt.divisibility", 16]] and "N" not in facts
    amd = {run.kernel.arg_names[i]: facts for i, facts in job(run, "gfx942").attributes}
    assert amd["x_ptr"] == [["tt.divisibility", 16], ["tt.pointer_range", 32]] and amd["K"] == facts["K"]
    with pytest.raises(InputError, match='sm_90"'):
        job(run, "sm_9")


# Peaks


def test_occupancy_is_bounded_by_the_scarcest() -> None:
    """Known answers of NVIDIA's occupancy calculator."""
    a100, l4, b200 = (arch_named(n) for n in ("sm_80", "sm_89", "sm_100"))
    assert occupancy(a100, 4, 32, 0) == 1.0
    assert occupancy(a100, 4, 128, 0) == 0.25  # registers: 16 of 64 warps
    assert occupancy(a100, 4, 33, 0) == 0.75  # given as 40: 48 warps
    assert occupancy(a100, 4, 32, 40 * 1024) == 0.25  # 41 KiB each: four programs of four warps in 164 KiB
    assert occupancy(l4, 8, 32, 0) == 1.0
    assert occupancy(a100, 1, 32, 0) == 0.5  # 32 programs of one warp
    assert occupancy(a100, 4, 32, a100.shared) > 0 and occupancy(a100, 4, 32, a100.shared + 1) == 0
    assert occupancy(a100, 16, 255, 0) == 0  # 512 threads of 255 registers are more than there are
    assert occupancy(b200, 4, 32, 0, tensor_memory=256) == 2 * 4 / 64
    assert occupancy(a100, 4, 32, 0, tensor_memory=256) == 0  # it has none


def test_predictions_are_the_slower_of_two() -> None:
    a100 = arch_named("sm_80")
    memory = least_time(a100, moved=2_039_000, int8_macs=0, float_macs=0, programs=1)
    assert memory.bound == "memory" and memory.microseconds == pytest.approx(1.0)
    matrix = least_time(a100, moved=0, int8_macs=312_000_000, float_macs=0, programs=216)
    assert matrix.bound == "matrix units" and matrix.microseconds == pytest.approx(1.0)
    half = least_time(a100, moved=0, int8_macs=312_000_000, float_macs=0, programs=54)
    assert half.microseconds == pytest.approx(2.0)  # half of the cores have a program
    assert least_time(a100, 0, 0, 156_000_000, 108).microseconds == pytest.approx(1.0)


def test_architectures_are_named_once() -> None:
    assert [a.planned.capability for a in ARCHES] == [(8, 0), (8, 9), (9, 0), (10, 0), (8, 0)]
    assert len({a.name for a in ARCHES}) == len(ARCHES)
    with pytest.raises(InputError, match='"sm_8".*did you mean'):
        arch_named("sm_8")
