"""The configurations that a student's kernels run with: chosen or measured once, and stored with the artifact.

`tuning.json` beside `student.pt2`:

    {"format": 1, "gpu": {"capability": [8, 0], "processors": 108, "shared": 166912}, "measured": false,
     "choices": {"int8_linear": {"m=1 n=10 k=64 u8": {"block_m": 16, "block_n": 32, …}}}}

A compile stores what its target's kernels choose by rule; `pqk benchmark DIR --device cuda` measures, and what it found
is given to a compile as the `tuning` of its `fuse`. `Artifact.student` reads the file: on a GPU like the one it names
the kernels run as it says, on any other, and for shapes that it does not have, as they choose there. No configuration
changes a number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pqk.errors import InputError
from pqk.files import read_json
from pqk.kernels import KERNELS
from pqk.kernels.common.configs import Config, remember
from pqk.kernels.common.gpu import Gpu

NAME = "tuning.json"
FORMAT = 1


CHOICES = {m.__name__.rpartition(".")[2]: m.CONFIGS for m in KERNELS if hasattr(m, "CONFIGS")}
"""the kernels that have a choice, and the block sizes that each may have"""


@dataclass(frozen=True)
class Tuning:
    """Configurations by kernel and shape, for one kind of GPU; `measured` there, or chosen by rule."""

    gpu: Gpu
    measured: bool
    choices: dict[str, dict[str, Config]]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        chosen = {op: {key: asdict(c) for key, c in table.items()} for op, table in self.choices.items()}
        return {"format": FORMAT, "gpu": asdict(self.gpu), "measured": self.measured, "choices": chosen}

    @staticmethod
    def load(path: Path | str) -> Tuning:
        """The tuning in a file, which may be the whole answer of `pqk benchmark --device cuda --json`.

        Raises `InputError` for a file that is missing or malformed, or whose configurations are not their kernel's.
        """
        found = read_json(Path(path))
        if isinstance(found, dict) and "tuning" in found:
            found = found["tuning"]
        try:
            return _parsed(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is no tuning of format {FORMAT} ({error}); measure it again") from error

    def install(self) -> None:
        """Let the kernels of this process run as it says, on GPUs like its own."""
        for op, table in self.choices.items():
            for key, config in table.items():
                remember(self.gpu, op, key, config)


def _parsed(found: Any) -> Tuning:
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']}")
    first, second = found["gpu"]["capability"]
    numbers = first, second, found["gpu"]["processors"], found["gpu"]["shared"]
    if not all(type(n) is int and 0 <= n < 1 << 31 for n in numbers) or not isinstance(found["measured"], bool):
        raise ValueError("a GPU is told by whole numbers, and whether it was measured by true or false")
    gpu = Gpu((first, second), *numbers[2:])
    choices = {op: {k: _config(op, c) for k, c in table.items()} for op, table in found["choices"].items()}
    return Tuning(gpu, found["measured"], choices)


def _config(op: str, values: dict[str, Any]) -> Config:
    kinds = {f.name: type(getattr(CHOICES["int8_linear"][0], f.name)) for f in fields(Config)}
    wrong = sorted(k for k in kinds.keys() | values.keys() if type(values.get(k)) is not kinds.get(k))
    if wrong:
        raise ValueError(f"a configuration of {op} with {', '.join(wrong)} missing, unknown or of another type")
    config = Config(**values)
    if not any(_blocks(config) == _blocks(c) for c in CHOICES.get(op, ())):
        raise ValueError(f"{config.block_m} x {config.block_n} x {config.block_k} is no configuration of {op}")
    if config.num_warps not in (1, 2, 4, 8, 16) or not 1 <= config.split_k <= 64 or config.group_m < 1:
        raise ValueError(f"{op}: {config} cannot be launched")
    return config


def _blocks(config: Config) -> tuple[int, ...]:
    return config.block_m, config.block_n, config.block_k, config.num_stages
