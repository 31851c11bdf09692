"""Where one quantizer goes: what placement finds, what the rewrite puts in, and how a plan of rewrites stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pqk.errors import InputError
from pqk.quant.blocks import WeightBits


@dataclass(frozen=True)
class ActivationPoint:
    """The value of `node` is rounded for those of its readers that are in `readers`; `dynamic`: on its own range."""

    node: str
    readers: tuple[str, ...]
    dynamic: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"kind": "dynamic" if self.dynamic else "activation", "node": self.node, "readers": [*self.readers]}


@dataclass(frozen=True)
class WeightPoint:
    """Weight and bias of `node` are rounded."""

    node: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": "weight", "node": self.node}


@dataclass(frozen=True)
class TablePoint:
    """The rows that `node` looks up are rounded."""

    node: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": "table", "node": self.node}


@dataclass(frozen=True)
class BlockPoint:
    """Input and weight of the linear layer `node` are rounded in blocks, the weight in `bits` bits."""

    node: str
    bits: WeightBits

    def to_json(self) -> dict[str, Any]:
        return {"kind": "blockwise", "node": self.node, "bits": self.bits}


@dataclass(frozen=True)
class BlockTablePoint:
    """The look-up `node` reads the weight of a linear layer as that is rounded in blocks."""

    node: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": "blockwise_table", "node": self.node}


Point = ActivationPoint | WeightPoint | TablePoint | BlockPoint | BlockTablePoint


def parse_point(entry: Mapping[str, Any]) -> Point:
    """The point that `to_json` wrote. Raises `InputError` for another kind, such as a later version's."""
    match entry["kind"]:
        case "activation" | "dynamic" as kind:
            return ActivationPoint(entry["node"], tuple(entry["readers"]), dynamic=kind == "dynamic")
        case "weight":
            return WeightPoint(entry["node"])
        case "table":
            return TablePoint(entry["node"])
        case "blockwise":
            return BlockPoint(entry["node"], entry["bits"])
        case "blockwise_table":
            return BlockTablePoint(entry["node"])
    raise InputError(
        f'quantize: the plan puts a quantizer of the kind "{entry["kind"]}" at {entry["node"]}; this version of pqk '
        "knows activation, dynamic, weight, table, blockwise and blockwise_table. Open the artifact with the version "
        "that wrote it"
    )
