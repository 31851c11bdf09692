"""Metrics of texts: next tokens, whole completions, and answers that are parsed out of what a model writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal_models as tiny
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pqk.errors import InputError
from pqk.models.answer_match import ParsedAnswers, agreement, exact_match, parser, written
from pqk.models.language import language_task
from pqk.task.classes import IGNORED
from pqk.task.kept_tokens import kept
from pqk.task.metrics import Metric, predict

GSM8K = r"#### (\S+)"
END = 9


class Digits:
    """A tokenizer whose tokens are digits."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(str(t) for t in tokens if t != END)


def counting(ids: Tensor, mask: Tensor) -> Tensor:
    """Scores [B, S, 10]: behind a token comes the next one, up to the end."""
    return one_hot((ids + 1).clamp(max=END), 10).float()


def batch(*rows: tuple[list[int], int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Ids, mask and targets of texts of which so many tokens are given."""
    length = max(len(text) for text, _ in rows)
    ids, mask, targets = (torch.full((len(rows), length), fill) for fill in (0, 0, IGNORED))
    for i, (text, given) in enumerate(rows):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
        targets[i, given - 1 : len(text) - 1] = torch.tensor(text[given:])
    return (ids, mask), targets


def test_a_text_is_written_to_its_end_and_no_further() -> None:
    given = [torch.tensor([5]), torch.tensor([0, 3]), torch.tensor([8, 8, 8])]
    assert [t.tolist() for t in written(counting, given, frozenset({END}), 4)] == [[6, 7, 8, 9], [4, 5, 6, 7], [9]]


def test_shares_by_hand() -> None:
    """Three texts: one to the letter, one with a wrong token in its middle, one wrong of one token."""
    inputs, targets = batch(([1, 2, 3, 4], 1), ([2, 3, 5, 6], 1), ([7, 7, 7], 2))
    outputs = kept(counting(*inputs), targets)
    assert agreement(outputs, targets) == pytest.approx((3 + 2 + 0) / 7)
    assert exact_match(outputs, targets) == exact_match(counting(*inputs), targets) == pytest.approx(1 / 3)


def test_an_answer_is_that_of_the_text_which_the_model_writes() -> None:
    """Steps may be others than the data's: here the answer is the last digit before the end."""
    parsed = ParsedAnswers(Digits(), parser(r"\d$"), frozenset({END}))
    inputs, targets = batch(([5, 7, 8, END], 1), ([5, 6, END], 1), ([1, 6, 8, END], 2), ([4, 8], 1))
    found = parsed.asked(counting, inputs, targets)
    assert isinstance(found, dict)
    assert found["match"].tolist() == [True, False, True, True]
    assert exact_match(found, targets) == 0.75 and exact_match(kept(counting(*inputs), targets), targets) == 0.0


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        (GSM8K, "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        (GSM8K, "#### 3\nor rather\n#### 1,200", "1,200"),
        (GSM8K, "no answer", None),
        (r"\d+", "1 and 23", "23"),
        (len, "abc", 3),
    ],
)
def test_answers_are_parsed(answer: Any, text: str, expected: Any) -> None:
    assert parser(answer)(text) == expected


def test_every_answer_of_real_problems_is_found(data_file: Callable[[str], Path]) -> None:
    rows = [json.loads(line) for line in data_file("gsm8k_test.jsonl").read_text().splitlines()]
    found = [parser(GSM8K)(row["answer"]) for row in rows]
    assert (
        len(found) == 1319 and found[0] == "18" and all(f and f.strip("-$").replace(",", "").isdigit() for f in found)
    )


@pytest.mark.slow
def test_a_task_is_judged_by_what_its_user_says(tmp_path: Path) -> None:
    """Of a small model that knows nothing, on problems of which a teacher's own text is the answer to one."""
    pytest.importorskip("transformers")
    from pqk.models.decoder import decoder

    folder = tiny.directory(tmp_path / "model")
    model, rows = decoder(folder), {"prompt": ["2+3=", "1+1="], "completion": ["it is #### 5", "that is #### 2"]}
    settings: dict[str, Any] = {
        "directory": folder,
        "train": None,
        "evaluation": rows,
        "validation": rows,
        "text": None,
    }
    task = language_task(**settings, metric="exact_match", answer=GSM8K)
    task.check(model)
    outputs, targets = task.predict(model, task.evaluation)
    assert isinstance(outputs, dict) and outputs["match"].tolist() == [False, False]
    assert task.metric.function(outputs, targets) == 0.0 and task.metric.unit == "share"
    longest = Metric("longest", "tokens", lambda outputs, targets: float((outputs["loss"] > 0).sum(1).max()))
    own = language_task(**settings, metric=longest)
    assert own.metric.function(*own.predict(model, own.evaluation)) == len("that is #### 2") + 1
    plain = language_task(**settings, metric="agreement")
    assert 0 <= plain.metric.function(*plain.predict(model, plain.evaluation)) < 0.2
    assert "match" not in predict(model, plain.evaluation, kept=kept)[0]
    with pytest.raises(InputError, match=r"evaluation data: no answer is parsed out of the text 'it is #### 5': see"):
        language_task(**settings, metric="exact_match", answer=r"=> (\d+)")
    for wrong, said in (
        ({"metric": "bleu"}, "metric = 'bleu': known are log-likelihood, agreement, exact_match"),
        ({"answer": GSM8K}, 'says what metric = "exact_match" compares, and that is not set'),
        ({"metric": "exact_match", "answer": "(("}, "is no regular expression"),
    ):
        with pytest.raises(InputError, match=said):
            language_task(**settings, **wrong)
