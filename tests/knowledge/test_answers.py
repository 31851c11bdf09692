"""Who writes the answers: what each author gives which terms, and that a killed training ends as the whole one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_decoder import sequence_task, sequences, small_decoder
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.answer_file import AnswerFile
from pqk.data.data import Batch
from pqk.data.sequences import answered, prompts_of
from pqk.errors import InputError
from pqk.knowledge import (
    JSD,
    ByAdversary,
    ByCorrection,
    ByCritic,
    ByMixture,
    ByReplay,
    ByStudent,
    ByTeacher,
    CrossEntropy,
    FrozenTeacher,
    GroupPolicy,
    KLDivergence,
    MiniLLM,
    Ranking,
    SkewKL,
    Term,
    View,
)
from pqk.knowledge.answers.authors import AnswerSettings, Desk
from pqk.knowledge.answers.catalogue import AUTHORS
from pqk.knowledge.answers.generation import Correcting, Ends, Mixing, TokenSampling, generate
from pqk.knowledge.answers.replay import ReplayAuthor
from pqk.knowledge.objective import Distillation
from pqk.models.language import Text, next_tokens
from pqk.passes import Capture, Distill, Quantize
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.training.trainer import Training, fit

TASK = sequence_task()
SHORT: dict[str, Any] = {"max_new_tokens": 5}
WAYS: dict[str, tuple[AnswerSettings, tuple[Term, ...]]] = {
    "teacher": (ByTeacher(**SHORT, temperature=1.0, samples=2), (CrossEntropy(),)),
    "student": (ByStudent(**SHORT), (CrossEntropy(weight=0.5), JSD())),
    "mixture": (ByMixture(**SHORT), (MiniLLM(), CrossEntropy(weight=0.5))),
    "correction": (ByCorrection(**SHORT, among=3), (JSD(),)),
    "critic": (ByCritic(**SHORT, samples=2), (Ranking(), CrossEntropy())),
    "adversary": (ByAdversary(**SHORT, samples=2), (GroupPolicy(), CrossEntropy())),
    "replay": (ByReplay(**SHORT, start=0.9, capacity=12), (SkewKL(),)),
}
every = pytest.mark.parametrize("name", WAYS)


def program(folder: Path | None = None, seed: int = 1) -> Program:
    teacher, student = small_decoder(7).requires_grad_(False), small_decoder(0)
    run = RunContext(seed, folder).enter("00-distill")
    return Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), run)


def distill(name: str, **fields: Any) -> Distill:
    answers, terms = WAYS[name]
    return Distill(answers=answers, terms=terms, epochs=3, learning_rate=1e-3, optimizer="adamw", **fields)


def desk(student: nn.Module, **fields: Any) -> Desk:
    values: dict[str, Any] = {"teacher": FrozenTeacher(small_decoder(7)), "task": TASK, "seed": 3, **fields}
    return Desk(student, **values)


def test_every_author_is_here() -> None:
    assert {type(answers) for answers, _ in WAYS.values()} == set(AUTHORS)


# ---- batches


def test_prompts_and_answers_are_taken_apart_and_put_together() -> None:
    batch = next(sequences(prompt=3).batches(0))
    prompts = prompts_of(batch)
    assert [len(p) for p in prompts] == [3] * 4
    lengths = batch.inputs[1].sum(1).tolist()
    rest = [row[3:n] for row, n in zip(batch.inputs[0], lengths, strict=True)]
    again = answered(prompts, rest)
    for a, b in zip((*again.inputs, again.targets), (*batch.inputs, batch.targets), strict=True):
        assert torch.equal(a, b)
    free = next(sequences(prompt=0).batches(0))
    assert [len(p) for p in prompts_of(free)] == [1] * 4
    assert [len(p) for p in prompts_of(free, 100)] == [n - 1 for n in free.inputs[1].sum(1).tolist()]


def test_batches_without_prompts_are_refused_in_words() -> None:
    batch = next(sequences().batches(0))
    masked = batch.targets.clone()
    masked[2] = -100
    with pytest.raises(InputError, match="sample 2 of a batch has no token to learn: its completion is all mask"):
        prompts_of(batch._replace(targets=masked))
    for wrong in (Batch((torch.zeros(2, 3),), torch.zeros(2), None), batch._replace(targets=torch.zeros(4))):
        with pytest.raises(InputError, match="this batch has none"):
            prompts_of(wrong)
    packed = next_tokens([Text([1, 5, 6, 7], 2)] * 4, 2, 0, packed=8)
    with pytest.raises(InputError, match="several texts stand in a row"):
        prompts_of(next(packed.batches()))


# ---- what terms see


class Watching:
    """A term's stand-in that remembers what it was shown."""

    def __init__(self, term: Term) -> None:
        self.term, self.views = term, list[View]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.term, name)

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        self.views.append(view)
        return self.term(view, projector)


