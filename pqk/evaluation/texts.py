"""Texts that teacher and student write for evaluation prompts or sources, step by step: where they part, how fast."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqk.bench.statistics import bootstrap_ratio
from pqk.core.onnxruntime_session import Continuing, EncoderDecoderSession, of_every_token, session
from pqk.core.steps import Steps
from pqk.core.task_texts import TaskText, texts_of
from pqk.generation.greedy import Limits, likeliest
from pqk.report.texts import ContinuedTexts
from pqk.task.directory import GeneratingFiles
from pqk.task.task import Task

PROMPT, TOKENS = 16, 48
"""tokens of a prompt, where data does not say what is one, and tokens behind each, at most"""
PAUSE = 0.05
"""seconds before each text, in which the other file's threads stop spinning"""
GRAM = 4
"""tokens in a row that are looked for again"""


@dataclass(frozen=True)
class Continued:
    """A text that was continued, and what it took."""

    tokens: list[int]
    scores: NDArray[np.float32]
    """[T, V]"""
    first_ms: float
    token_ms: float
    """of each after the first; 0 of a text of one token"""


def continued_texts(
    teacher: Path, student: Path, task: Task, texts: int, *, threads: int, timed: bool, optimized: bool = True
) -> ContinuedTexts | None:
    """Continues evaluation prompts, or writes the targets of sources, by both files, in turn, and compares.

    Args:
        teacher: the file in float32.
        student: what is deployed.
        task: one that generates; its evaluation data.
        texts: prompts at most.
        threads: of ONNX Runtime.
        timed: whether this machine's times are the target's.
        optimized: whether ONNX Runtime optimizes.

    Returns:
        The part of the report; None where a file keeps nothing of tokens before, or there is no prompt.
    """
    limits = Limits.of(files.folder) if isinstance(files := task.extra_files, GeneratingFiles) else Limits()
    prompts = [prompt for prompt in _prompts(task, texts, limits) if len(prompt.tokens) < limits.longest]
    opened = [session(path, threads=threads, optimized=optimized) for path in (teacher, student)]
    both = [Steps(run) for run in opened if isinstance(run, Continuing | EncoderDecoderSession)]
    if not prompts or len(both) < 2:
        return None
    reading = Steps(of_every_token(opened[1]))
    for steps in both:  # warms up
        _continue(steps, prompts[0], limits)
    pairs = [[_continue(steps, prompt, limits) for steps in both] for prompt in prompts]
    alike = [_alike(*(text.tokens for text in pair)) for pair in pairs]
    whole = [_at_once(reading, prompt, pair[1], limits) for prompt, pair in zip(prompts, pairs, strict=True)]
    repeated = [_repeated([pair[i].tokens for pair in pairs]) for i in (0, 1)]
    return ContinuedTexts(
        texts=len(prompts),
        sources=task.seq2seq,
        prompt_tokens=max(len(prompt.tokens) for prompt in prompts),
        tokens=TOKENS,
        alike=tuple(alike),
        equal=float(np.mean([pair[0].tokens == pair[1].tokens for pair in pairs])),
        as_whole=float(np.mean(np.concatenate([same for same, _ in whole]))),
        whole_difference=max(difference for _, difference in whole),
        teacher_repeated=repeated[0],
        student_repeated=repeated[1],
        teacher_kept_bytes=both[0].kept_bytes,
        student_kept_bytes=both[1].kept_bytes,
        **(_paces(pairs) if timed else {}),
    )


def _prompts(task: Task, texts: int, limits: Limits) -> Iterator[TaskText]:
    """What stands before the first learned token, or the first tokens of a text of which all are learned.

    At least one token is left to continue. A target's first token begins all targets, and is enough.
    """
    for text in itertools.islice(texts_of(task), texts):
        places = text.learned.nonzero().flatten().tolist()
        start = places[0] + 1 if places and places[0] else min(PROMPT, len(text.tokens) - 1)
        if task.seq2seq:
            forced = [] if limits.forced is None else [limits.forced]
            yield replace(text, tokens=[*text.tokens[:1], *forced])
        elif start > 0:
            yield replace(text, tokens=text.tokens[:start])


def _continue(steps: Steps, prompt: TaskText, limits: Limits) -> Continued:
    time.sleep(PAUSE)
    marks: list[float] = [time.perf_counter()]

    def timed(*arguments: Any) -> Any:
        found = steps(*arguments)
        marks.append(time.perf_counter())
        return found

    tokens, scores = likeliest(timed, steps.begin(prompt.source), prompt.tokens, TOKENS, limits)
    each = (marks[-1] - marks[1]) / (len(marks) - 2) if len(marks) > 2 else 0.0
    return Continued(tokens, scores, 1e3 * (marks[1] - marks[0]), 1e3 * each)


def _alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two texts have in common before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _at_once(steps: Steps, prompt: TaskText, text: Continued, limits: Limits) -> tuple[NDArray[np.bool_], float]:
    """Which tokens are chosen, too, where prompt and text are read at once, and how far scores are then, at most."""
    read = [*prompt.tokens, *text.tokens[:-1]]
    scores = steps(read, steps.begin(prompt.source), len(read))[0][len(prompt.tokens) - 1 :]
    difference = np.abs(scores - text.scores).max() / np.abs(text.scores).max()
    chosen = np.array([limits.allowed(row).argmax() for row in scores])
    return chosen == np.array(text.tokens), float(difference)


def _repeated(texts: Sequence[Sequence[int]]) -> float:
    """Share of the runs of four tokens that had stood in the same text before."""
    runs = [[tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)] for text in texts]
    count = sum(map(len, runs))
    return (count - sum(len(set(of_text)) for of_text in runs)) / count if count else 0.0


def _paces(pairs: Sequence[Sequence[Continued]]) -> dict[str, float]:
    """Tokens a second, times to the first, and the ratio of the former; nothing where no text has two tokens."""
    first = [float(np.median([pair[i].first_ms for pair in pairs])) for i in (0, 1)]
    found = {"teacher_first_ms": first[0], "student_first_ms": first[1]}
    times = np.array([[text.token_ms for text in pair] for pair in pairs if all(text.token_ms for text in pair)])
    if not len(times):
        return found
    ratio = bootstrap_ratio(times[:, 0] / times[:, 1])
    teacher, student = (float(1e3 / np.median(times[:, i])) for i in (0, 1))
    paces = {"teacher_per_second": teacher, "student_per_second": student}
    return {**found, **paces, "ratio": ratio.ratio, "ratio_low": ratio.low, "ratio_high": ratio.high}
