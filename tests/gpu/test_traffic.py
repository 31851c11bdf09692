"""Traffic: known answers of small kernels, and the bar of every kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pqk import kernels
from pqk.errors import InputError
from pqk.gpu.roofline import ARCHES
from pqk.gpu.static_checks import MOST_TRAFFIC
from pqk.gpu.traffic import SECTOR, Traffic, programs, sectors, trace, why_not_traced
from pqk.kernels.common import launch, triton
from pqk.kernels.common.gpu import planning_for
from pqk.kernels.common.launch import Launch
from pqk.kernels.common.triton import jit, tl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton.INTERPRETED, reason=triton.TRITON_MISSING or "Triton is not interpreted here"),
]


@jit
def copy(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * STEP, mask=i < n), mask=i < n)


@jit
def add_up(x_ptr, sums_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.atomic_add(sums_ptr + i, tl.load(x_ptr + tl.program_id(0) * BLOCK + i))


@jit
def product(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x).to(y_ptr.dtype.element_ty))


def copying(x: torch.Tensor, y: torch.Tensor, n: int, step: int = 1, block: int = 64) -> Launch:
    return Launch(copy, (-(-n // block),), {"x_ptr": x, "y_ptr": y, "n": n}, {"STEP": step, "BLOCK": block})


def test_a_copy_moves_each_tensor_once() -> None:
    x, y = torch.zeros(100, dtype=torch.int32), torch.empty(100, dtype=torch.int32)
    got = trace([copying(x, y, 100)])
    whole = SECTOR * len(sectors(x))
    assert got == Traffic(whole, SECTOR * len(sectors(y)), 2 * whole, 800, 0, 0, 0, 2) and got.ratio == 1.0


def test_a_stride_moves_sectors_that_are_used_in_part() -> None:
    """Every eighth byte is asked for, and all sectors come."""
    x, y = torch.zeros(1024, dtype=torch.int8), torch.empty(128, dtype=torch.int8)
    got = trace([copying(x, y, 128, step=8)])
    assert (got.read, got.written, got.issued) == (1024, 128, 256)


def test_scratch_between_launches_is_paid_for() -> None:
    """x to y to z: y is written and read, and neither is among what the layer cannot do without."""
    x, y, z = (torch.zeros(512, dtype=torch.int8) for _ in range(3))
    got = trace([copying(x, y, 512), copying(y, z, 512)])
    assert (got.moved, got.once, got.ratio) == (4 * 512, 2 * 512, 2.0)


def test_atomics_read_and_write_what_somebody_filled() -> None:
    x, sums = torch.zeros(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    got = trace([Launch(add_up, (4,), {"x_ptr": x, "sums_ptr": sums}, {"BLOCK": 64})])
    assert got.read == 1024 + 256 and got.written == 256 + 256
    assert got.once == 1024 + 256


def test_an_access_out_of_bounds_is_counted() -> None:
    room = torch.zeros(256, dtype=torch.int8)
    got = trace([copying(room[:100], torch.empty(128, dtype=torch.int8), 128)])
    assert got.stray == 28


def test_products_are_counted_by_dtype() -> None:
    for dtype, expected in ((torch.int8, (32**3, 0)), (torch.float16, (0, 32**3))):
        x, y = torch.ones(32, 32, dtype=dtype), torch.empty(32, 32, dtype=dtype)
        got = trace([Launch(product, (1,), {"x_ptr": x, "y_ptr": y}, {"BLOCK": 32})])
        assert (got.int8_macs, got.float_macs) == expected


def test_the_interpreter_computes_again_after_a_trace() -> None:
    x, y = torch.arange(32 * 32).reshape(32, 32).to(torch.float32), torch.empty(32, 32)
    run = Launch(product, (1,), {"x_ptr": x, "y_ptr": y}, {"BLOCK": 32})
    trace([run])
    launch.launch(run)
    assert torch.equal(y, x @ x)


def test_sectors_of_a_view_leave_its_gaps_out() -> None:
    x = torch.zeros(64, 64, dtype=torch.int8)  # the allocator aligns to 64 bytes
    assert len(sectors(x)) == 128 and len(sectors(x[:, :32])) == 64 and len(sectors(x[::2])) == 64
    assert len(sectors(x[0, 31:33])) == 2


def test_what_cannot_be_traced_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1 << 20, dtype=torch.int8)
    big = copying(x, torch.empty_like(x), 1 << 20)
    assert "16384 programs" in (why_not_traced([big]) or "")
    with pytest.raises(InputError, match="smaller batch"):
        trace([big])
    assert why_not_traced([copying(x, x, 64)]) is None
    monkeypatch.setattr("pqk.gpu.traffic.INTERPRETED", False)
    assert "TRITON_INTERPRET" in (why_not_traced([]) or "")


def assert_bar(run: Launch) -> Traffic:
    got = trace([run])
    assert got.stray == 0
    assert got.moved <= MOST_TRAFFIC * got.once, got
    return got


def planned(module: Any, case: Any, arch: Any = ARCHES[0]) -> Launch:
    with planning_for(arch.planned):
        return module.specialize(case, "cpu")


@pytest.mark.parametrize("module", kernels.KERNELS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_kernel_moves_its_tensors_once(module: Any) -> None:
    """The smallest case that is not one program."""
    runs = [planned(module, case) for case in module.CASES]
    several = [run for run in runs if programs(run) > 1]
    assert_bar(min(several or runs, key=programs))


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHES, ids=lambda a: a.name)
@pytest.mark.parametrize("module", kernels.KERNELS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_case_moves_its_tensors_once(module: Any, arch: Any) -> None:
    for case in module.CASES:
        assert_bar(planned(module, case, arch))