def shown(answers: AnswerSettings, *terms: Term, step: int = 0) -> tuple[Batch, list[View], nn.Module]:
    """A batch of the data, and what each term sees of it."""
    student = small_decoder(0).train()
    objective = Distillation(terms, TASK, student, FrozenTeacher(small_decoder(7)), author=answers.make(desk(student)))
    watching = [Watching(t) for t in objective.terms]
    objective.terms = watching  # type: ignore[assignment]
    batch = next(sequences().batches(0))
    objective(objective.wrap(student), batch).sum().backward()
    return batch, [v for w in watching for v in w.views], student


def same(view: View, batch: Batch) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip((*view.inputs, view.targets), (*batch.inputs, batch.targets), strict=True)
    )


def test_the_student_is_judged_by_the_teacher_and_learns_labels_of_the_data() -> None:
    batch, (labels, judged), _ = shown(ByStudent(**SHORT, fraction=1.0), CrossEntropy(), JSD())
    assert same(labels, batch) and labels.teacher_share is None
    assert judged.teacher_share == 0.0 and not torch.equal(judged.inputs[0], batch.inputs[0])
    prompts = prompts_of(batch)
    again = prompts_of(Batch(judged.inputs, judged.targets, None))
    assert all(torch.equal(a, b) for a, b in zip(prompts, again, strict=True))
    assert judged.teacher.shape == judged.student.shape and int((judged.targets != -100).sum(1).max()) <= 5


def test_the_teachers_answers_are_the_data() -> None:
    batch, views, _ = shown(ByTeacher(**SHORT), CrossEntropy(), KLDivergence())
    assert all(torch.equal(v.inputs[0], views[0].inputs[0]) and v.teacher_share is None for v in views)
    teacher = small_decoder(7)
    with torch.no_grad():
        choices = teacher(*views[0].inputs).argmax(-1)
    learned = views[0].targets != -100
    assert torch.equal(choices[learned], views[0].targets[learned])  # greedy
    assert not same(views[0], batch)


def test_a_mixture_says_whose_part_it_is() -> None:
    _, (view,), _ = shown(ByMixture(**SHORT, teacher_share=0.3), MiniLLM())
    assert view.teacher_share == 0.3


def test_a_correction_replaces_what_the_teacher_finds_unlikely() -> None:
    """By hand, the first token's distribution: the student's where the teacher takes it, else the teacher's."""
    student, teacher = small_decoder(0).eval(), small_decoder(7).eval()
    prompt, draws, among = torch.tensor([3, 5, 4]), 4000, 4
    seen = prompt[None], torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad():
        own, other = (m(*seen)[0, -1].softmax(-1) for m in (student, teacher))
    right = torch.zeros_like(own, dtype=torch.bool)
    right[other.topk(among).indices] = True
    wanted = own.where(right, 0) + own[~right].sum() * other
    sampling, ends = TokenSampling(max_new_tokens=1), Ends()
    found = generate(student, [prompt] * draws, sampling, range(draws), ends, teacher, Correcting(among))
    shares = torch.cat(found).bincount(minlength=len(own)) / draws
    assert float((shares - wanted).abs().max()) < 5 * (0.25 / draws) ** 0.5
    assert float((shares - own).abs().sum()) > 0.2  # and it was something to correct


def test_a_teacher_that_takes_every_token_corrects_none() -> None:
    batch, (corrected,), _ = shown(ByCorrection(**SHORT, fraction=0.5, among=10**6), JSD())
    _, (own,), _ = shown(ByStudent(**SHORT), JSD())
    assert torch.equal(corrected.inputs[0], own.inputs[0]) and not same(corrected, batch)
    assert corrected.teacher_share is None  # no probability that they were drawn with is the student's own


def test_a_share_of_the_steps_is_answered_and_the_others_are_as_without() -> None:
    author = ByStudent(**SHORT, fraction=0.25).make(desk(small_decoder(0)))
    batch = next(sequences().batches(0))
    written = [author(batch, 0.0) is not None for _ in range(80)]
    assert 8 <= sum(written) <= 32 and int(author.step) == 80
    again = ByStudent(**SHORT, fraction=0.25).make(desk(small_decoder(0)))
    assert [again(batch, 0.0) is not None for _ in range(80)] == written


