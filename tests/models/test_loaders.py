"""Which tools open a directory, by the sizes of its layers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from pqk.models.decoder_files import DecoderSizes
from pqk.models.loaders import loaders_of

LLAMA = DecoderSizes(
    hidden=64, vocabulary=99, head_width=16, heads=(4, 4), groups=(2, 2), intermediate=(96, 96), near=(False, False)
)


def said(sizes: DecoderSizes, kind: str) -> dict[str, bool]:
    return {tool: reason is None for tool, reason in loaders_of(sizes, SimpleNamespace(model_type=kind)).items()}


@pytest.mark.parametrize(
    ("sizes", "kind", "closed"),
    [
        (LLAMA, "llama", []),
        (replace(LLAMA, intermediate=(96, 32)), "llama", []),
        (replace(LLAMA, heads=(4, 2), groups=(2, 1)), "llama", ["optimum", "transformers.js"]),
        (replace(LLAMA, heads=(2, 2), groups=(1, 1)), "llama", ["optimum"]),
        (replace(LLAMA, heads=(2, 2), groups=(1, 1), hidden=32), "llama", []),
        (replace(LLAMA, hidden=48), "llama", ["optimum"]),
        (replace(LLAMA, hidden=48), "gemma3_text", []),
        (LLAMA, "phi", ["optimum"]),
        (replace(LLAMA, groups=(4, 4)), "phi", []),
    ],
)
def test_tools_that_take_one_number_for_all_layers(sizes: DecoderSizes, kind: str, closed: list[str]) -> None:
    assert [tool for tool, opens in said(sizes, kind).items() if not opens] == closed


def test_a_reason_says_the_numbers() -> None:
    reasons = loaders_of(replace(LLAMA, heads=(4, 2), groups=(2, 1)), SimpleNamespace(model_type="llama"))
    assert "layers have 2, 1 heads of keys and values" in str(reasons["transformers.js"])
    assert 'scope = "uniform"' in str(reasons["optimum"])
