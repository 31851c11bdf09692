"""The pass that leaves out tokens: the largest lever of small language models, whose tables are most of them.

A student of another vocabulary cannot be held against its teacher token by token. So what is left out, is left out of
both before anything runs: the teacher's scores of the kept tokens are the whole teacher's, and after a softmax its
distribution given that one of them comes next; texts are split into kept tokens anew. Everything after that, data,
distillation, parity and the table of the report, is in the smaller vocabulary, and the report says what the change of
vocabulary itself cost, per character.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from torch import nn

from pqk.copies import copy_of
from pqk.core.program import Pass, Program, RewriteFunction, Stage
from pqk.data.data import Data
from pqk.errors import InputError
from pqk.models.vocabulary import TokenChoice, read_tokens, write_tables, write_texts
from pqk.passes.vocabulary.tables import cut_vocabulary, text_model
from pqk.scratch import ScratchFolder
from pqk.settings import settings
from pqk.task.directory import ModelDirectory
from pqk.task.task import Task

KEPT = "kept_tokens.json"
"""beside the smaller tokenizer: the old ids in the order of the new ones, and how many there were"""


@settings
class Vocabulary(Pass):
    """Leave out the tokens that training texts do not use, of teacher, student, tokenizer and data. Comes first.

    Texts that must not be forgotten (`Task(retained=…)`) count as training texts. Others are spelled with what is left,
    down to bytes or characters. The teacher is compared over kept tokens.
    """

    size: int | None = Field(default=None, ge=1)
    """keep so many tokens at most, the most frequent of the training texts and what they are put together from"""
    share: float | None = Field(default=None, gt=0, le=1)
    """keep those that make up this share of all that occur in training texts, the most frequent"""
    min_count: int | None = Field(default=None, ge=1)
    """keep those that occur so often in training texts; 1 where nothing is given"""
    name: ClassVar[str] = "vocabulary"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE})
    produces: ClassVar[Stage | None] = Stage.MODULE
    rewrites: ClassVar[tuple[RewriteFunction, ...]] = (cut_vocabulary,)

    @model_validator(mode="after")
    def _consistent(self) -> Vocabulary:
        if sum(value is not None for value in (self.size, self.share, self.min_count)) > 1:
            raise InputError("vocabulary: size, share and min_count each say what tokens stay; give one of them")
        return self

    def prepare(self, teacher: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        """Teacher and task in fewer tokens. Raises `InputError` where the tokenizer or the model cannot lose any."""
        place = self._directory(task)
        tokens, of = read_tokens(place.folder), text_model(teacher).get_input_embeddings().num_embeddings
        counts = count_tokens(task.need_train(self.name))
        if task.retained is not None:  # a token that is left out is forgotten for certain
            counts += count_tokens(task.retained)
        fewest = self.min_count or (1 if self.size is None and self.share is None else None)
        kept = TokenChoice(self.size, self.share, fewest).of(tokens, counts)
        scratch = ScratchFolder("vocabulary")
        try:
            folder = Path(scratch.name)
            write_tables(place.folder, folder, kept, of)
            write_texts(place.folder, folder, tokens, kept)
            (folder / KEPT).write_text(json.dumps({"kept": kept, "of": of}))
            smaller = cut_vocabulary(copy_of(teacher, "teacher"), task.example, kept=kept, of=of)
            reduced = place.remade(folder)
        except BaseException:
            scratch.cleanup()
            raise
        weakref.finalize(self._directory(reduced), scratch.cleanup)
        notes = [f"{len(kept)} of {of} tokens are kept, of teacher and student: its scores of the others are left out"]
        notes += _per_character((teacher, task), (smaller, reduced))
        return smaller, reduced.noted(notes)

    def apply(self, program: Program, task: Task) -> Program:
        """Notes in the plan what teacher and task lost. Raises `InputError` where the pass was not prepared."""
        path = self._directory(task).folder / KEPT
        if not path.is_file():
            raise InputError("vocabulary: it changes teacher and task, so it is the first pass of a recipe")
        document = json.loads(path.read_text())
        kept, of = document["kept"], document["of"]
        return program.rewrite(cut_vocabulary, task.example, kept=kept, of=of).note(kept=len(kept), of=of)

    def _directory(self, task: Task) -> ModelDirectory:
        if task.directory is None:
            raise InputError(
                "vocabulary: the task does not know the directory of its tokenizer; pqk.models.language.language_task "
                "gives one that does"
            )
        return task.directory


def count_tokens(data: Data) -> Counter[int]:
    """How often each token occurs in data whose inputs are ids and mask."""
    counts: Counter[int] = Counter()
    for batch in data.batches():
        ids, mask, *_ = batch.inputs
        values, times = ids[mask > 0].unique(return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    return counts


def _per_character(*judged: tuple[nn.Module, Task]) -> list[str]:
    """What the whole and the smaller teacher say of validation texts, in nats a token and a character."""
    rows = []
    for which, (model, task) in zip(("the whole teacher", "without those tokens"), judged, strict=True):
        assert task.directory is not None
        tokens, characters = task.directory.spelled(task.validation)
        nats = -task.score(model, task.validation)
        rows.append(f"{which} {nats:.4g} nats a token, {nats * tokens / max(1, characters):.4g} a character")
    return [f"on validation texts: {'; '.join(rows)}"]
