"""A teacher with another tokenizer: it reads the same texts as its own tokens, and answers at the student's places.

Next-token distributions of two tokenizers are about the same thing where both have read the same text: at a place where
a token of either ends. There the teacher's answer, and what its modules gave, is put at the student's token; elsewhere
there is none, and the mask `ALIGNED` says so to the terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.data.data import Batch
from pqk.data.sequences import need_texts, padded
from pqk.data.structures import Inputs, first_tensor
from pqk.errors import InputError, Reason
from pqk.knowledge.taps import tap
from pqk.knowledge.teachers.base import Teacher, TeacherAnswer, run_tapped
from pqk.knowledge.terms.response import ALIGNED

Alignment = Literal["text", "index"]


class RetokenizingTeacher(Teacher):
    """A causal model with a tokenizer of its own.

    Args:
        model: `input_ids` and `attention_mask` int64 [B, S], padded behind, to scores [B, S, V].
        tokenizer: the model's, a fast one of `transformers`.
        students: the tokenizer of the batches, likewise.
        points: module paths whose outputs [B, S, D] it shows as features.
        precision: "fp32", or "bf16" for bfloat16 autocast.
        align: "text", or "index": the n-th token is put at the n-th token, as far as both texts reach.
    """

    other_tokens = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        students: Any,
        points: Sequence[str] = (),
        precision: str = "fp32",
        align: Alignment = "text",
    ) -> None:
        super().__init__()
        for what, each in (("teacher", tokenizer), ("student", students)):
            if not getattr(each, "is_fast", False):
                raise InputError(
                    f"distill: the {what}'s tokenizer, a {type(each).__name__}, does not say where its tokens stand in "
                    "a text; take a fast one (tokenizer.json)"
                )
        self._model = [tap(model.eval(), points)]  # in a list: it is read only, and no part of any checkpoint
        self.tokenizer, self.students = tokenizer, students
        self.precision, self.align = precision, align

    @property
    def module(self) -> nn.Module | None:
        return getattr(self._model[0], "model", None)

    def why_not_cached(self) -> Reason | None:
        return "the teacher has another tokenizer, and its answers are as long as the texts"

    def check(self, example: Inputs) -> None:
        need_texts(example, "a teacher with another tokenizer")

    def live(self, batch: Batch) -> TeacherAnswer:
        need_texts(batch.inputs, "a teacher with another tokenizer")
        ids, mask = batch.inputs
        device = ids.device
        if any(t.device != device for t in self._model[0].parameters()):
            self._model = [copy_of(self._model[0]).to(device)]
        texts = [row[:count].tolist() for row, count in zip(ids, mask.sum(1).tolist(), strict=True)]
        pairs, own = [], []
        for tokens in texts:
            text, ends = places(tokens, self.students)
            encoded = self.tokenizer(text, return_offsets_mapping=True)
            others = [end for _, end in encoded["offset_mapping"]]
            while len(others) > 1 and not others[-1]:
                others.pop()  # a special token behind the text, which is read after it and ends nothing of it
            own.append(torch.tensor(encoded["input_ids"][: len(others)], dtype=torch.int64))
            pairs.append(aligned(ends, others) if self.align == "text" else list(range(min(len(ends), len(others)))))
        if any(not len(t) for t in own):
            raise InputError("distill: the teacher's tokenizer makes no token of a text, and adds none that begins it")
        inputs = tuple(t.to(device) for t in padded(own, 0))
        outputs, features = run_tapped(self._model[0], Batch(inputs, None, None), self.precision)
        index = torch.full_like(ids, -1)
        for row, places_of in zip(index, pairs, strict=True):
            row[: len(places_of)] = torch.tensor(places_of, device=device)
        shown = {point: _gathered(feature, index) for point, feature in features.items()}
        return _gathered(first_tensor(outputs), index), {**shown, ALIGNED: index >= 0}


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    """Values [B, S', …] at the places int64 [B, S] of each row; 0 where these are -1."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    found = values[rows, index.clamp_min(0)]
    return found.where((index >= 0).view(*index.shape, *[1] * (found.dim() - 2)), torch.zeros_like(found))


def places(tokens: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The text of some tokens, and where in it each of them ends; -1 where that is in the middle of a character."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    again = tokenizer(text, return_offsets_mapping=True)
    if again["input_ids"] == list(tokens):
        return text, [end for _, end in again["offset_mapping"]]
    ends = []
    for count in range(1, len(tokens) + 1):  # tokens that no text is read as, such as what a student wrote
        read = tokenizer.decode(tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends.append(len(read) if text.startswith(read) else -1)
    return text, ends


def aligned(student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """For each token of the student the last of the teacher's that ends in the same place, or -1.

    Of several tokens of either that end in one place, as the bytes of a character may, the last has read all of it: the
    others of the student have none.
    """
    last = {end: i for i, end in enumerate(teacher) if end >= 0}
    own = {end: i for i, end in enumerate(student) if end >= 0}
    return [last.get(end, -1) if own.get(end) == i else -1 for i, end in enumerate(student)]
