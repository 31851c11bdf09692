"""Structures of outputs: taken apart and put together in one order, whatever holds the tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pqk.data.structures import (
    concatenate,
    first_tensor,
    leaves,
    map_tensors,
    named_tensors,
    plain_structure,
    recast,
    restructured,
    tensors,
    why_not_outputs,
)


class Named(NamedTuple):
    logits: Tensor
    hidden: Any = None


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    loss: Tensor | None = None
    maps: tuple[Any, ...] = ()


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in `transformers`: a dict and a dataclass, whose keys are the fields that are not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


A, B, C = (torch.full((2, i), float(i)) for i in (1, 2, 3))
STRUCTURES = {
    "tensor": (A, ["logits"]),
    "tuple": ((A, B), ["output_0", "output_1"]),
    "nested": ((A, [B, (C,)]), ["output_0", "output_1_0", "output_1_1_0"]),
    "none": ((None, A), ["output_1"]),
    "dict": ({"boxes": A, "maps": [B, C]}, ["boxes", "maps_0", "maps_1"]),
    "ordered": (OrderedDict(b=A, a=B), ["b", "a"]),
    "default": (defaultdict(list, {"a": [A]}), ["a_0"]),
    "named": (Named(A, {"x": B}), ["logits", "hidden_x"]),
    "dataclass": (Frozen(A, None, (B, [C])), ["logits", "maps_0", "maps_1_0"]),
    "model output": (ModelOutput(logits=A), ["logits"]),
    "same name": ({"a": {"b": A}, "a_b": B}, ["a_b", "a_b_1"]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_everything_takes_a_structure_apart_in_one_order(name: str) -> None:
    value, names = STRUCTURES[name]
    parts = tensors(value)
    assert list(named_tensors(value)) == names
    assert all(a is b for a, b in zip(named_tensors(value).values(), parts, strict=True))
    assert first_tensor(value) is parts[0]
    seen: list[Tensor] = []
    assert type(map_tensors(seen.append, value)) is (type(None) if name == "tensor" else type(value))
    assert all(a is b for a, b in zip(seen, parts, strict=True))
    again = restructured(value, iter([t + 1 for t in parts]))
    assert type(again) is type(value)
    assert [path for path, _ in leaves(again)] == [path for path, _ in leaves(value)]
    assert all(torch.equal(a, b + 1) for a, b in zip(tensors(again), parts, strict=True))
    twice = concatenate([value, again])
    assert type(twice) is type(value)
    assert all(torch.equal(t, torch.cat([p, p + 1])) for t, p in zip(tensors(twice), parts, strict=True))
    assert type(recast(value, plain_structure(value))) is type(value)
    assert all(a is b for a, b in zip(tensors(plain_structure(value)), parts, strict=True))


def test_fields_are_set_and_not_only_items() -> None:
    doubled = map_tensors(lambda t: 2 * t, ModelOutput(logits=A))
    assert torch.equal(doubled.logits, 2 * A) and torch.equal(doubled["logits"], 2 * A) and doubled.loss is None
    assert torch.equal(map_tensors(lambda t: 2 * t, Frozen(A)).logits, 2 * A)


def test_targets_are_joined_by_name_in_whatever_order_they_come() -> None:
    joined = concatenate([{"a": A, "b": B}, {"b": B, "a": A}])
    assert torch.equal(joined["a"], torch.cat([A, A])) and torch.equal(joined["b"], torch.cat([B, B]))


def test_names_that_inputs_have_are_numbered() -> None:
    assert list(named_tensors({"x": A, "y": B}, taken=["x"])) == ["x_1", "y"]


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ("text", "its output is a str without tensors"),
        ((A, None), None),
        ({"logits": A, "loss": torch.tensor(1.0)}, "its output loss is one number for the whole batch"),
        ((A, [B, 3]), "its output 1_1 is of type int"),
        ({"cache": {"keys": A, "kind": "static"}}, "its output cache_kind is of type str"),
    ],
)
def test_outputs_that_no_file_holds_are_named(outputs: Any, reason: str | None) -> None:
    found = why_not_outputs(outputs)
    assert found is None if reason is None else found is not None and found.startswith(reason)
