"""The bytes that launches move, counted from the addresses that they touch under Triton's interpreter.

A GPU moves memory in sectors of 32 bytes. The sectors that the programs of a launch touch, each once, are what must
cross between memory and the chip even with a perfect cache; a layer's own inputs, weights and outputs, each once, are
what it cannot do without. Their ratio says what a layer pays for scratch memory between its launches.

It works in a process that imported Triton with `TRITON_INTERPRET=1`: there the kernels run on CPU tensors, and each
address is a real one. An address outside of every argument is an access out of bounds, which a GPU might not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pqk.errors import InputError, Reason
from pqk.kernels.common.launch import Launch, launch
from pqk.kernels.common.triton import INTERPRETED, TRITON_MISSING

SECTOR = 32
"""bytes"""
PROGRAMS = 1024
"""most programs of a launch that are interpreted: each takes up to a tenth of a second"""

Sectors = NDArray[np.int64]
"""sorted, distinct: address // SECTOR"""


@dataclass(frozen=True)
class Traffic:
    """What the launches of one layer move and multiply. Bytes, except where said."""

    read: int
    written: int
    once: int
    """the layer's inputs, weights and outputs, in whole sectors, each tensor once"""
    issued: int
    """what all lanes of all programs ask for, hit or miss"""
    stray: int
    """accesses outside of every argument; anything but 0 is a bug"""
    int8_macs: int
    """multiply-accumulates of the tiles, their padding included"""
    float_macs: int
    programs: int

    @property
    def moved(self) -> int:
        """Bytes of the distinct sectors, those that are read and those that are written."""
        return self.read + self.written

    @property
    def ratio(self) -> float:
        """Bytes moved over bytes that must be; 1 for a layer that touches nothing."""
        return self.moved / self.once if self.once else 1.0


def why_not_traced(launches: Sequence[Launch]) -> Reason | None:
    """Why these launches cannot be traced here, or None."""
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if not INTERPRETED:
        return "Triton was imported without TRITON_INTERPRET=1"
    if (most := max(map(programs, launches), default=0)) > PROGRAMS:
        return f"one launch has {most} programs, more than the {PROGRAMS} that are interpreted; try a smaller batch"
    return None


def programs(run: Launch) -> int:
    """How many programs a launch has."""
    return math.prod(run.grid)


def trace(launches: Sequence[Launch]) -> Traffic:
    """Run one layer's launches in the interpreter, in order, and count. Their tensors must be on the CPU.

    What the launches write is meaningless afterwards, as matrix products are left out.

    Memory that is updated by atomics was filled before, by a launch that is not ours; its bytes are counted. Raises
    `InputError` where `why_not_traced` gives a reason.
    """
    if (reason := why_not_traced(launches)) is not None:
        raise InputError(f"no traffic can be counted: {reason}")
    tensors = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t for each in launches for t in tensors_of(each)}
    inside = _merged([_span(t) for t in tensors.values()])
    records = []
    for each in launches:
        with _recording(inside) as record:
            launch(each)
        records.append(record.seen())
    filled = [_fill(i, records) for i in range(len(records))]
    return Traffic(
        read=SECTOR * sum(len(union(r.loads, r.atomics)) for r in records),
        written=SECTOR * sum(len(union(r.stores, r.atomics)) + fill for r, fill in zip(records, filled, strict=True)),
        once=SECTOR * _needed([sectors(t) for t in tensors.values()], records),
        issued=sum(r.issued for r in records),
        stray=sum(r.stray for r in records),
        int8_macs=sum(r.int8_macs for r in records),
        float_macs=sum(r.float_macs for r in records),
        programs=sum(map(programs, launches)),
    )


def _fill(i: int, records: Sequence[Seen]) -> int:
    """Sectors that launch `i` updates and no launch before it wrote: whoever allocated them wrote zeros first."""
    earlier = union(*(part for r in records[:i] for part in (r.stores, r.atomics)))
    return len(np.setdiff1d(records[i].atomics, earlier, assume_unique=True))


def tensors_of(run: Launch) -> list[torch.Tensor]:
    """The tensors among a launch's arguments that hold anything."""
    return [a for a in run.args.values() if isinstance(a, torch.Tensor) and a.numel()]


