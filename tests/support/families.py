"""The encoder families that people have: small ones with random weights, their inputs and tasks, and what applies.

Every model is the one of `transformers`, wrapped so that plain tensors go in and one tensor comes out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.data.data import ArrayData
from pqk.report.markdown import markdown_table
from pqk.task.metrics import Metric
from pqk.task.task import Task

CLASSES, VOCABULARY, TOKENS, IMAGE, PIXELS = 5, 96, 12, 3, 32
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "num_labels": CLASSES, "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "image_size": PIXELS, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "num_labels": CLASSES,
}  # fmt: skip


class Plain(nn.Module):
    """A model of `transformers` called by position; its output is the one of `output`."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return getattr(self.model(**dict(zip(self.names, (x, mask), strict=False))), self.output)


@dataclass(frozen=True)
class Family:
    """How to build one: the model's class, its configuration, the names of what it is given."""

    model: str
    config: str
    settings: dict[str, Any]
    names: tuple[str, ...] = ("input_ids", "attention_mask")
    output: str = "logits"
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]] = field(default=lambda n, g: texts(n, g))

    def teacher(self, attention: str | None = None) -> nn.Module:
        """With random weights that are always the same."""
        import transformers

        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # DeBERTa's module compiles scripts as it is imported
            config, model_class = (getattr(transformers, name) for name in (self.config, self.model))
        settings = config(**self.settings)
        if attention is not None:
            settings._attn_implementation = attention
        model = Plain(model_class(settings), self.names, self.output).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and gains that matter
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.mul_(2.0)
        return model

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, ...]:
        return self.inputs(count, torch.Generator().manual_seed(seed))

    def task(self, teacher: nn.Module, axes: dict[str, dict[int, str]] | None = None) -> Task:
        """32 samples to train on and 16 each to choose and to judge by, labelled by the teacher."""
        inputs = self.sample(64)
        with torch.no_grad():
            labels = decision(teacher(*inputs))
        whole = ArrayData(inputs, labels, 8)
        parts = [whole.subset(torch.arange(*span), augmented=False) for span in ((0, 32), (32, 48), (48, 64))]
        metric = Metric("accuracy", "share", lambda o, t: float((decision(o) == t).double().mean()))
        return Task(
            parts[0],
            parts[2],
            parts[1],
            metric=metric,
            loss=loss,
            decision=decision,
            input_names=self.names,
            dynamic_axes=axes,
        )


def decision(outputs: Tensor) -> Tensor:
    return outputs.flatten(1).argmax(-1)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(1), targets, reduction="none")


def texts(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Token ids and the mask of texts of several lengths, padded at the end."""
    ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator)
    lengths = torch.randint(4, TOKENS + 1, (count, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).long()
    return ids * mask + (1 - mask), mask


def images(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(count, IMAGE, PIXELS, PIXELS, generator=generator),)


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(count, 800, generator=generator),)


def spectra(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(count, 16, 40, generator=generator),)


def _vision(model: str, **settings: Any) -> Family:
    return Family(
        f"{model}ForImageClassification", f"{model}Config", settings or VISION, ("pixel_values",), inputs=images
    )


def _text(model: str, **settings: Any) -> Family:
    return Family(f"{model}ForSequenceClassification", f"{model}Config", TEXT | settings)


RESULTS = Path(__file__).parents[2] / "models" / "results" / "encoder_families.json"
STAGES = {"image_size": PIXELS, "num_labels": CLASSES, "depths": [2, 2], "hidden_act": "gelu"}
FAMILIES: dict[str, Family] = {
    "bert": _text("Bert"),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "num_labels": CLASSES,
         "max_position_embeddings": 40, "pad_token_id": 1},
    ),
    "roberta": _text("Roberta"),
    "electra": _text("Electra", embedding_size=16),
    "albert": _text("Albert", embedding_size=16),
    "mobilebert": _text(
        "MobileBert", embedding_size=16, intra_bottleneck_size=16, hidden_size=32, intermediate_size=32,
        true_hidden_size=16, num_feedforward_networks=2,
    ),
    "mpnet": _text("MPNet"),
    "deberta-v2": _text(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, type_vocab_size=0,
        position_biased_input=False, norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    "clip-text": Family(
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {k: v for k, v in TEXT.items() if k != "num_labels"} | {"projection_dim": 16, "eos_token_id": 2,
                                                                "bos_token_id": 0},
        output="text_embeds",
    ),
    "vit": _vision("ViT"),
    "deit": _vision("DeiT"),
    "swin": _vision("Swin", **STAGES, patch_size=4, embed_dim=16, num_heads=[2, 4], window_size=4),
    "convnext": _vision("ConvNext", num_labels=CLASSES, depths=[2, 2], hidden_sizes=[16, 32], num_stages=2),
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"num_labels": CLASSES, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "strides": [4, 2],
         "patch_sizes": [7, 3], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "num_encoder_blocks": 2,
         "decoder_hidden_size": 32},
        ("pixel_values",),
        inputs=images,
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
         "num_labels": CLASSES, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
         "classifier_proj_size": 32, "vocab_size": VOCABULARY},
        ("input_values",),
        inputs=waves,
    ),
    "whisper": Family(
        "WhisperForAudioClassification",
        "WhisperConfig",
        {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 16,
         "max_source_positions": 20, "num_labels": CLASSES, "vocab_size": VOCABULARY, "decoder_layers": 1,
         "classifier_proj_size": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
         "decoder_start_token_id": 0},
        ("input_features",),
        inputs=spectra,
    ),
}  # fmt: skip
"""every one has three layers (or two stages of two), 32 channels and 4 heads"""


COLUMNS = {
    "heads": "attention heads",
    "units": "hidden units",
    "width": "residual width",
    "layers": "layers",
    "distill": "distill",
    "integer": "integer products",
    "parity": "parity",
    "fuse": "fuse",
}
"""what a row of the results says -> its header"""


def table() -> str:
    """The committed results as Markdown: a row for each family, the reasons of what may not go as footnotes."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return footnoted(found, COLUMNS)


def footnoted(found: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows of results as Markdown, with what a row gives as `reasons` of a column below."""
    notes: dict[str, int] = {}

    def cell(row: dict[str, Any], column: str) -> str:
        numbers = [str(notes.setdefault(reason, len(notes) + 1)) for reason in row["reasons"].get(column, ())]
        value = "–" if row[column] == "0/0" else row[column].replace("/", " of ")
        return f"{value} [{', '.join(numbers)}]" if numbers else value

    rows = [[name, *(cell(row, column) for column in columns)] for name, row in found.items()]
    text = markdown_table(("family", *columns.values()), rows)
    return text + "".join(f"\n\n[{number}] {reason}." for reason, number in notes.items())
