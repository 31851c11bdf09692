"""Hugging Face directories of tiny encoders with random weights, and texts for them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    "a", "good", "bad", "film", "card", "my", "is", "not", "the", "lost", "where", "very",
)  # fmt: skip
"""of which a tokenizer makes one token each"""
LABELS = ("bad", "good", "card")


def directory(folder: Path, kind: str = "SequenceClassification", **changes: Any) -> Path:
    """A BERT of two layers, 16 wide, with the configuration, tokenizer and safetensors of its kind of head."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {
        "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 24, "id2label": dict(enumerate(LABELS)),
        "label2id": {name: i for i, name in enumerate(LABELS)},
    } | changes  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=24)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        model = getattr(transformers, f"Bert{kind}" if kind == "Model" else f"BertFor{kind}")(
            transformers.BertConfig(**settings)
        )
        with torch.no_grad():
            for p in model.parameters():  # BERT starts so near to zero that every text means the same
                p.add_(0.3 * torch.randn_like(p))
        model.eval().save_pretrained(folder, safe_serialization=True)
    return folder


def texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Texts of one to `longest` words."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=g)
    return [" ".join(WORDS[i] for i in torch.randint(5, len(WORDS), (int(n),), generator=g)) for n in lengths]


def write_tsv(path: Path, labels: list[Any], rows: list[str]) -> Path:
    path.write_text("label\ttext\n" + "".join(f"{y}\t{x}\n" for y, x in zip(labels, rows, strict=True)))
    return path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
