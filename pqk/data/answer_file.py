"""Answers by what was asked, in a file of JSON lines that only grows: nothing is asked twice.

A line is written when its answer is there, and carries a digest of itself: one that a killed run left half written, or
that was changed, is as if it were not there, and is asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pqk.errors import InputError

Answer = tuple[str, int, Any]
"""(question, number of the draw, what was answered: a text, or token numbers; None: nothing, and it is asked again)"""


class AnswerFile:
    """Answers to questions, several draws of each.

    Args:
        path: the file, made on demand; None: answers are kept in memory only.
        identity: names what answers, how and with which seed; a file of another one is refused.

    Raises:
        InputError: the file cannot be read, or is another one's.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.answers: dict[tuple[str, int], Any] = {}
        self.queries = 0
        """how often was asked, by all runs, those without an answer included"""
        self._whole = True
        """whether the file ends with a whole line"""
        self._header = json.dumps({"answers": identity}) + "\n"
        self._begun = False
        """whether the file is there, with what it is the file of"""
        if path is not None and path.exists():
            self._read(path)

    def get(self, question: str, draw: int = 0) -> Any:
        """The answer; None: it is not there yet."""
        return self.answers.get((question, draw))

    def of(self, question: str) -> list[Any]:
        """All answers to a question, in the order of their draws."""
        return [answer for (asked, _), answer in sorted(self.answers.items(), key=_by_draw) if asked == question]

    def add(self, answers: Iterable[Answer]) -> None:
        """Keeps some answers. Raises `InputError` where they cannot be written."""
        answers = list(answers)
        self.queries += len(answers)
        self.answers.update({(question, draw): answer for question, draw, answer in answers if answer is not None})
        if self.path is None:
            return
        lines = "".join(self._line(*answer) + "\n" for answer in answers)
        try:
            there = self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = lines if there and self._begun else self._header + lines
            if there and not (self._begun and self._whole):
                text = f"\n{text}"
            with self.path.open("a", encoding="utf-8") as f:  # in one piece: what reads it finds all of them or none
                f.write(text)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._whole = self._begun = True

    def _line(self, question: str, draw: int, answer: Any) -> str:
        value = {"question": question, "draw": draw, "answer": answer}
        return json.dumps({**value, "check": self._check(value)}, ensure_ascii=False)

    def _check(self, value: dict[str, Any]) -> str:
        text = json.dumps([self.identity, value["question"], value["draw"], value["answer"]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _read(self, path: Path) -> None:
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if self._header.startswith(content) and content != self._header:
            return  # of a run that was killed when it had just made it
        lines = list(_objects(content))
        whose = lines[0].get("answers") if lines else None
        if whose != self.identity:
            raise InputError(
                f"{path} holds the answers of {whose!r}, and is to hold those of {self.identity!r}; name another file, "
                "or delete it"
            )
        for value in lines[1:]:
            if value.keys() == {"question", "draw", "answer", "check"} and value["check"] == self._check(value):
                self.queries += 1
                if value["answer"] is not None:
                    self.answers[value["question"], value["draw"]] = value["answer"]
        self._whole, self._begun = content.endswith("\n"), True


def _by_draw(item: tuple[tuple[str, int], Any]) -> int:
    return item[0][1]


def _objects(content: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of the lines that are whole."""
    for line in content.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
