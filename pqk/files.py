"""Files appear whole or not at all: written beside their place, synced, then renamed into it.

What is read is a plain file, bounded in size and depth (`pqk.documents`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqk.documents import SEAL, digest_of_values, parse_json, read_bytes
from pqk.errors import InputError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary path)`, then rename. Raises `InputError` for a full disk, leaving nothing behind."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a run that was killed; were it a link, its end would be written
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
        with contextlib.suppress(OSError):  # such as a folder that nobody may write to any more
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON document that states its own digest."""
    value = json.loads(json.dumps(value))  # as it will be read: lists for tuples, text for keys
    write_json(path, {SEAL: digest_of_values(value), **value})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Tensors that share memory are stored each in full."""
    whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    write_whole(path, lambda p: save_file(whole, p, metadata))


def read_json(path: Path) -> Any:
    """Raises `InputError` for a missing or unreadable file, and for one that is too large or nested too deeply."""
    return parse_json(read_bytes(path), path)


def read_sealed(path: Path, needed: Collection[str], *, unsealed: bool = False) -> dict[str, Any]:
    """The values of a sealed document, without its digest; `unsealed` lets one without through, of earlier versions.

    Raises:
        InputError: it cannot be read, has none of what is `needed`, or its values are not those that were written.
    """
    value = read_json(path)
    needed = (*needed, *(() if unsealed else (SEAL,)))
    missing = sorted(set(needed) - set(value)) if isinstance(value, dict) else list(needed)
    if missing:
        raise InputError(f"{path} was changed or is of another version of pqk: it has no {', '.join(missing)}")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != digest_of_values(value):
        raise InputError(f"{path} was changed after it was written: its values do not have the sha256 that it states")
    return dict(value)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises `InputError` for a missing, truncated or foreign file; a pickle is named as what it is and never opened.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read {path}: it is not a plain file")
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
    except InputError:
        raise
    except (SafetensorError, ValueError, RuntimeError, AttributeError, KeyError, MemoryError) as error:
        # Beside its own, what torch says of a dtype that it does not have and of a shape that it cannot make.
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
