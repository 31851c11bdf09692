"""What small students of a reasoning teacher learn from: data with and without steps, and a teacher behind a text.

    python -m pqk.models.arithmetic --out out/arithmetic --steps 1000
    python tests/tools/reasoning.py ways --teacher out/arithmetic --out models/results/reasoning.json
    python tests/tools/reasoning.py black_box --teacher out/arithmetic --out models/results/black_box.json

`ways`: students with random weights take as many steps of as many rows on answers alone, on rationales in several
forms, on what the teacher writes, and on what they write themselves. `black_box`: of the teacher nothing but texts is
known, beside a student that sees its probabilities and one that has a few worked problems only. Counted are the right
answers to problems that none was trained on, of texts that each student continues by its most probable tokens.
Learning rates are chosen on validation problems, before any held-out problem is asked. Finished runs are kept in
`--runs`, so that a stopped sweep goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from pqk.core.modes import evaluating
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.data.questions import Asking
from pqk.files import write_json
from pqk.knowledge import JSD, CrossEntropy, KLDivergence, Term
from pqk.knowledge.answers.authors import ByStudent
from pqk.knowledge.answers.generation import Ends, TokenSampling, generate
from pqk.models.answer_match import log_likelihood
from pqk.models.arithmetic import ANSWERED, HARDEST, WORKED, Problem, answer_in, letters, problems, reasoner, table
from pqk.models.black_box import black_box_task
from pqk.models.decoder import Decoder, decoder
from pqk.models.language import NextTokens, language_task
from pqk.models.rationales import Columns, adaptive, mixed, step_by_step
from pqk.passes import Distill
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.kept_tokens import kept
from pqk.task.metrics import predict
from pqk.task.task import Task

STUDENTS = {"2 layers, 32 wide": (2, 32), "2 layers, 64 wide": (2, 64)}
LEVELS, SINGLES = range(1, HARDEST + 1), 270
"""difficulties, and how many problems there are with one operation: too few to hold some out, as each is a step of many
others"""
LONGEST = 64
"""tokens of a text at most: the longest problem with its steps has 47"""
BATCH, AT_ONCE = 16, 200
"""rows of a step, and texts that are continued at once"""
TRIAL = -1
"""the seed of the students on which learning rates are tried"""
LONG_SHARE = 0.2
"""share of the questions with long steps, the others having short ones: Mix Distillation's"""
POLICY_SHARE, POLICY_RATE = 0.25, 0.3
"""share of the steps that learn from the student's own answers, after the others, and their rate beside the others'"""


@dataclass(frozen=True)
class World:
    """The teacher, and problems of all difficulties, of which no two parts share one of several operations."""

    directory: Path
    teacher: Decoder
    evaluation: list[Problem]
    validation: list[Problem]
    train: list[Problem]


def world_of(options: argparse.Namespace) -> World:
    singles = problems(SINGLES, (1,), seed=options.draw)
    counts = (options.held_out, options.validation, options.problems)
    several = problems(sum(counts), range(2, HARDEST + 1), seed=options.draw)
    assert len(set(singles)) == SINGLES and len(set(several)) == len(several)
    draws, parts = random.Random(options.draw), []
    for count in counts:
        share = count // HARDEST
        one = draws.sample(singles, share) if share <= SINGLES else draws.choices(singles, k=share)
        parts.append([*one, *several[: count - share]])
        several = several[count - share :]
        draws.shuffle(parts[-1])
    return World(options.teacher, decoder(options.teacher), *parts)


# ---- asking a model


def texts_of(model: Any, prompts: Sequence[str], temperature: float = 0.0, seed: int = 0) -> list[str]:
    """How a model goes on."""
    tokenizer, found = letters(), []
    ids = [torch.tensor(tokenizer(p)["input_ids"]) for p in prompts]
    sampling, ends = TokenSampling(max_new_tokens=LONGEST, temperature=temperature), Ends((2,), LONGEST)
    for i in range(0, len(ids), AT_ONCE):
        seeds = [seed * len(ids) + j for j in range(i, min(i + AT_ONCE, len(ids)))]
        found += generate(model, ids[i : i + AT_ONCE], sampling, seeds, ends)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found]


