"""Which process decides and writes, where several train."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pqk.core.journal import Json


def is_main_process() -> bool:
    """Whether this process decides and writes the files: rank 0, or the only one."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )


def from_main(value: Callable[[], Json]) -> Json:
    """`value()` of rank 0 in all processes; the others do not call theirs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value()
    box = [value() if is_main_process() else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
