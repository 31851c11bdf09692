"""Whether several processes train together, which of them this is, and which one decides and writes.

They are those of `accelerate launch` or `torchrun`, once `torch.distributed` is set up. Before that, and in commands
that never set it up, the launcher's environment says which process this is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from pqk.core.decisions import Json

ALONE: ContextVar[bool] = ContextVar("alone", default=False)
"""whether this process works by itself"""


@contextmanager
def alone() -> Iterator[None]:
    """This process works by itself, as the only one, while others do something else. Nobody may wait for it inside."""
    token = ALONE.set(True)
    try:
        yield
    finally:
        ALONE.reset(token)


def is_distributed() -> bool:
    """Whether a process group is set up; one of a single process counts."""
    return _group() is not None


def world_size() -> int:
    """How many processes train together: 1 without a process group."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """The number of this process, from 0; 0 without a process group."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def is_main_process() -> bool:
    """Whether this process decides and writes the files: rank 0, or the only one."""
    return rank() == 0


def is_first_launched() -> bool:
    """Whether the launcher calls this process rank 0, or there is no launcher; a process group is not needed."""
    return os.environ.get("RANK", "0") == "0"


def from_main(value: Callable[[], Json]) -> Json:
    """`value()` of rank 0 in all processes; the others do not call theirs."""
    group = _group()
    if group is None:
        return value()
    box = [value() if is_main_process() else None]
    group.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Returns once every process has come here; at once without a process group."""
    group = _group()
    if group is not None:
        group.barrier()


def _group() -> ModuleType | None:
    """`torch.distributed`, where a process group is set up, and this process does not work by itself."""
    if ALONE.get():
        return None
    # Here, as the command line asks which process it is long before it needs torch, which takes seconds to import.
    from torch import distributed

    return distributed if distributed.is_available() and distributed.is_initialized() else None