def test_the_memory_is_filled_then_shown_and_its_share_grows_with_the_loss() -> None:
    student = small_decoder(0)
    how = ByReplay(**SHORT, start=1.0, capacity=8, increase=0.1, schedule="constant")
    author = how.make(desk(student))
    assert isinstance(author, ReplayAuthor)
    batch = next(sequences().batches(0))
    written = [author(batch, 0.5) for _ in range(12)]
    assert all(w is not None for w in written) and [w.teacher_share for w in written if w][:2] == [0.0, 0.0]
    replayed = [w.batch for w in written if w is not None and w.teacher_share is None]
    assert replayed
    known = {tuple(author.texts[i, : author.places[i, 1]].tolist()) for i in range(8)}
    late = [tuple(r[:n].tolist()) for b in replayed[-1:] for r, n in zip(b.inputs[0], b.inputs[1].sum(1), strict=True)]
    assert set(late) <= known
    calm = replace(how, start=0.0).make(desk(student))
    assert isinstance(calm, ReplayAuthor) and calm(batch, 0.5) is None
    assert float(calm.reference) == pytest.approx(calm.loss())
    calm.end_epoch(0)
    assert float(calm.threshold) == 0.0
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(2)  # a worse student
    calm.end_epoch(1)
    assert float(calm.threshold) == pytest.approx(0.1) and float(calm.reference) == pytest.approx(calm.loss())


# ---- training


def trained(name: str, folder: Path | None, kill: float = 2.0) -> dict[str, Tensor]:
    start = program(folder)
    student, data = start.student, TASK.train
    answers, terms = WAYS[name]
    teacher = FrozenTeacher(start.teacher)
    author = answers.make(Desk(student, teacher, TASK, 3, folder))

    def progress(done: float) -> None:
        if done > kill:
            raise Killed

    objective = Distillation(terms, TASK, student, teacher, author=author, on_progress=progress)
    training = Training(epochs=3, learning_rate=1e-3, optimizer="adamw", checkpoint_seconds=1e-9)
    assert data is not None
    fit(start.run, student, data, objective, training)
    return {**student.state_dict(), **{f"author.{k}": v for k, v in author.state_dict().items()}}


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@every
def test_a_resumed_training_is_the_whole_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and author, bit for bit: what was kept to be shown again among it."""
    monkeypatch.setattr(os, "fsync", lambda f: None)
    whole = trained(name, None)
    with pytest.raises(Killed):
        trained(name, tmp_path, 0.45)
    resumed = trained(name, tmp_path)
    assert whole.keys() == resumed.keys() and all(torch.equal(v, resumed[k]) for k, v in whole.items())
    before = program().student.state_dict()
    assert any(not torch.equal(v, whole[k]) for k, v in before.items())


@every
def test_the_pass_trains_and_says_so(name: str, tmp_path: Path) -> None:
    after = distill(name).apply(program(tmp_path), TASK)
    said = after.details
    assert all(torch.isfinite(torch.tensor(said["losses"]))) and len(said["losses"]) == 3
    if WAYS[name][1][0].needs_teacher:
        assert "written during the training" in said["teacher"]


def test_answers_that_are_never_written_change_nothing() -> None:
    """Bit for bit as plain training, by a share of the steps that is next to nothing."""
    found = []
    for answers in (None, ByStudent(**SHORT, fraction=1e-12)):
        start = program()
        Distill(answers=answers, terms=(CrossEntropy(), JSD()), epochs=2, learning_rate=1e-2).apply(start, TASK)
        found.append(start.student.state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_a_student_under_fake_quantization_answers_too() -> None:
    start = program()
    start = replace(Capture().apply(start, TASK), stage=Stage.GRAPH)
    start = replace(Quantize(activations="dynamic").apply(start, TASK), stage=Stage.FAKE_QUANT)
    after = distill("student").apply(start, TASK)
    assert len(after.details["losses"]) == 3


def test_a_teacher_is_asked_once_for_each_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of two draws of 16 prompts; another run reads the same answers, and asks nothing."""
    monkeypatch.setenv("PQK_CACHE", str(tmp_path / "cache"))
    found = []
    for run in "ab":
        start = program(tmp_path / run)
        distill("teacher").apply(start, TASK)
        (path,) = (tmp_path / "cache").glob("answers-*.jsonl")
        found.append((path.read_text(), start.student.state_dict()))
    lines = [json.loads(line) for line in found[0][0].splitlines()][1:]
    assert len(lines) == 32 and {line["draw"] for line in lines} == {0, 1}
    assert len({line["question"] for line in lines}) == 16
    assert found[0][0] == found[1][0] and all(torch.equal(v, found[1][1][k]) for k, v in found[0][1].items())


