"""How the file of a causal model is written, where that is a choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pqk.errors import InputError
from pqk.settings import settings


@settings
class DecoderForm:
    """What model.onnx of a task that generates is made of, and what it answers. By default standard operators alone."""

    attention: Literal["standard", "grouped"] = "standard"
    """the operator of attention with its cache: ONNX's `Attention`, or ONNX Runtime's `GroupQueryAttention`
    (com.microsoft), which can write new keys and values into the buffer of those before, as onnxruntime-genai lets it;
    heads must be a multiple of 8 wide, and tokens after others are read one by one or of one text"""
    logits: Literal["all", "last"] = "all"
    """logits [B, S, V] of all new tokens, or [B, 1, V] of the last that is no padding, which are all that a text is
    continued by; the product with the vocabulary then is of one token, however long the prompt"""

    @staticmethod
    def of(given: DecoderForm | Mapping[str, Any] | None) -> DecoderForm:
        """The form that is given as such, as a table of its fields, or, as None, by default.

        Raises `InputError` for anything else, and for a field or value that there is none of.
        """
        if given is None or isinstance(given, DecoderForm):
            return given or DecoderForm()
        if not isinstance(given, Mapping):
            raise InputError(
                f"decoder_form is a {type(given).__name__} and must be a table, such as {{ logits = 'last' }}"
            )
        return DecoderForm(**given)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know of the file."""
        said = []
        if self.attention == "grouped":
            said.append("attention in model.onnx is ONNX Runtime's GroupQueryAttention: no other runtime takes it")
        if self.logits == "last":
            said.append(
                "model.onnx gives the logits of the last token alone; metric and decisions of whole texts are of the "
                "same file with the node last_token taken out"
            )
        return tuple(said)
