"""Small teachers that speak letters: their tokenizer, their training from nothing, and the command that writes one."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk.models.hub import quietly

log = logging.getLogger(__name__)


def letter_tokenizer(
    special: Sequence[str], letters: str, template: str, *, unknown: str, **named: str
) -> Any:  # fmt: skip
    """A tokenizer of `transformers` with a token a letter.

    Args:
        special: the first tokens, which are no letters.
        letters: the other ones.
        template: what stands around a text, such as "<s> $A".
        unknown: the token of any other letter.
        named: what special tokens are for, such as `eos_token`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ids = {name: i for i, name in enumerate((*special, *letters))}
    with quietly() as transformers:
        made = Tokenizer(models.WordLevel(ids, unk_token=unknown))
        made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        made.decoder = decoders.Fuse()
        around = [(name, ids[name]) for name in template.split() if name in special]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, model_max_length=128, model_input_names=["input_ids", "attention_mask"], **named
        )


def fit(
    model: Any, loss_of: Callable[[int], Tensor], steps: int, *, rate: float, warm_up: float, tail: int, every: int
) -> dict[str, float]:
    """Trains a model by AdamW: a warm-up, then a cosine to 0.

    Args:
        model: what is trained; it is in eval mode afterwards.
        loss_of: the loss of the batch of a step, from 0 on.
        steps: how many there are.
        rate: the largest learning rate.
        warm_up: steps until it is reached.
        tail: steps at the end whose mean loss is returned.
        every: steps between two lines of the log.

    Returns:
        The mean "loss" of the last steps, and the "seconds".
    """
    start, losses = time.monotonic(), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % every == every - 1:
            log.info("step %d of %d, loss %.4f", step + 1, steps, sum(losses[-tail:]) / tail)
    model.eval()
    return {"loss": sum(losses[-tail:]) / len(losses[-tail:]), "seconds": time.monotonic() - start}


def write_teacher(
    about: str | None,
    make: Callable[[int, int, int], Any],
    train: Callable[[Any, int, int], dict[str, float]],
    letters: Callable[[], Any],
    *,
    layers: int,
    width: int,
    steps: int,
) -> None:
    """The command that trains a teacher and writes its directory.

    Args:
        about: the documentation of the module, whose first line says what is made.
        make: (layers, width, seed) -> the untrained model.
        train: (model, steps, seed) -> notes, which go into training.json.
        letters: its tokenizer.
        layers, width, steps: by default.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0] if about else None)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = make(options.layers, options.width, options.seed)
    notes = train(model, options.steps, options.seed)
    with quietly():
        model.save_pretrained(options.out, safe_serialization=True)
        letters().save_pretrained(options.out)
    said = {key: value for key, value in vars(options).items() if key != "out"}
    (options.out / "training.json").write_text(json.dumps(said | notes, indent=1) + "\n")
