"""Texts as strangers have them: lower-case words, a vocabulary of the most frequent ones, ids of one length."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from pqk.models.strangers.stranger import Samples
from pqk.models.text_data import column, read_table

PAD, UNKNOWN = 0, 1
WORD = re.compile(r"\w+|[^\w\s]")


def word_samples(task: str, data: Path | None, words: int, length: int) -> Samples:
    """Ids int64 [N, length], 0 where a text has ended, and labels, of `task`_train.tsv and `task`_test.tsv.

    The vocabulary is the `words` - 2 most frequent words of train; every other word is 1.
    """
    parts = []
    for part in ("train", "test"):
        table = read_table(f"{task}_{part}.tsv", data)
        texts = [WORD.findall(str(text).lower()) for text in column(table, "text", part)]
        parts.append((texts, torch.tensor([int(label) for label in column(table, "label", part)])))
    (train, labels), (test, test_labels) = parts
    counts = Counter(word for text in train for word in text)
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common(words - 2), 2)}

    def ids(texts: list[list[str]]) -> Tensor:
        found = torch.full((len(texts), length), PAD)
        for row, text in zip(found, texts, strict=True):
            known = [vocabulary.get(word, UNKNOWN) for word in text[:length]]
            row[: len(known)] = torch.tensor(known)
        return found

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # as stored, they are by label
    other = torch.randperm(len(test_labels), generator=torch.Generator().manual_seed(0))
    return Samples((ids(train)[order], labels[order]), (ids(test)[other], test_labels[other]))