def matches(model: Any, of: Sequence[Problem], mark: str) -> dict[str, Any]:
    """The share of right answers, of each difficulty and of all, and how long the texts are."""
    texts = texts_of(model, [mark + p.question for p in of])
    right = [answer_in(text) == p.answer for text, p in zip(texts, of, strict=True)]
    by = [[r for r, p in zip(right, of, strict=True) if p.difficulty == d] for d in LEVELS]
    return {
        "match": round(statistics.mean(right), 4),
        "by_difficulty": [round(statistics.mean(each), 4) for each in by],
        "letters": round(statistics.mean(map(len, texts)), 1),
    }


# ---- what is learned from


def columns_of(world: World, way: str, student: Any = None) -> Columns:
    """The data of a way. `student`, which learned answers alone, says for "adaptive" which problems are difficult."""
    of = world.train
    asked, answers = [WORKED + p.question for p in of], [f":{p.answer}" for p in of]
    worked = [f"{p.steps}:{p.answer}" for p in of]
    if way == "answers":
        return table(of, worked=False)
    if way == "step by step":
        plain = [p.question for p in of]
        return step_by_step(plain, [p.steps for p in of], answers, marks=(ANSWERED, WORKED))
    if way == "mixed":
        return mixed(asked, worked, [f"{p.short_steps}:{p.answer}" for p in of], LONG_SHARE)
    if way == "adaptive":
        return adaptive(asked, [p.steps for p in of], answers, losses(world, student), least=math.log(2))
    if way == "teacher's texts":
        return {"prompt": asked, "completion": texts_of(world.teacher, asked)}
    return table(of, worked=True)


def losses(world: World, student: Any) -> list[float]:
    """How unlikely a student finds the right answer to each training problem at once, in nats."""
    of = table(world.train, worked=False)
    task = language_task(
        directory=world.directory, train=None, validation=of, evaluation=of, text=None, batch_size=AT_ONCE,
        max_length=LONGEST,
    )  # fmt: skip
    with evaluating(student):
        outputs, _ = predict(student, task.validation, kept=kept)
    assert isinstance(outputs, dict)
    found: list[float] = outputs["loss"].sum(1).tolist()
    return found


WAYS = ("answers", "step by step", "worked", "mixed", "adaptive", "teacher's texts", "on policy")
MARKS = {"answers": ANSWERED, "step by step": ANSWERED}
"""how students of these ways are asked; those of the others with `WORKED`"""


# ---- learning


def task_of(world: World, columns: Columns, mark: str) -> Task:
    check = table(world.validation, worked=mark == WORKED)
    return language_task(
        directory=world.directory, train=columns, validation=check, evaluation=check, text=None, batch_size=BATCH,
        max_length=LONGEST,
    )  # fmt: skip


@dataclass(frozen=True)
class Course:
    """How a student learns."""

    steps: int
    rate: float
    seed: int
    terms: tuple[Term, ...] = (CrossEntropy(),)
    answers: ByStudent | None = None


def learned(world: World, student: Any, task: Task, course: Course) -> Any:
    """A copy of the student that was trained."""
    assert task.train is not None
    program = Program.begin(world.teacher, Target.detect(), RunContext(course.seed), given=student)
    distill = Distill(
        epochs=course.steps / len(task.train), optimizer="adamw", learning_rate=course.rate, weight_decay=0.01,
        warmup=0.1, clip=1.0, terms=course.terms, answers=course.answers,
    )  # fmt: skip
    return distill.apply(program, task).student.eval()


def new(size: str, seed: int) -> Decoder:
    return Decoder(reasoner(*STUDENTS[size], seed=1000 + seed))


