"""Which tools open the directory of a causal model whose layers were cut to different sizes."""

from __future__ import annotations

from typing import Any

from pqk.errors import Reason
from pqk.models.decoder_files import DecoderSizes

OWN_WIDTH = frozenset(("gemma", "gemma3_text", "gpt_oss", "nemotron"))
"""families for which optimum-onnx (0.1) reads the width of a head; for others it divides the model's by the heads"""
OWN_GROUPS = frozenset(
    (
        "arcee", "deepseek_v3", "cohere", "gemma", "gemma3_text", "glm", "granite", "gpt_oss", "helium", "mistral",
        "llama", "nemotron", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
    )
)  # fmt: skip
"""families for which it reads how many keys and values there are; for others, as many as heads"""


def loaders_of(sizes: DecoderSizes, config: Any) -> dict[str, Reason | None]:
    """For each tool why it cannot run the model with its cache; None where it can.

    Args:
        sizes: of the student, as `pqk.models.decoder_files.sizes_of_decoder` gives them.
        config: the family's configuration, of which the type is read.

    The tools make an empty cache of what config.json says of all layers at once; onnxruntime-genai goes by the inputs
    of model.onnx.
    """
    alike = _why_not_alike(sizes)
    return {"onnxruntime-genai": None, "optimum": alike or _why_not_optimum(sizes, config), "transformers.js": alike}


def _why_not_alike(sizes: DecoderSizes) -> Reason | None:
    if len({*sizes.groups}) < 2:
        return None
    counts = ", ".join(map(str, sizes.groups))
    return (
        f"layers have {counts} heads of keys and values, and it makes the cache of one number for all; prune with "
        'scope = "uniform"'
    )


def _why_not_optimum(sizes: DecoderSizes, config: Any) -> Reason | None:
    kind, heads = config.model_type, max(sizes.heads)
    if kind not in OWN_WIDTH and sizes.hidden != heads * sizes.head_width:
        return (
            f"heads are {sizes.head_width} wide, and of a {kind} it takes {sizes.hidden} channels over {heads} heads "
            "for that; leave the residual width, or the heads, uncut"
        )
    if kind not in OWN_GROUPS and max(sizes.groups) != heads:
        return (
            f"there are {max(sizes.groups)} heads of keys and values, and of a {kind} it takes {heads}, as many as of "
            "queries"
        )
    return None
