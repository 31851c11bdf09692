"""Assistant teachers: the student that an earlier pass of this run left, as a plain module.

Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv:1902.03393.
"""

from __future__ import annotations

import copy

from torch import nn

from pqk.core.program import Example, Program, Rewrite, Stage, replay
from pqk.errors import InputError
from pqk.files import read_json, read_tensors
from pqk.passes.prune.cuts import cut_channels, drop_block


def earlier_student(program: Program, example: Example, number: int) -> nn.Module:
    """The student after pass `number` (from 0) of this run, in eval mode.

    Raises `InputError` where that is not saved, or was a graph already.
    """
    folder = program.run.folder
    programs = [] if folder is None else sorted(folder.glob(f"{number:02d}-*/program.json"))
    if not programs:
        raise InputError(
            f"distill: the assistant is the student after pass {number} of this run, and none is saved; passes are "
            "counted from 0, and it must come before this one"
        )
    saved = read_json(programs[0])
    if saved["stage"] != str(Stage.MODULE):
        raise InputError(
            f'distill: the assistant, the student after "{programs[0].parent.name}", is in stage {saved["stage"]}; '
            'take one from before it was captured (or its files: source = "artifact" or "onnx")'
        )
    plan = [Rewrite(r["function"], r["arguments"]) for r in saved["plan"]]
    table = {f.__name__: f for f in (cut_channels, drop_block)}
    student = replay(copy.deepcopy(program.teacher), example, plan, table)
    student.load_state_dict(read_tensors(programs[0].parent / "student.safetensors")[0])
    return student.eval()