def trained(world: World, size: str, way: str, course: Course, columns: Columns) -> Any:
    """A student of one of the ways."""
    task = task_of(world, columns, MARKS.get(way, WORKED))
    if way != "on policy":
        return learned(world, new(size, course.seed), task, course)
    first = round(course.steps * (1 - POLICY_SHARE))
    begun = learned(world, new(size, course.seed), task, Course(first, course.rate, course.seed))
    own = Course(
        course.steps - first, course.rate * POLICY_RATE, course.seed, (JSD(),),
        ByStudent(fraction=0.5, max_new_tokens=LONGEST),
    )  # fmt: skip
    return learned(world, begun, task, own)


def likelihood(world: World, student: Any, mark: str) -> float:
    """Of the validation problems' completions, in nats a token."""
    task = task_of(world, table(world.validation, worked=mark == WORKED), mark)
    with evaluating(student):
        return log_likelihood(*predict(student, task.validation, kept=kept))


class Runs:
    """What was measured, by what it was measured of; kept in a file as soon as it is there.

    Rows that were measured of another teacher or other problems are as if they were not there.
    """

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        self.path, self.conditions, self.rows = path, conditions, dict[str, dict[str, Any]]()
        if path is not None and path.exists():
            rows = map(json.loads, path.read_text().splitlines())
            self.rows = {row["key"]: row for row in rows if row["conditions"] == conditions}

    def of(self, key: Sequence[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = json.dumps(list(key))
        if name not in self.rows:
            began = time.process_time()
            made = {**make(), "core_seconds": round(time.process_time() - began, 1)}
            self.rows[name] = {"key": name, **made, "conditions": self.conditions}
            line = json.dumps(self.rows[name])
            sys.stderr.write(line + "\n")
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(line + "\n")
        return {k: v for k, v in self.rows[name].items() if k not in ("key", "conditions")}


def best_rate(runs: Runs, key: Sequence[Any], rates: Sequence[float], nats: Callable[[float], float]) -> float:
    """The rate whose student finds the validation problems' completions most likely."""
    found = {rate: runs.of([*key, rate], lambda rate=rate: {"likelihood": nats(rate)}) for rate in rates}
    return max(rates, key=lambda rate: float(found[rate]["likelihood"]))


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": round(mean, 4)}
    spread = statistics.stdev(values) / math.sqrt(len(values)) * float(stats.t.ppf(0.975, len(values) - 1))
    return {"mean": round(mean, 4), "low": round(mean - spread, 4), "high": round(mean + spread, 4)}


def beside(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """By how much values are higher, seed by seed."""
    return interval([a - b for a, b in zip(values, others, strict=True)])


# ---- ways of learning to reason


class Ways:
    """Students of two sizes, each taught in all ways."""

    def __init__(self, world: World, options: argparse.Namespace, runs: Runs) -> None:
        self.world, self.options, self.runs = world, options, runs
        self.columns: dict[str, Columns] = {}
        self.rates: dict[str, float] = {}
        self.answering: dict[tuple[str, int], Any] = {}
        """students that learned answers alone, by size and seed"""

    def rate(self, size: str, way: str) -> float:
        """The learning rate of the ways whose students are asked like this one's."""
        kind = "answers" if way in MARKS else "worked"
        steps, name = self.options.trial_steps, f"{size}; {kind}"

        def nats(rate: float) -> float:
            student = trained(self.world, size, kind, Course(steps, rate, TRIAL), self.data(kind))
            return likelihood(self.world, student, MARKS.get(kind, WORKED))

        if name not in self.rates:
            self.rates[name] = best_rate(self.runs, ["rate", size, kind, steps], self.options.rates, nats)
        return self.rates[name]

    def data(self, way: str, size: str = "", seed: int = 0) -> Columns:
        if way == "adaptive":
            return columns_of(self.world, way, self.student(size, "answers", seed))
        if way not in self.columns:
            self.columns[way] = columns_of(self.world, way)
        return self.columns[way]

    def student(self, size: str, way: str, seed: int) -> Any:
        if way == "answers" and (size, seed) in self.answering:
            return self.answering[size, seed]
        course = Course(self.options.steps, self.rate(size, way), seed)
        student = trained(self.world, size, way, course, self.data(way, size, seed))
        if way == "answers":
            self.answering[size, seed] = student
        return student

    def row(self, size: str, way: str, seed: int) -> dict[str, Any]:
        def made() -> dict[str, Any]:
            student, texts = self.student(size, way, seed), self.data(way, size, seed)["completion"]
            steps = statistics.mean(";" in text for text in texts)
            return matches(student, self.world.evaluation, MARKS.get(way, WORKED)) | {"with_steps": round(steps, 3)}

        self.rate(size, way)  # chosen before, so that a run's time is its own
        return self.runs.of(["ways", size, way, seed, self.options.steps], made)

    def measured(self) -> dict[str, Any]:
        rows, behind = [], []
        for size in self.options.students:
            by: dict[str, list[dict[str, Any]]] = {
                way: [self.row(size, way, seed) for seed in self.options.seeds] for way in self.options.ways
            }
            rows += [{"student": size, "way": way, **summary(found)} for way, found in by.items()]
            for way, (i, level) in itertools.product(by, enumerate(LEVELS)):
                if way == "answers" or "answers" not in by:
                    continue
                points = [[row["by_difficulty"][i] for row in by[name]] for name in (way, "answers")]
                behind.append({"student": size, "way": way, "difficulty": level, **beside(*points)})
        teacher = self.runs.of(["teacher"], lambda: matches(self.world.teacher, self.world.evaluation, WORKED))
        return {"teacher": teacher, "rows": rows, "beside_answers_alone": behind, "rates": self.rates}


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs with several seeds as intervals."""
    means = {
        name: round(statistics.mean(row[name] for row in found), 3)
        for name in ("letters", "with_steps", "core_seconds")
        if name in found[0]
    }
    return {
        "match": interval([row["match"] for row in found]),
        "by_difficulty": [interval([row["by_difficulty"][i] for row in found]) for i in range(len(LEVELS))],
        **means,
        "runs": [row["by_difficulty"] for row in found],
    }


# ---- a teacher behind a text


def share_of_gain(data: Sequence[float], black: Sequence[float], white: Sequence[float]) -> dict[str, Any]:
    """How much of what the white box gains over data alone the black box gains, seed by seed."""
    gains = [w - d for d, w in zip(data, white, strict=True)]
    if min(gains) <= 0:
        return {"none": "a student that sees probabilities is no better than one of data alone"}
    return interval([(b - d) / gain for d, b, gain in zip(data, black, gains, strict=True)])


class Service:
    """A teacher of which nothing but texts is seen, drawn with its own probabilities: each call another one."""

    def __init__(self, teacher: Any, prompts: Sequence[str], draws: int) -> None:
        self.draws: list[dict[str, str]] = []  # many at once, as a service does
        self.teacher, self.prompts, self.count = teacher, prompts, draws
        self.calls: Counter[str] = Counter()

    def __call__(self, prompt: str) -> str:
        draw = self.calls[prompt]
        self.calls[prompt] += 1
        if draw == len(self.draws):
            texts = texts_of(self.teacher, self.prompts, temperature=1.0, seed=draw)
            self.draws.append(dict(zip(self.prompts, texts, strict=True)))
        return self.draws[draw][prompt]


FROM = ("data alone", "black box", "white box")


class BlackBox:
    """A student of a few worked problems, of a teacher's texts, and of its probabilities on the same texts."""

    def __init__(self, world: World, options: argparse.Namespace, runs: Runs) -> None:
        self.world, self.options, self.runs, self.size = world, options, runs, options.students[-1]
        self.prompts = [WORKED + p.question for p in world.train]
        self.kept: Task | None = None
        self.queries = 0

    def texts(self) -> Task:
        """Of the service's answers, each of which is asked for once."""
        if self.kept is None:
            check = table(self.world.validation, worked=True)
            service = Service(self.world.teacher, self.prompts, self.options.samples)
            options = self.options
            self.kept = black_box_task(
                service, train={"prompt": self.prompts}, cache=options.cache,
                identity=None if options.cache is None else f"arithmetic {options.draw} {options.teacher}",
                asking=Asking(samples=options.samples, timeout_seconds=600.0), directory=self.world.directory,
                validation=check, evaluation=check, batch_size=BATCH, max_length=LONGEST,
            )  # fmt: skip
            self.queries = sum(service.calls.values())
        return self.kept

    def student(self, source: str, course: Course) -> Any:
        if source == "data alone":
            few = table(self.world.train[: self.options.labelled], worked=True)
            return learned(self.world, new(self.size, course.seed), task_of(self.world, few, WORKED), course)
        if source == "white box":
            course = replace(course, terms=(KLDivergence(temperature=1.0),))
        return learned(self.world, new(self.size, course.seed), self.texts(), course)

    def row(self, source: str, seed: int) -> dict[str, Any]:
        steps, trial = self.options.steps, self.options.trial_steps

        def nats(rate: float) -> float:
            return likelihood(self.world, self.student(source, Course(trial, rate, TRIAL)), WORKED)

        rate = best_rate(self.runs, ["rate", self.size, source, trial], self.options.rates, nats)

        def made() -> dict[str, Any]:
            student = self.student(source, Course(steps, rate, seed))
            return matches(student, self.world.evaluation, WORKED) | {"rate": rate}

        return self.runs.of(["black box", self.size, source, seed, steps], made)

    def measured(self) -> dict[str, Any]:
        cost = self.runs.of(["queries", self.options.samples], self.asked)
        by = {source: [self.row(source, seed) for seed in self.options.seeds] for source in FROM}
        data, black, white = ([row["match"] for row in by[source]] for source in FROM)
        return {
            "student": self.size,
            "rows": [{"from": s, **summary(found), "rate": found[0]["rate"]} for s, found in by.items()],
            "gain": {"black box": beside(black, data), "white box": beside(white, data)},
            "share_of_gain": share_of_gain(data, black, white),
            "asked": cost,
        }

    def asked(self) -> dict[str, Any]:
        """What the service was asked, and how many of its answers are right."""
        data = self.texts().train
        assert isinstance(data, NextTokens)
        tokenizer, answers = letters(), {p.question: p.answer for p in self.world.train}
        texts = [tokenizer.decode(row, skip_special_tokens=True).removeprefix(WORKED) for row in data.tokens]
        right = [answer_in(text) == answers[text[: text.index("=") + 1]] for text in texts]
        return {"queries": self.queries, "prompts": len(self.prompts), "right": round(statistics.mean(right), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("ways", "black_box"))
    parser.add_argument("--teacher", type=Path, required=True, help="what pqk.models.arithmetic wrote")
    parser.add_argument("--students", nargs="+", choices=[*STUDENTS], default=[*STUDENTS])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of `ways`, those that are tried")
    parser.add_argument("--problems", type=int, default=8000, help="that are learned from, or asked a black box")
    parser.add_argument("--labelled", type=int, default=100, help="problems that the student without a teacher has")
    parser.add_argument("--validation", type=int, default=250, help="problems on which rates are chosen")
    parser.add_argument("--held-out", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--trial-steps", type=int, default=1000, help="of each student on which a rate is tried")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 6e-3])
    parser.add_argument("--samples", type=int, default=2, help="answers to a prompt that a black box is asked for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draw", type=int, default=11, help="the seed of all problems")
    parser.add_argument("--cache", type=Path, default=None, help="the folder of a black box's answers")
    parser.add_argument("--runs", type=Path, default=None, help="a file in which finished runs are kept")
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    left_out = ("what", "out", "runs", "cache", "teacher")
    said = {k: v for k, v in vars(options).items() if k not in left_out} | {
        "batch": BATCH, "threads": 1, "teacher": json.loads((options.teacher / "training.json").read_text()),
    }  # fmt: skip
    same = ("problems", "labelled", "validation", "held_out", "samples", "draw", "batch", "teacher")
    world, runs = world_of(options), Runs(options.runs, {name: said[name] for name in same})
    result = (Ways if options.what == "ways" else BlackBox)(world, options, runs).measured()
    result["conditions"] = said
    result["machine"] = machine_fingerprint()
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
