"""Assistant teachers: the student that an earlier pass of this run left, as a plain module.

Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv:1902.03393.
"""

from __future__ import annotations

from torch import nn

from pqk.core.program import Program, Stage
from pqk.core.run_folder import scope_of
from pqk.errors import InputError


def earlier_student(program: Program, number: int) -> nn.Module:
    """The student after pass `number` (from 0) of this run, in eval mode.

    Raises `InputError` where that is not saved, or was a graph already.
    """
    snapshot = next((s for s in program.snapshots if s.index == number), None)
    if snapshot is None:
        raise InputError(
            f"distill: the assistant is the student after pass {number} of this run, and none is saved; passes are "
            "counted from 0, and it must come before this one"
        )
    if snapshot.stage != Stage.MODULE:
        raise InputError(
            f'distill: the assistant, the student after "{scope_of(number, snapshot.finished.name)}", is in stage '
            f'{snapshot.stage}; take one from before it was captured (or its files: source = "artifact" or "onnx")'
        )
    return snapshot.restore().student.eval().requires_grad_(False)
