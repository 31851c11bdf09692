"""A compile of a language model in about a minute: a small Llama, and what a black box tells. Of `telling.toml`."""

from __future__ import annotations

from pathlib import Path

from pqk import Task
from pqk.models.black_box import black_box_task

TEXT = "the cat sat on the mat and the other cat sat there a dog that barked at the cats in the gardens"
WORDS = TEXT.split()
CALLS = Path("calls")
"""a line for each prompt that the box was asked"""


def said(prompt: str) -> str:
    start = len(prompt) % len(WORDS)
    return " " + " ".join((WORDS[start:] + WORDS)[:7])


def tell(prompt: str) -> str:
    """What the black box answers to a prompt."""
    with CALLS.open("a") as f:
        f.write(f"{prompt}\n")
    return said(prompt)


def task(data: object = None) -> Task:
    """Prompts of three to five words, with the box's answers, for which it is asked where they are not kept."""
    prompts = [" ".join((WORDS * 2)[i : i + 3 + i % 3]) for i in range(len(WORDS))]
    held = {"prompt": prompts[:4], "completion": [said(p) for p in prompts[:4]]}
    return black_box_task(
        tell, train={"prompt": prompts[4:]}, directory="model", cache="asked", identity="the box",
        evaluation=held, validation=held, batch_size=4, max_length=24, context=4,
    )  # fmt: skip
