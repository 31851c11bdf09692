"""Files appear whole or not at all: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqk.errors import InputError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary path)`, then rename. Raises `InputError` for a full disk, leaving nothing behind."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what a new file here gets; some writers make theirs private
        write(partial)
        partial.chmod(mode)
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was left half-written") from error
    except SafetensorError as error:  # the Rust writer reports a full disk as its own error
        raise InputError(f"cannot write {path}: {error}; nothing was left half-written") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Tensors that share memory are stored each in full."""
    whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    write_whole(path, lambda p: save_file(whole, p, metadata))


def read_json(path: Path) -> Any:
    """Raises `InputError` for a missing or unreadable file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises `InputError` for a missing, truncated or foreign file; a pickle is named as what it is and never opened.
    """
    try:
        with path.open("rb") as f:
            head = f.read(9)
        # A safetensors header's length can begin with the same bytes, but its ninth byte opens the JSON.
        if head[8:] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
            raise InputError(
                f"{path} is a pickle (a torch.save file), which can run code when opened; pqk reads safetensors only. "
                "Convert it where you trust it: safetensors.torch.save_file(torch.load(path)['state_dict'], ...)"
            )
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