# ---- refusals


def test_what_cannot_be_learned_from_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="minillm learns from answers that the student writes"):
        Distill(terms=(MiniLLM(),))
    with pytest.raises(InputError, match="draws at another temperature"):
        Distill(terms=(MiniLLM(),), answers=ByStudent(temperature=0.7))
    with pytest.raises(InputError, match="the teacher writes the answers"):
        Distill(terms=(MiniLLM(),), answers=ByTeacher())
    with pytest.raises(InputError, match="no term asks it"):
        Distill(terms=(CrossEntropy(),), answers=ByStudent())
    with pytest.raises(InputError, match="all alike"):
        ByTeacher(samples=3)
    for stop in (-1, 64):
        with pytest.raises(InputError, match=f"stop = {stop}, and the model has 64 tokens, from 0"):
            ByStudent(stop=(2, stop)).make(desk(small_decoder(1)))
    with pytest.raises(InputError, match='unknown by "pupil".*"student"|unknown by "pupil"'):
        Recipe.loads('[[pass]]\nname = "distill"\nanswers = { by = "pupil" }\n')
    images = sequence_task()
    images.generates = False
    reason = distill("student").why_not_applied(images, torch.zeros(2, 5, 64))
    assert reason is not None and "causal models" in reason
    assert distill("student").why_not_applied(TASK, torch.zeros(2, 5, 64)) is None


def test_a_recipe_says_who_answers() -> None:
    text = (
        '[[pass]]\nname = "distill"\nterms = [{ term = "jsd", beta = 0.9 }]\nanswers = { by = "student", top_k = 40 }\n'
    )
    recipe = Recipe.loads(text)
    assert recipe.passes[0] == Distill(terms=(JSD(beta=0.9),), answers=ByStudent(top_k=40))
    assert Recipe.loads(recipe.dumps()) == recipe


# ---- the file


def test_a_file_of_answers_forgets_only_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    first = AnswerFile(path, "me")
    first.add([("a", 0, [1, 2]), ("b", 0, "text"), ("a", 1, [3])])
    assert AnswerFile(path, "me").of("a") == [[1, 2], [3]]
    content = path.read_text()
    path.write_text(content.replace("text", "lies")[:-9])  # one changed, the last half written
    second = AnswerFile(path, "me")
    assert second.get("a") == [1, 2] and second.get("b") is None and second.get("a", 1) is None
    second.add([("b", 0, "new")])
    assert AnswerFile(path, "me").get("b") == "new"
    with pytest.raises(InputError, match="holds the answers of 'me'"):
        AnswerFile(path, "you")


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_a_file_of_answers_that_was_hardly_begun_is_begun_again(tmp_path: Path, part: float) -> None:
    """A process that is killed between making the file and writing its first line leaves none, or a part of it."""
    path, whole = tmp_path / "answers.jsonl", json.dumps({"answers": "me"}) + "\n"
    path.write_text(whole[: int(part * len(whole))])
    AnswerFile(path, "me").add([("a", 0, "text")])
    assert AnswerFile(path, "me").get("a") == "text"
    with pytest.raises(InputError, match="holds the answers of 'me'"):
        AnswerFile(path, "you")


def test_a_file_that_two_begin_has_the_answers_of_both(tmp_path: Path) -> None:
    first, second = (AnswerFile(tmp_path / "answers.jsonl", "me") for _ in range(2))
    first.add([("a", 0, "one")])
    second.add([("b", 0, "other")])
    first.add([("c", 0, "third")])
    assert {q: AnswerFile(tmp_path / "answers.jsonl", "me").get(q) for q in "abc"} == {
        "a": "one", "b": "other", "c": "third"
    }  # fmt: skip


@pytest.mark.parametrize("together", [Mixing(0.5), Correcting(3)], ids=["mixing", "correcting"])
def test_models_of_other_tokens_do_not_write_together(together: Mixing | Correcting) -> None:
    def of_80(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 80)

    with pytest.raises(InputError, match="know 64 and 80 tokens, and must know the same"):
        generate(small_decoder(), [torch.tensor([1, 5])], TokenSampling(), [0], Ends(), of_80, together)


def test_answers_to_texts_of_several_lengths_are_not_kept(tmp_path: Path) -> None:
    """What is kept has one size; word by word the teacher is asked live, and the training ends."""
    after = Distill(terms=(KLDivergence(),), epochs=2, learning_rate=1e-3).apply(program(tmp_path), TASK)
    assert "as long as the texts of their batch" in after.details["teacher"] and len(after.details["losses"]) == 2
