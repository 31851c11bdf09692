"""Letters and the same in alphabetical order: pairs that can be checked, and a small T5 that sorts them.

    python -m pqk.models.sorting --out out/sorting_teacher --steps 1200

`stone` becomes `enost`. A word has 4 to 12 different letters.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pqk.errors import InputError
from pqk.models.hub import quietly
from pqk.models.seq2seq import seq2seq_task
from pqk.models.text_data import padded
from pqk.task.classes import IGNORED
from pqk.task.task import Task

log = logging.getLogger(__name__)

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
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    with quietly() as transformers:
        made = Tokenizer(models.WordLevel({name: i for i, name in enumerate((*SPECIAL, *LETTERS))}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        made.decoder = decoders.Fuse()
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=128,
            model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip


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
    tokenizer, start, losses = letters(), time.monotonic(), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        found = pairs(batch, (seed + 1) * 1_000_003 + step)
        asked, wanted = (
            [torch.tensor(t) for t in tokenizer(found[name])["input_ids"]] for name in ("source", "target")
        )
        ids, mask = padded(asked, 0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = model(input_ids=ids, attention_mask=mask, labels=padded(wanted, IGNORED)[0], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            log.info("step %d of %d, loss %.4f", step + 1, steps, sum(losses[-50:]) / 50)
    model.eval()
    return {"loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": time.monotonic() - start}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = sorter(options.layers, options.width, options.seed)
    notes = train(model, options.steps, options.seed)
    with quietly():
        model.save_pretrained(options.out, safe_serialization=True)
        letters().save_pretrained(options.out)
    said = {key: value for key, value in vars(options).items() if key != "out"}
    (options.out / "training.json").write_text(json.dumps(said | notes, indent=1) + "\n")


if __name__ == "__main__":
    main()
