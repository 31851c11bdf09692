"""Next tokens as a task: what is learned of texts, and of prompts with completions, and what it is measured by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import causal_models as tiny
import pytest
import torch
from torch import nn

from pqk.errors import InputError
from pqk.models.answer_match import log_likelihood
from pqk.models.decoder import Decoder
from pqk.models.language import Text, choice, language_task, next_tokens
from pqk.task.classes import IGNORED
from pqk.task.kept_tokens import kept

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "llama")


def task(folder: Path, **changes: Any) -> Any:
    texts = {"text": tiny.stories(6)}
    return language_task(directory=folder, **{"train": texts, "evaluation": texts, "validation": texts} | changes)


def test_every_token_but_the_first_is_learned() -> None:
    data = next_tokens([Text([1, 5, 6, 7]), Text([1, 8])], 2, pad=0)
    (batch,) = data.batches()
    ids, mask = batch.inputs
    assert batch.keys.tolist() == [1, 0]  # the shorter first
    assert ids.tolist() == [[1, 8, 0, 0], [1, 5, 6, 7]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.targets.tolist() == [[8, IGNORED, IGNORED, IGNORED], [5, 6, 7, IGNORED]]


def test_of_a_prompt_nothing_is_learned() -> None:
    """The last of its tokens is where the completion's first one is learned."""
    (batch,) = next_tokens([Text([1, 5, 6, 7, 2], 3)], 1, pad=0).batches()
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 7, 2, IGNORED]]


def test_rows_keep_their_prompts_in_another_order() -> None:
    tokens, starts = [[1, *range(3, 4 + n)] for n in range(7)], [1, 1, 2, 1, 3, 1, 4]
    data = next_tokens([Text(t, n) for t, n in zip(tokens, starts, strict=True)], 2, pad=0)
    for batch in data.batches(seed=3, epoch=1):
        for row, ids, targets in zip(batch.keys.tolist(), batch.inputs[0], batch.targets, strict=True):
            learned = [t for t in targets.tolist() if t != IGNORED]
            assert learned == tokens[row][max(starts[row], 1) :]
            assert ids[: len(tokens[row])].tolist() == tokens[row]


def test_texts_that_are_cut_are_counted(folder: Path) -> None:
    assert task(folder).notes == task(folder, max_length=10**6).notes == ()
    short = task(folder, max_length=9).notes
    assert "6 of 6 training texts end after 9 tokens (max_length)" in short
    long = {"text": ["a " * 300, "by"]}
    (note,) = (n for n in task(folder, train=long).notes if "train" in n)
    assert note == "1 of 2 training texts end after 64 tokens (the model's positions; max_length=512)"


def test_a_part_of_the_data_still_knows_what_is_learned() -> None:
    data = next_tokens([Text([1, 5, 6, 7], 2), Text([1, 8, 9], 1), Text([1, 3, 4], 2)], 1, pad=0)
    found = {
        int(b.keys): [t for t in b.targets[0].tolist() if t != IGNORED]
        for b in data.subset(torch.tensor([0, 2])).batches()
    }
    assert found == {0: [6, 7], 2: [4]}
    assert data.fingerprint() != next_tokens([Text(t.tolist()) for t in data.tokens], 1, pad=0).fingerprint()


@torch.no_grad()
def test_texts_in_one_row_do_not_see_each_other() -> None:
    """Packed, every token has the scores and the target that it has alone."""
    generator = torch.Generator().manual_seed(5)
    texts = [Text(torch.randint(3, 90, (n,), generator=generator).tolist()) for n in (4, 6, 5, 3, 7)]
    model = Decoder(tiny.hub_model("llama"))
    alone = {}
    for batch in next_tokens(texts, 1, pad=0).batches():
        scores, targets = model(*batch.inputs)[0], batch.targets[0]
        alone[int(batch.keys)] = (scores, targets)
    packed = next_tokens(texts, 2, pad=0, packed=11)
    assert [row.tolist() for row in packed.parts] == [[1] * 4 + [2] * 6, [1] * 5 + [2] * 3, [1] * 7]
    for batch in packed.batches():
        scores = model(*batch.inputs)
        for row, key in enumerate(batch.keys.tolist()):
            at = 0
            for number in [(0, 1), (2, 3), (4,)][key]:
                size = len(texts[number].tokens)
                torch.testing.assert_close(scores[row, at : at + size], alone[number][0], atol=2e-5, rtol=1e-4)
                assert torch.equal(batch.targets[row, at : at + size], alone[number][1])
                at += size


def test_a_conversation_is_learned_from_where_the_answer_begins(folder: Path, tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": "a dog"}, {"role": "assistant", "content": "ran"},
        {"role": "user", "content": "to me"}, {"role": "assistant", "content": "sat"},
    ]  # fmt: skip
    talking = tiny.directory(tmp_path / "talking")
    config = talking / "tokenizer_config.json"
    each = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}.{% endfor %}"
    template = each + "{% if add_generation_prompt %}[a]{% endif %}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    table = {"messages": [said, said[:2]]}
    made = task(talking, train=table, evaluation=table, validation=table, messages="messages")
    learned = [b.targets[b.targets != IGNORED] for b in made.evaluation.batches()]
    assert tiny.letters().decode(torch.cat(learned)) in ("ran.sat.", "sat.ran.")
    with pytest.raises(InputError, match="row 2 of the table must have in messages at least two messages"):
        task(talking, evaluation={"messages": [said, said[:1]]}, train=None, validation=table, messages="messages")
    with pytest.raises(InputError, match="no chat template"):
        task(folder, train=None, evaluation=table, validation=table, messages="messages")


