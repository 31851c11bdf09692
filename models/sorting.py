"""Letters and the same in alphabetical order: pairs that can be checked, and a small T5 that sorts them.

    python -m pqk.models.sorting --out out/sorting_teacher --steps 1200

`stone` becomes `enost`. A word has 4 to 12 different letters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pqk.errors import InputError
from pqk.models.hub import quietly
from pqk.models.letters import fit, letter_tokenizer, write_teacher
from pqk.models.seq2seq import seq2seq_task
from pqk.models.text_data import padded
from pqk.task.classes import IGNORED
from pqk.task.task import Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "</s>", "<unk>")
SHORTEST, LONGEST = 4, 12
EVALUATED, VALIDATED = 500, 200
"""words that are held out"""


def pairs(count: int, seed: int) -> dict[str, list[str]]:
    """Random words and their letters in order, columns `source` and `target`: a function of the seed."""
    draws = random.Random(seed)
    words = ["".join(draws.sample(LETTERS, draws.randint(SHORTEST, LONGEST))) for _ in range(count)]
    return {"source": words, "target": ["".join(sorted(word)) for word in words]}


def sorting_task(
    data: str | Path | None = None, *, directory: str | Path, train: int = 4000, **task: Any
) -> Task:  # fmt: skip
    """Words to sort, for the encoder-decoder in a Hugging Face directory: `train` of them, and others held out."""
    return seq2seq_task(
        data, directory=directory, train=pairs(train, 1), evaluation=pairs(EVALUATED, 2),
        validation=pairs(VALIDATED, 3), context=8, **task,
    )  # fmt: skip


# ---- the teacher


def letters() -> Any:
    """A tokenizer of `transformers` with a token a letter, and one behind every text."""
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return letter_tokenizer(SPECIAL, LETTERS, "$A </s>", unknown="<unk>", **named)


def sorter(layers: int, width: int, seed: int = 0) -> Any:
    """An untrained T5 of `transformers`, `layers` of each kind, with heads of 64 channels."""
    if width % 64:
        raise InputError(f"sorting: width={width} must be a multiple of 64")
    torch.manual_seed(seed)
    with quietly() as transformers:
        config = transformers.T5Config(
            vocab_size=len(SPECIAL) + len(LETTERS), d_model=width, d_kv=64, d_ff=4 * width, num_layers=layers,
            num_decoder_layers=layers, num_heads=width // 64, dropout_rate=0.0, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)


def train(model: Any, steps: int, seed: int = 0, batch: int = 32, rate: float = 1e-3) -> dict[str, float]:
    """Trains a model on fresh pairs: AdamW, 50 steps of warm-up and a cosine to 0.

    Returns the mean loss of the last 50 steps, in nats per token, and the seconds.
    """
    tokenizer = letters()

    def loss_of(step: int) -> torch.Tensor:
        found = pairs(batch, (seed + 1) * 1_000_003 + step)
        asked, wanted = (
            [torch.tensor(t) for t in tokenizer(found[name])["input_ids"]] for name in ("source", "target")
        )
        ids, mask = padded(asked, 0)
        labels = padded(wanted, IGNORED)[0]
        loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss

    return fit(model, loss_of, steps, rate=rate, warm_up=50, tail=50, every=100)


@torch.no_grad()
def exact_match(generate: Callable[[Sequence[int]], Sequence[int]], found: dict[str, list[str]]) -> float:
    """The share of pairs whose target is generated to the letter.

    Args:
        generate: the tokens of a source -> those of its target.
        found: columns `source` and `target`.
    """
    tokenizer = letters()
    asked = tokenizer(found["source"])["input_ids"]
    said = [tokenizer.decode(generate(ids), skip_special_tokens=True) for ids in asked]
    return sum(s == t for s, t in zip(said, found["target"], strict=True)) / len(said)


if __name__ == "__main__":
    write_teacher(__doc__, sorter, train, letters, layers=2, width=512, steps=1200)
