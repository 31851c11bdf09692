"""Multi-step arithmetic with worked steps: a language whose answers can be checked, and a small Llama that speaks it.

    python -m pqk.models.arithmetic --out out/arithmetic --steps 1000

A problem is a digit and up to five operations, done from left to right, of whose results the last digit is kept:
`7*8+9-3=` has the steps `7*8=6;6+9=5;5-3=2;` and the answer `2`. Its difficulty is the number of operations. Whoever
works step by step needs 270 facts; whoever answers at once needs 27 times as many with each further operation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pqk.errors import InputError
from pqk.models.hub import quietly
from pqk.models.letters import fit, letter_tokenizer, write_teacher

MODULUS = 10
SYMBOLS = "+-*"
LETTERS = "0123456789+-*=;:?!"
SPECIAL = ("<pad>", "<s>", "</s>")
HARDEST = 5
WORKED, ANSWERED = "!", "?"
"""what a prompt begins with: steps are to come before the answer, or the answer at once"""


@dataclass(frozen=True)
class Problem:
    """A number and what is done to it, from left to right."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def difficulty(self) -> int:
        """How many operations there are."""
        return len(self.operations)

    @property
    def question(self) -> str:
        """As it is asked: `7*8+9=`."""
        return f"{self.first}{''.join(f'{symbol}{n}' for symbol, n in self.operations)}="

    @property
    def steps(self) -> str:
        """Its worked steps: `7*8=6;6+9=5;`."""
        before = [self.first, *self.values]
        lines = zip(before, self.operations, self.values, strict=False)
        return "".join(f"{value}{symbol}{n}={after};" for value, (symbol, n), after in lines)

    @property
    def values(self) -> list[int]:
        """What comes out after each operation."""
        found = [self.first]
        for symbol, n in self.operations:
            found.append(applied(found[-1], symbol, n))
        return found[1:]

    @property
    def short_steps(self) -> str:
        """What comes out after each operation, without the operation: `6;5;`."""
        return "".join(f"{value};" for value in self.values)

    @property
    def answer(self) -> str:
        """What comes out."""
        return str(self.values[-1])


def applied(value: int, symbol: str, n: int) -> int:
    """`value` after one operation, from 0 to 9."""
    return {"+": value + n, "-": value - n, "*": value * n}[symbol] % MODULUS


def problems(count: int, difficulties: Sequence[int], seed: int) -> list[Problem]:
    """Random problems, each difficulty as often as the others, none twice where there are enough.

    Raises `InputError` for a difficulty that is not from 1 to 5.
    """
    if any(not 1 <= d <= HARDEST for d in difficulties) or not difficulties:
        raise InputError(f"arithmetic: difficulties {[*difficulties]} must be from 1 to {HARDEST}")
    draws, seen, found = random.Random(seed), set[Problem](), list[Problem]()
    tries = 0
    while len(found) < count:
        size = difficulties[len(found) % len(difficulties)]
        made = Problem(
            draws.randrange(MODULUS), tuple((draws.choice(SYMBOLS), draws.randrange(1, 10)) for _ in range(size))
        )
        tries += 1
        if made not in seen or tries > 20 * count:
            seen.add(made)
            found.append(made)
    return found


def table(of: Sequence[Problem], *, worked: bool) -> dict[str, list[str]]:
    """Columns of prompts and completions: with the steps before the answer, or the answer at once."""
    mark = WORKED if worked else ANSWERED
    return {
        "prompt": [f"{mark}{p.question}" for p in of],
        "completion": [f"{p.steps if worked else ''}:{p.answer}" for p in of],
    }


def mixed(of: Sequence[Problem]) -> list[tuple[str, str]]:
    """Prompts and completions, three in four with steps: of each difficulty, in the order that `problems` gives."""
    rows = [table([p], worked=i // HARDEST % 4 > 0) for i, p in enumerate(of)]
    return [(row["prompt"][0], row["completion"][0]) for row in rows]


def answer_in(text: str) -> str:
    """The answer that a completion gives: the digits behind its last colon; "" where there are none."""
    _, colon, last = text.rpartition(":")
    digits = last.strip()
    return digits if colon and digits.isdigit() else ""


# ---- the teacher


def letters() -> Any:
    """The language's tokenizer of `transformers`: a token a letter, one in front of every text and one behind it."""
    return letter_tokenizer(
        SPECIAL, LETTERS, "<s> $A", unknown="<pad>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def reasoner(layers: int, width: int, seed: int = 0) -> Any:
    """An untrained Llama of `transformers` for the language, with heads of 32 channels."""
    if width % 32:
        raise InputError(f"arithmetic: width={width} must be a multiple of 32")
    torch.manual_seed(seed)
    with quietly() as transformers:
        config = transformers.LlamaConfig(
            vocab_size=len(SPECIAL) + len(LETTERS), hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, intermediate_size=3 * width,
            max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def train(model: Any, steps: int, seed: int = 0, batch: int = 64, rate: float = 2e-3) -> dict[str, float]:
    """Trains a model on fresh problems, of each difficulty three in four with steps.

    AdamW, a tenth of the steps as warm-up and a cosine to 0. Returns the mean loss of the last 100 steps, in nats per
    learned token, and the seconds.
    """
    tokenizer = letters()

    def loss_of(step: int) -> torch.Tensor:
        of = problems(batch, range(1, HARDEST + 1), seed * 1_000_003 + step)
        ids, targets = _batch(tokenizer, mixed(of))
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100)

    return fit(model, loss_of, steps, rate=rate, warm_up=steps / 10, tail=100, every=500)


def _batch(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids, and the next tokens of the completions: int64 [B, S] each."""
    rows = []
    for prompt, completion in texts:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], 2]
        rows.append((before + after, len(before)))
    length = max(len(r) for r, _ in rows)
    ids, targets = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, start - 1 : len(row) - 1] = torch.tensor(row[start:])
    return ids, targets


if __name__ == "__main__":
    write_teacher(__doc__, reasoner, train, letters, layers=4, width=96, steps=1000)