def test_steps_stand_before_the_answer_and_are_learned(folder: Path) -> None:
    table = {"prompt": ["2+3 "], "steps": ["3 4 5"], "completion": ["5"]}
    made = task(folder, train=None, evaluation=table, validation=table, text=None, rationale="steps")
    (batch,) = made.evaluation.batches()
    learned = batch.targets[batch.targets != IGNORED].tolist()
    assert tiny.letters().decode(learned) == "3 4 5\n5</s>"


def test_prompts_with_completions_are_known_by_their_columns(folder: Path) -> None:
    """A recipe in TOML cannot say that there is no column of texts."""
    table = {"prompt": ["a dog "], "completion": ["ran"]}
    (batch,) = task(folder, train=None, evaluation=table, validation=table).evaluation.batches()
    assert tiny.letters().decode(batch.targets[batch.targets != IGNORED]) == "ran</s>"


def test_conversations_that_are_not_named_are_refused_with_the_argument_that_names_them(folder: Path) -> None:
    table = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
    with pytest.raises(InputError, match='say messages = "messages"'):
        task(folder, train=None, evaluation=table, validation=table)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"limit": 0}, "limit=0 .* at least 1"), ({"max_length": 1}, "max_length=1 .* at least 2")]
)
def test_too_few_texts_or_tokens_are_refused(folder: Path, wrong: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(folder, **wrong)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"prompt": ["a", "b"], "completion": ["c", " "]}, "row 2 of the table has an empty completion"),
        ({"prompt": ["a"], "completion": [3]}, "row 1 of the table has in completion no text but int"),
        (
            {"prompt": ["a" * 90], "completion": ["c"]},
            "row 1 has 64 tokens, as far as max_length goes, of which none follows its prompt",
        ),
        ({"prompt": ["a"], "answer": ["c"]}, 'the table has no column "completion"'),
    ],
)
def test_rows_of_which_nothing_can_be_learned_are_refused(folder: Path, table: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(folder, train=None, evaluation=table, validation=table, text=None)


def test_a_completion_without_tokens_is_refused() -> None:
    with pytest.raises(
        InputError, match="row 2 has 3 tokens, as far as max_length goes, of which none follows its prompt"
    ):
        next_tokens([Text([1, 5, 6]), Text([1, 5, 6], 3)], 2, pad=0)


def test_the_metric_is_the_mean_over_all_tokens_that_are_learned() -> None:
    """Not the mean of means: a long text counts for more. Kept as losses, it is the same as of scores."""
    scores = torch.zeros(2, 3, 4)
    scores[0, 0, 1] = math.log(5)  # of 4 tokens, one has 5 of 8 parts, and the others one each
    targets = torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])
    expected = (math.log(5 / 8) + 2 * math.log(1 / 4)) / 3
    assert log_likelihood(scores, targets) == pytest.approx(expected)
    assert log_likelihood(kept(scores, targets), targets) == pytest.approx(expected)
    assert torch.equal(choice(kept(scores, targets)), scores.argmax(-1))


def test_a_file_of_prompts_and_completions(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a dog ", "completion": "ran"}, {"prompt": "by a tree ", "completion": "sat down"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = task(folder, text=None, train=str(file), evaluation=str(file), validation=str(file))
    learned = torch.cat([batch.targets[batch.targets != IGNORED] for batch in made.train.batches()])
    assert sorted(tiny.letters().decode(learned, skip_special_tokens=True).replace(" ", "")) == sorted("ransatdown")
    assert int((learned == 2).sum()) == 2  # each ends


def test_the_example_is_a_text_without_padding_that_times_are_of(folder: Path) -> None:
    made = task(folder, context=20)
    ids, mask = made.example
    assert ids.shape == mask.shape == (2, 21)
    assert mask.all()
    feeds = made.feeds(1)
    assert feeds["input_ids"].shape == (1, 1)
    assert feeds["attention_mask"].shape == (1, 21)
    assert made.feeds(1, "a prompt of 21 tokens")["input_ids"].shape == (1, 21)


@torch.no_grad()
def test_what_is_kept_of_all_samples_is_small(folder: Path) -> None:
    """Scores of every token would be as large as the table, for each."""
    made = task(folder)
    outputs, targets = made.predict(Uniform(), made.evaluation)
    assert {name: tuple(t.shape[:2]) for name, t in outputs.items()} == dict.fromkeys(outputs, tuple(targets.shape))
    assert made.score(Uniform(), made.evaluation) == pytest.approx(-math.log(300))


class Uniform(nn.Module):
    """Every token of 300 is as likely as every other."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, 300)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (300, 280, "scores 300 tokens, and the task's texts are of a model of 280: teacher and task are of different"),
        (20, 280, r"do not fit it: .*The task's texts are of 280 tokens: is the teacher of the same directory\?"),
    ],
)
def test_a_teacher_of_another_directory_is_refused(tmp_path: Path, theirs: int, ours: int, said: str) -> None:
    folder, texts = tiny.directory(tmp_path / "task", vocab_size=ours), {"text": tiny.stories(4)}
    teacher = Decoder(tiny.hub_model("llama", vocab_size=theirs)).eval()
    task = language_task(directory=folder, train=None, evaluation=texts, validation=texts)
    with pytest.raises(InputError, match=said):
        task.check(teacher)
