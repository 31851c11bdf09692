"""What a recipe names: the factories of teacher, student and task, and the target."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pqk.settings import settings

FACTORY = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


@settings
class TeacherSpec:
    """Where the teacher comes from. Only compress, check and rebuild import the factory."""

    factory: str = Field(pattern=FACTORY)
    """`module:function` that returns the untrained module, such as "pqk.models.resnet:resnet56" """
    arguments: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the factory"""
    weights: str | None = None
    """a safetensors file, looked for beside the recipe and in the data folder"""


@settings
class StudentSpec:
    """Where a student comes from that is not cut out of its teacher. Only compress, check and rebuild import it."""

    factory: str = Field(pattern=FACTORY)
    """`module:function` that returns the module that the passes begin with, such as "pqk.models.plain:plain"; one with
    a parameter `teacher` gets the teacher. What it draws is drawn from the recipe's seed"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the factory"""
    weights: str | None = None
    """a safetensors file, looked for as the teacher's; without one the weights are those that the factory gives"""


@settings
class TaskSpec:
    """Where data, metric and loss come from."""

    factory: str = Field(pattern=FACTORY)
    """`module:function(data_folder, **arguments)` that returns a `pqk.Task`; one with a parameter `teacher` gets it"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the factory"""


@settings
class TargetSpec:
    """The machine that will run the student; this one where no table is given."""

    name: str
    """such as "x86-avx2"; `pqk doctor` lists them"""
