"""A teacher with another tokenizer: its answers stand where both have read the same text, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.sequences import padded
from pqk.errors import InputError
from pqk.knowledge import CrossEntropy, DualSpace, KLDivergence, ReverseKL, SortedULD, View
from pqk.knowledge.answers.authors import ByMixture, ByTeacher, Desk
from pqk.knowledge.objective import Distillation
from pqk.knowledge.sources import FromOtherTokenizer, TeacherContext
from pqk.knowledge.teachers.retokenizing import RetokenizingTeacher, aligned, places
from pqk.models.hub import quietly
from pqk.task.task import Task

TEXTS = ["the dog ran to the dogs", "a dog", "to a dog the ran"]
LETTERS = ["<s>", " ", *"adehgnorst"]
WORDS = ["<s>", "the", "dog", "ran", "to", "a", "s", " "]


def tokenizer(pieces: list[str], begins: bool = True) -> Any:
    """Takes the longest piece of a word at a time; spaces are pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<s>"))
    longest = "|".join(sorted(pieces[1:], key=len, reverse=True))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(longest), "isolated")
    made.decoder = decoders.Fuse()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with quietly() as transformers:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<s>")


class Causal(nn.Module):
    """Embeddings, a running mean, and a head: scores of a token are of it and those before."""

    def __init__(self, vocabulary: int, seed: int, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.body = nn.Embedding(vocabulary, width), nn.Identity()
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(self.body(self.embed(input_ids).cumsum(1) / count))


STUDENTS, TEACHERS = tokenizer(LETTERS), tokenizer(WORDS)
ROWS = [torch.tensor(STUDENTS(t)["input_ids"]) for t in TEXTS]
INPUTS = padded(ROWS, 0)
TARGETS = INPUTS[0].roll(-1, 1).masked_fill(INPUTS[1].roll(-1, 1) == 0, -100)
TARGETS[:, -1] = -100
BATCH = Batch(INPUTS, TARGETS, None)


def task() -> Task:
    data = [(*INPUTS, TARGETS)]
    return Task(data, data, validation=data, class_axis=2, input_names=("input_ids", "attention_mask"))


def test_answers_stand_where_both_have_read_the_same() -> None:
    """Against each prefix of the text, read by the teacher alone."""
    model = Causal(len(WORDS), 0).eval()
    teacher = RetokenizingTeacher(model, TEACHERS, STUDENTS)
    answer, features = teacher(BATCH)
    assert answer.shape == (*INPUTS[0].shape, len(WORDS)) and features["aligned"].dtype == torch.bool
    for row, text in enumerate(TEXTS):
        for i in range(len(ROWS[row])):
            prefix, whole = text[:i], TEACHERS(text)["input_ids"]
            read = TEACHERS(prefix)["input_ids"]
            same = whole[: len(read)] == read and "".join(WORDS[t] for t in read[1:]) == prefix
            assert bool(features["aligned"][row, i]) == same, (text, prefix)
            if same:
                ids = torch.tensor([read])
                torch.testing.assert_close(answer[row, i], model(ids, torch.ones_like(ids))[0, -1])
            else:
                assert not answer[row, i].any()
        assert not features["aligned"][row, len(ROWS[row]) :].any()


def test_the_same_tokenizer_is_the_plain_teacher() -> None:
    model = Causal(len(LETTERS), 0).eval()
    for align in ("text", "index"):
        answer, features = RetokenizingTeacher(model, STUDENTS, STUDENTS, align=align)(BATCH)
        assert torch.equal(features["aligned"], INPUTS[1] > 0)
        torch.testing.assert_close(answer[features["aligned"]], model(*INPUTS)[INPUTS[1] > 0])


def test_what_the_teachers_tokenizer_puts_behind_a_text_is_no_part_of_it() -> None:
    """A token that ends texts stands nowhere in the text, as the one that begins it."""
    from tokenizers import processors

    model, ending = Causal(len(WORDS), 0).eval(), tokenizer(WORDS)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A s", special_tokens=[("<s>", 0), ("s", WORDS.index("s"))]
    )
    assert ending("dog")["input_ids"] == [*TEACHERS("dog")["input_ids"], WORDS.index("s")]
    answer, features = RetokenizingTeacher(model, ending, STUDENTS)(BATCH)
    expected, others = RetokenizingTeacher(model, TEACHERS, STUDENTS)(BATCH)
    assert torch.equal(features["aligned"], others["aligned"])
    torch.testing.assert_close(answer, expected)