def sectors(tensor: torch.Tensor) -> Sectors:
    """The sectors that a tensor's elements lie in; gaps between strided rows are none of it."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        start, end = _span(tensor)
        return np.arange(start // SECTOR, -(-end // SECTOR))
    start = tensor.data_ptr()
    elements = torch.zeros((), dtype=torch.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements = elements[..., None] + torch.arange(length) * stride
    return np.unique((start + size * elements.numpy().ravel()) // SECTOR)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _merged(spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Disjoint [start, end) rows, in order, that cover the same addresses; the first lies before all memory."""
    rows = [[-2, -1]]
    for start, end in sorted(spans):
        if start <= rows[-1][1]:
            rows[-1][1] = max(rows[-1][1], end)
        else:
            rows.append([start, end])
    return np.array(rows, np.int64)


def union(*parts: Sectors) -> Sectors:
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))


def _needed(tensors: Sequence[Sectors], records: Sequence[Seen]) -> int:
    """Sectors that a layer cannot do without: what it reads and never writes, and what it writes for its reader.

    What is read back after it was written is scratch, and counts as nothing.
    """
    inputs, outputs = [], []
    for own in tensors:
        loaded = [i for i, r in enumerate(records) if _meets(own, r.loads)]
        updated = [i for i, r in enumerate(records) if _meets(own, r.atomics)]
        written = [i for i, r in enumerate(records) if _meets(own, r.stores)] + updated
        if not written:
            inputs += [own] if loaded else []
        elif not any(i > min(written) or i in updated for i in loaded):
            outputs.append(own)
    return len(union(*inputs)) + len(union(*outputs))


def _meets(a: Sectors, b: Sectors) -> bool:
    return bool(np.isin(a, b, assume_unique=True).any())


@dataclass(frozen=True)
class Seen:
    """What one launch did: the sectors that its loads, stores and atomics touched, and the counts of `Traffic`."""

    loads: Sectors
    stores: Sectors
    atomics: Sectors
    issued: int
    stray: int
    int8_macs: int
    float_macs: int


@dataclass
class _Record:
    """The same while the launch runs. `inside` are the address ranges of its arguments."""

    inside: NDArray[np.int64]
    loads: list[Sectors] = field(default_factory=list)
    stores: list[Sectors] = field(default_factory=list)
    atomics: list[Sectors] = field(default_factory=list)
    issued: int = 0
    stray: int = 0
    int8_macs: int = 0
    float_macs: int = 0

    def touch(self, into: list[Sectors], pointers: Any, mask: Any) -> None:
        """Note an access; `pointers` and `mask` are handles of the interpreter."""
        active = np.broadcast_to(True if mask is None else mask.data, pointers.data.shape)
        addresses = pointers.data[active].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.issued += size * addresses.size
        row = np.searchsorted(self.inside[:, 0], addresses, side="right") - 1
        self.stray += int((addresses + size > self.inside[row, 1]).sum())
        into.append(np.unique(addresses // SECTOR))

    def multiply(self, a: Any, b: Any) -> None:
        macs = a.data.size * b.data.shape[-1]
        if a.get_element_ty().is_int():
            self.int8_macs += macs
        else:
            self.float_macs += macs

    def seen(self) -> Seen:
        loads, stores, atomics = (union(*parts) for parts in (self.loads, self.stores, self.atomics))
        return Seen(loads, stores, atomics, self.issued, self.stray, self.int8_macs, self.float_macs)


@contextmanager
def _recording(inside: NDArray[np.int64]) -> Iterator[_Record]:
    """A record that the interpreter's loads, stores, atomics and matrix products write to.

    Products are counted and not computed: no address depends on one, and integer ones are numpy's slowest.
    """
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    record = _Record(inside)

    def load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> None:
        record.touch(record.loads, pointers, mask)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> None:
        record.touch(record.stores, pointers, mask)

    def swap(pointers: Any, *rest: Any, **named: Any) -> None:
        record.touch(record.atomics, pointers, None)

    def update(kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> None:
        record.touch(record.atomics, pointers, mask)

    def dot(a: Any, b: Any, accumulator: Any, *rest: Any, **named: Any) -> Any:
        record.multiply(a, b)
        return TensorHandle(accumulator.data, accumulator.dtype.scalar)

    replaced: dict[str, Callable[..., Any]] = {
        "create_masked_load": _both(load, builder.create_masked_load),  # unmasked and descriptors' come here too
        "create_masked_store": _both(store, builder.create_masked_store),
        "create_atomic_cas": _both(swap, builder.create_atomic_cas),
        "create_atomic_rmw": _both(update, builder.create_atomic_rmw),
        "create_dot": dot,
    }
    for name, function in replaced.items():
        setattr(builder, name, function)
    try:
        yield record
    finally:
        for name in replaced:
            delattr(builder, name)  # the class's own method shows again


def _both(first: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first(*arguments, **named)
        return then(*arguments, **named)

    return both
