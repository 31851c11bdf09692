"""A teacher that is text in, text out, as a task: its answers to prompts become the data that a student learns.

from pqk import compress
from pqk.models.black_box import black_box_task
from pqk.models.decoder import decoder

task = black_box_task(service, train="prompts.jsonl", directory="small_model", cache="asked", identity="service 3",
                      evaluation="test.jsonl", validation="held_out.jsonl")
compress(decoder("small_model"), task, recipe, out="student")
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pqk.data.answer_file import AnswerFile
from pqk.data.questions import Asking, answers_of_table, ask, estimate
from pqk.errors import InputError
from pqk.models.language import language_task
from pqk.models.text_data import TextSource, column, read_table
from pqk.task.task import Task


def black_box_task(
    teacher: Callable[[str], Any] | TextSource,
    data: str | Path | None = None,
    *,
    train: TextSource,
    prompt: str = "prompt",
    completion: str = "completion",
    cache: str | Path | None = None,
    identity: str | None = None,
    asking: Asking | None = None,
    **task: Any,
) -> Task:
    """Next tokens of a black box's answers, for the causal model in a Hugging Face directory.

    Each sample of an answer is a row, so an answer weighs as often as the box gives it.

    Args:
        teacher: a function from text to text; or a .jsonl file or table with its answers, a text or a list of texts a
            row, or rows of one prompt.
        data: the folder that file names are looked up in, beside the current one.
        train: the prompts: a file or table with the column `prompt`.
        prompt, completion: columns.
        cache: the folder in which a function's answers are kept, so that none is asked for twice; None: in memory.
        identity: names the function, its model and settings; needed with `cache`, as another one's answers are others.
        asking: samples a prompt, retries and timeouts of a function.
        task: what `language_task` takes beside these: directory, evaluation, validation, sizes.

    Raises:
        InputError: prompts or answers are missing, empty or no texts; or the function answered too little.
    """
    if not (callable(teacher) or isinstance(teacher, str | Path | Mapping | list | tuple) or hasattr(teacher, "keys")):
        raise InputError(
            "black box: the teacher is a function from text to text, or a .jsonl file or table with its answers, and "
            f"not {type(teacher).__name__} ({teacher!r:.40})"
        )
    columns: dict[str, Any] = {"text": None, "prompt": prompt, "completion": completion}
    language_task(data, train=None, **columns, **task)  # all else is checked before anything is asked
    root = None if data is None else Path(data)
    prompts = column(read_table(train, root), prompt, str(train) if isinstance(train, str | Path) else "the table")
    if callable(teacher):
        asked = ask(teacher, prompts, _file(cache, identity), asking)
        answers, notes = asked.answers, asked.notes
    else:
        known = answers_of_table(read_table(teacher, root), prompt, completion)
        answers = [known.get(p, []) for p in prompts]
        if missing := [p for p, a in zip(prompts, answers, strict=True) if not a]:
            raise InputError(
                f"black box: {len(missing)} of {len(prompts)} prompts have no answer in the file, such as "
                f"{missing[0]!r:.60}; add them, or take them out of the prompts"
            )
        top = sum(estimate(a).top for a in answers) / len(answers)
        count = sum(map(len, answers))
        notes = [f"a file answers {len(answers)} prompts with {count} texts; the most frequent is {top:.0%} on average"]
    rows = [(p, a) for p, texts in zip(prompts, answers, strict=True) for a in texts]
    table = {prompt: [p for p, _ in rows], completion: [a for _, a in rows]}
    made = language_task(data, train=table, **columns, **task)
    return made.with_evaluation(made.evaluation, "; ".join(notes))


def _file(cache: str | Path | None, identity: str | None) -> AnswerFile:
    if cache is None:
        return AnswerFile(None, "")
    if not isinstance(cache, str | Path):
        raise InputError(f"black box: cache is a folder's name, and not {type(cache).__name__} ({cache!r:.40})")
    if not isinstance(identity, str) or not identity.strip():
        said = "" if identity is None else f", a text, and not {identity!r:.40}"
        raise InputError(f"black box: answers that are kept need an `identity`: the name of what gives them{said}")
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return AnswerFile(Path(cache) / f"answers-{name}.jsonl", identity)
