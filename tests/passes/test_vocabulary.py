"""The pass that leaves out tokens: teacher, student, task and artifact in the smaller vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from small_languages import SENTENCES, directory

from pqk import Recipe, compress
from pqk.copies import copy_of
from pqk.core.pipeline import prepared
from pqk.core.program import Program, replay
from pqk.core.run_context import RunContext
from pqk.deploy.artifact import Artifact
from pqk.errors import InputError
from pqk.evaluation.settings import Evaluation
from pqk.models.decoder import Decoder, decoder
from pqk.models.language import language_task
from pqk.passes import Capture, Convert, Prune, Quantize, Vocabulary
from pqk.passes.vocabulary.tables import cut_vocabulary
from pqk.target.target import Target
from pqk.task.task import Task


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Task]:
    folder = directory(tmp_path_factory.mktemp("language") / "whole")
    table = {"text": SENTENCES[:7]}
    task = language_task(
        directory=folder, train={"text": SENTENCES[:3]}, evaluation=table, validation=table, batch_size=4
    )
    return decoder(folder), task


def test_teacher_and_task_speak_of_kept_tokens(whole: tuple[Decoder, Task]) -> None:
    teacher, task = whole
    smaller, reduced = prepared([Vocabulary()], teacher, task)
    assert reduced.directory is not None and task.train is not None and reduced.train is not None
    kept = json.loads((reduced.directory.folder / "kept_tokens.json").read_text())["kept"]
    assert len(kept) < teacher.model.config.vocab_size == 361
    for old, new in zip(task.train.batches(), reduced.train.batches(), strict=True):
        assert torch.equal(torch.tensor(kept)[new.inputs[0]], old.inputs[0])
        with torch.no_grad():
            seen = old.inputs[1] > 0
            assert torch.equal(smaller(*new.inputs)[seen], teacher(*old.inputs)[..., kept][seen])
    lengths = [sum(int((b.inputs[1] > 0).sum()) for b in t.evaluation.batches()) for t in (task, reduced)]
    assert lengths[1] > lengths[0], "what was not counted is spelled in more tokens"
    assert f"{len(kept)} of 361 tokens are kept" in reduced.notes[-2]
    assert "nats a token" in reduced.notes[-1] and "a character" in reduced.notes[-1]
    assert teacher.model.config.vocab_size == 361, "the teacher that was given is as it was"


def test_tokens_of_what_must_not_be_forgotten_stay(whole: tuple[Decoder, Task]) -> None:
    teacher, task = whole
    assert task.directory is not None
    table, more = {"text": SENTENCES[:3]}, {"text": SENTENCES[3:6]}
    held = language_task(
        directory=task.directory.folder, train=table, evaluation=table, validation=table, retained=more,
        retained_evaluation=more, batch_size=4,
    )  # fmt: skip
    _, reduced = prepared([Vocabulary()], teacher, held)
    for part, other in ((held.retained, reduced.retained), (held.retained_evaluation, reduced.retained_evaluation)):
        assert part is not None and other is not None
        lengths = [sum(int((b.inputs[1] > 0).sum()) for b in data.batches()) for data in (part, other)]
        assert lengths[0] == lengths[1], "every token is still there"
    with pytest.raises(InputError, match="cannot be split off to tell what was forgotten; pass retained_evaluation"):
        language_task(directory=task.directory.folder, train=table, evaluation=table, validation=table, retained=more)


def test_nats_a_character_are_those_of_all_tokens_over_all_characters(whole: tuple[Decoder, Task]) -> None:
    teacher, task = whole
    _, reduced = prepared([Vocabulary(min_count=3)], teacher, task)
    nats = []
    for batch in task.validation.batches():
        with torch.no_grad():
            scores = teacher(*batch.inputs).log_softmax(-1)
        counted = batch.targets != -100
        nats.append(-scores.gather(2, batch.targets.clamp(min=0)[..., None])[..., 0][counted].double().sum())
    characters = sum(len(text) for text in SENTENCES[:7])
    assert f"{float(sum(nats)) / characters:.4g} a character; without" in reduced.notes[-1]


def test_the_plan_cuts_the_whole_teacher_and_leaves_the_smaller_one(whole: tuple[Decoder, Task]) -> None:
    teacher, task = whole
    smaller, reduced = prepared([Vocabulary(share=0.8)], teacher, task)
    program = Program.begin(smaller, Target.named("x86-avx2"), RunContext())
    program = Vocabulary(share=0.8).apply(program, reduced)
    plan = json.loads(json.dumps(program.plan[0].arguments))
    assert program.details["kept"] == len(plan["kept"]) and plan["of"] == 361
    table = {"cut_vocabulary": cut_vocabulary}
    for origin in (teacher, smaller):
        again = replay(copy_of(origin, "teacher"), reduced.example, program.plan, table)
        with torch.no_grad():
            assert torch.equal(again(*reduced.example), smaller(*reduced.example))
    with pytest.raises(InputError, match="the model has 361 in its table"):
        cut_vocabulary(copy_of(teacher, "teacher"), reduced.example, kept=[1, 2], of=99)


def test_it_comes_first_and_knows_its_directory(whole: tuple[Decoder, Task]) -> None:
    teacher, task = whole
    with pytest.raises(InputError, match='pass 2 "vocabulary" changes teacher and task, so it must be the first'):
        prepared([Prune(macs_ratio=1.2), Vocabulary()], teacher, task)
    with pytest.raises(InputError, match="give one of them"):
        Vocabulary(size=300, share=0.5)
    unknown = task.with_evaluation(task.evaluation, "")
    unknown.directory = None
    with pytest.raises(InputError, match="does not know the directory of its tokenizer"):
        prepared([Vocabulary()], teacher, unknown)


@pytest.mark.full
def test_a_compile_in_fewer_tokens(whole: tuple[Decoder, Task], tmp_path: Path) -> None:
    """Vocabulary, then a group of heads of a layer, into a directory whose tokenizer fits its file."""
    teacher, known = whole
    assert known.directory is not None
    table = {"text": SENTENCES[:7]}
    task = language_task(
        directory=known.directory.folder, train=table, evaluation=table, validation=table, batch_size=4, max_length=8
    )
    narrower, dynamic = Prune(parameters_ratio=1.15, multiple=1), Quantize(activations="dynamic")
    recipe = Recipe(passes=(Vocabulary(), narrower, Capture(), dynamic, Convert()))
    compress(teacher, task, recipe, out=tmp_path / "out", evaluation=Evaluation.quick(), allow_parity_failure=True)
    artifact = Artifact.load(tmp_path / "out")
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    words = len(tokenizer["model"]["vocab"]) + 1
    assert config["vocab_size"] == words < 361
    assert any("tokens are kept" in note for note in artifact.report.notes)
    student = artifact.rebuild(teacher)
    ids = torch.arange(6)[None]
    assert student(ids, torch.ones_like(ids)).shape == (1, 6, words)