def test_sorted_probabilities_are_compared_there_alone() -> None:
    teacher = RetokenizingTeacher(Causal(len(WORDS), 0).eval(), TEACHERS, STUDENTS)
    answer, features = teacher(BATCH)
    scores = torch.randn(*INPUTS[0].shape, len(LETTERS), generator=torch.Generator().manual_seed(0))
    loss = SortedULD()(View(scores, answer, TARGETS, {}, features, task()), None)
    s, t = (z.softmax(-1).sort(-1, descending=True).values for z in (scores, answer))
    each = (s - F.pad(t, (0, len(LETTERS) - len(WORDS)))).abs().sum(-1)
    counted = features["aligned"] & (TARGETS != -100)
    torch.testing.assert_close(loss, (each * counted).sum(1) / counted.sum(1))
    assert bool((counted.sum(1) < (TARGETS != -100).sum(1)).all())
    with pytest.raises(InputError, match="class by class"):
        KLDivergence()(View(scores, answer, TARGETS, {}, features, task()), None)


@pytest.mark.parametrize("term", [SortedULD(), DualSpace(point="body", head="head")], ids=lambda t: t.term)
def test_a_student_learns_of_it(term: Any) -> None:
    student, model = Causal(len(LETTERS), 1, 4), Causal(len(WORDS), 0)
    points = [] if isinstance(term, SortedULD) else ["body"]
    teacher = RetokenizingTeacher(model.requires_grad_(False), TEACHERS, STUDENTS, points)
    objective = Distillation([CrossEntropy(), term], task(), student, teacher)
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], 0.03)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(objective.wrap(student), BATCH).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and all(p.grad is None for p in model.parameters())


def test_places_of_tokens_that_no_text_is_read_as() -> None:
    """A student may write what its tokenizer would not; and the bytes of a character end where it does."""
    text, ends = places([0, WORDS.index("dog"), WORDS.index("s")], TEACHERS)
    assert (text, ends) == ("dogs", [0, 3, 4])
    odd = tokenizer([*LETTERS, "do"])
    apart = [0, LETTERS.index("d"), LETTERS.index("o"), LETTERS.index("g")]
    assert odd("dog")["input_ids"] != apart and places(apart, odd) == ("dog", [0, 1, 2, 3])
    assert aligned([0, 1, 3, 3, -1, 4], [0, 3, 3, 4]) == [0, -1, -1, 2, -1, 3]


def test_what_it_cannot_do_is_refused_in_words() -> None:
    model = Causal(len(WORDS), 0)
    with pytest.raises(InputError, match="does not say where its tokens stand"):
        RetokenizingTeacher(model, object(), STUDENTS)
    teacher = RetokenizingTeacher(model, TEACHERS, STUDENTS)
    with pytest.raises(InputError, match="reads texts, and these are none"):
        teacher.check((torch.zeros(2, 3, 4, 4),))
    for term in (KLDivergence(), ReverseKL()):
        with pytest.raises(InputError, match="another tokenizer, and .* compares the same classes of both"):
            Distillation([CrossEntropy(), term], task(), Causal(len(LETTERS), 1), teacher)
    for answers in (ByTeacher(), ByMixture()):
        with pytest.raises(InputError, match="another tokenizer and cannot write answers"):
            answers.make(Desk(Causal(len(LETTERS), 1), teacher, task(), 0))
    assert "another tokenizer" in str(teacher.why_not_cached())
    source = FromOtherTokenizer(directory="big", tokenizer="small")
    context = TeacherContext(model, model, (), "fp32", INPUTS)
    with pytest.raises(InputError, match="read from a directory"):
        source.make(context)
    read = {"big": (model, TEACHERS), "small": (Causal(len(LETTERS), 1), STUDENTS)}
    made = source.make(TeacherContext(model, model, (), "fp32", INPUTS, language_model=read.__getitem__))
    torch.testing.assert_close(made(BATCH)[0], teacher(BATCH)[0])
