"""Triton, which may be missing: an import that cannot fail, and whether kernels are interpreted."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

TRITON_MISSING: str | None = None
"""why Triton is missing, else None"""


class _Absent:
    """Stands where Triton would, so that modules import: any attribute, call or subscript gives itself."""

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> _Absent:
        return self


triton: Any = _Absent()
tl: Any = triton
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError as error:
    TRITON_MISSING = f"Triton is not installed ({error}): pip install 'pqk[triton]'"


jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""`triton.jit`; where Triton is missing, the decorated name is a stand-in that `launch` refuses to run"""


INTERPRETED: bool = TRITON_MISSING is None and bool(triton.knobs.runtime.interpret)
"""whether kernels run on CPU tensors, in Triton's interpreter: `TRITON_INTERPRET=1` when this module was imported"""
