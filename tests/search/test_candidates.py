"""The networks that a search begins with."""

from __future__ import annotations

from torch import nn

from pqk.search.candidates import forms


def test_models_that_continue_texts_are_tried_in_blocks_as_well() -> None:
    """Right after fixed ranges, with which tokens of a small model are others."""
    made = {c.name: c for c in forms(nn.Identity(), blocks=True)}
    assert [*made] == ["static", "blocks", "dynamic", "float"]
    (quantize,) = (p for p in made["blocks"].passes if p.name == "quantize")
    assert quantize.activations == "blockwise"  # type: ignore[attr-defined]
    assert [c.name for c in forms(nn.Identity())] == ["static", "dynamic", "float"]
