"""A teacher that has read more than the student: a text that stands before every prompt, such as demonstrations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.sequences import need_texts
from pqk.data.structures import Inputs, map_tensors
from pqk.errors import InputError, Reason
from pqk.knowledge.teachers.base import Teacher, TeacherAnswer


class ContextTeacher(Teacher):
    """Another teacher, with a text before each prompt that the student does not see.

    Args:
        inner: who answers, over sequences of tokens.
        context: the text's tokens, int64 [P].
        after: tokens at the beginning of each prompt that stay in front, such as the one that begins a text.

    Raises:
        InputError: the context is empty.
    """

    def __init__(self, inner: Teacher, context: Tensor, after: int = 1) -> None:
        super().__init__()
        if not len(context):
            raise InputError("distill: the context that the teacher is to read has no tokens")
        self.inner, self.after = inner, after
        self.context: Tensor
        self.register_buffer("context", context, persistent=False)

    @property
    def module(self) -> nn.Module | None:
        return self.inner.module

    @property
    def no_feature_reason(self) -> str:  # type: ignore[override]
        return self.inner.no_feature_reason

    def why_not_cached(self) -> Reason | None:
        return "the teacher reads a context, and its answers are as long as the texts"

    def check(self, example: Inputs) -> None:
        need_texts(example, "a teacher with a context")
        self.inner.check(example)

    def begin(self, progress: float) -> None:
        self.inner.begin(progress)

    def live(self, batch: Batch) -> TeacherAnswer:
        need_texts(batch.for_teacher().inputs, "a teacher with a context")
        ids, mask = batch.for_teacher().inputs
        context = self.context.to(ids.device).expand(len(ids), -1)
        seen = tuple(
            torch.cat([t[:, : self.after], part, t[:, self.after :]], 1)
            for t, part in ((ids, context), (mask, torch.ones_like(context)))
        )
        # What follows a token of the student's follows the same token of the teacher's, later by the context.
        count = context.shape[1]
        outputs, features = map_tensors(lambda t: t[:, count:], self.inner(Batch(seen, None, None)))
        return outputs, features
