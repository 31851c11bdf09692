"""Text encoders of Hugging Face: a directory in, a module between plain tensors out, and a directory again at the end.

Attention is the eager one: captured, it is matrix products, a scale, the mask as one addend of [B, 1, 1, S], and a
softmax, each of which passes and runtimes know. Needs `pip install 'pqk[encoders]'`; nothing else in pqk does.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import InputError, first_line, nearest
from pqk.models.hub import (
    TOKENIZER,
    UNSAID,
    find_directory,
    layer_weights,
    quietly,
    read_config,
    read_model,
    stored_shapes,
)

KINDS = ("classification", "regression", "embedding")
INPUTS = ("input_ids", "attention_mask")
FREE = {name: {0: "batch", 1: "sequence"} for name in INPUTS}
SAID = {
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_size": "dim",
}
"""sizes in a config.json: their usual names, and what DistilBERT calls them"""
SHIFTED = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "ibert", "xmod",
    "longformer", "mpnet", "esm",
)  # fmt: skip
"""families that count positions from behind the padding token"""
QUERY = re.compile(r"(^|\.)(query|q_lin|q_proj|query_proj|q)$")


class Encoder(nn.Module):
    """A model of `transformers` between tensors: `input_ids` and `attention_mask` (0: padding), int64 [B, S].

    Classification and regression give logits [B, C]; embedding gives `sentence_embedding` [B, D], the mean over the
    tokens at length 1 (Reimers and Gurevych 2019, arXiv:1908.10084), and `last_hidden_state` [B, S, D], which is what
    readers of feature extraction pool themselves.
    """

    segment: Tensor | None

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model = model
        # All tokens are of the first segment: as a constant, its embedding is one row that capture computes once.
        known = "token_type_ids" in inspect.signature(model.forward).parameters
        self.register_buffer("segment", torch.zeros(1, 1, dtype=torch.int64) if known else None, persistent=False)
        self.pooling = MeanOfTokens() if kind == "embedding" else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | dict[str, Tensor]:
        more = {} if self.segment is None else {"token_type_ids": self.segment}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        if self.pooling is None:
            return output.logits
        states = output.last_hidden_state
        return {"sentence_embedding": self.pooling(states, attention_mask), "last_hidden_state": states}


class MeanOfTokens(nn.Module):
    """The mean of states [B, S, D] over the tokens of a mask [B, S], at length 1: [B, D].

    A module, so that terms that compare features (cosines, relations between texts) can name it: `point = "pooling"`.
    """

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1.0), dim=-1)


def encoder(
    directory: str | Path,
    task: str = "classification",
    labels: int | Sequence[str] | None = None,
    data: str | Path | None = None,
) -> Encoder:
    """The trained encoder in a Hugging Face directory, in eval mode, in float32.

    Args:
        directory: config.json, *.safetensors and a tokenizer; `package:NAME/FOLDER` is a folder of a Python package.
        task: "classification", "regression" or "embedding".
        labels: how many classes the head must have, or their names in order.
        data: a folder that `directory` is looked up in, beside the current one.

    Raises `InputError` for a directory that is incomplete or holds pickled weights only, a decoder, a head that is
    not the task's or was never trained, labels that are not the head's, and embeddings that are no mean over tokens.
    """
    model, _ = load(find_directory(directory, None if data is None else Path(data)), task, labels)
    return Encoder(model, task).eval()


def load(
    folder: Path, task: str, labels: int | Sequence[str] | None = None, *, new_head: bool = False
) -> tuple[nn.Module, Any]:
    """(model, its configuration) of `transformers`. `new_head` gives an untrained head of `labels`, to be trained.

    Raises `InputError` as `encoder` does.
    """
    if task not in KINDS:
        raise InputError(f'encoder: unknown task "{task}"{nearest(task, KINDS)}')
    config = read_config(folder, "encoder")
    with quietly() as transformers:
        _refuse_decoders(config, folder)
        if task == "embedding":
            _refuse_other_pooling(folder)
        else:
            _set_labels(config, task, labels, folder, new_head)
        kind = transformers.AutoModel if task == "embedding" else transformers.AutoModelForSequenceClassification
        model, missing = read_model(kind, folder, config, "encoder", ignore_mismatched_sizes=new_head)
    untrained = [name for name in missing if not (task == "embedding" and name.startswith("pooler"))]
    if untrained and not new_head:
        raise InputError(
            f"encoder: {folder} ({', '.join(config.architectures or ['no architecture'])}) has no trained head for "
            f"{task}: {', '.join(untrained[:4])} would be random; fine-tune it first (python -m pqk.models.finetune)"
        )
    if task == "embedding" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads the first token only, for a head that is not there
    return model.float().eval(), config


def positions(config: Any) -> int:
    """How many tokens the model has positions for."""
    most = getattr(config, "max_position_embeddings", None) or 512
    return most - (config.pad_token_id or 0) - 1 if config.model_type in SHIFTED else most


# ---- out


@dataclass(frozen=True)
class HubFiles:
    """What makes an artifact a Hugging Face directory beside its model.onnx: a configuration and the tokenizer.

    Called with the student, whose sizes the configuration says. Where its layers differ, it says the largest, and all
    of them under "pqk".
    """

    folder: Path
    task: str

    def __call__(self, student: nn.Module) -> dict[str, bytes]:
        config = json.loads((self.folder / "config.json").read_text())
        for name in UNSAID:
            config.pop(name, None)
        config.update(self._sizes(student, config))
        whole = {name: self.folder / name for name in TOKENIZER if (self.folder / name).is_file()}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return {"config.json": text.encode(), **{name: path.read_bytes() for name, path in whole.items()}}

    def _sizes(self, student: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
        """The sizes of `student` by their names in `config`, found by holding its weights against the teacher's."""
        names = {usual: usual if usual in config else own for usual, own in SAID.items()}
        if any(name not in config for name in names.values()):
            return {}
        was = {usual: config[name] for usual, name in names.items()}
        first = {tail: shape for _, tail, shape in layer_weights(stored_shapes(self.folder)) if len(shape) == 2}
        wide = {t for t, s in first.items() if s == (was["intermediate_size"], was["hidden_size"])}
        depth, ffn, heads, width = set(), {}, {}, set()
        for layer, tail, shape in layer_weights({k: tuple(t.shape) for k, t in student.state_dict().items()}):
            depth.add(layer)
            if tail in wide and len(shape) == 2:
                ffn[layer] = shape[0]
                width.add(shape[1])
            if QUERY.search(tail) and len(shape) == 2:
                heads[layer] = shape[0] * was["num_attention_heads"] // was["hidden_size"]
        if not depth or len(width) != 1 or ffn.keys() != depth or heads.keys() != depth:
            return {}  # a family that shares or names its layers in its own way keeps what it said
        now = (len(depth), max(heads.values()), max(ffn.values()), width.pop())
        sizes: dict[str, Any] = dict(zip(names.values(), now, strict=True))
        if len(set(ffn.values())) > 1 or len(set(heads.values())) > 1:
            sizes["pqk"] = {"layers": [{"heads": heads[i], "intermediate": ffn[i]} for i in sorted(depth)]}
        return sizes


# ---- what is refused


def _refuse_decoders(config: Any, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as BIDIRECTIONAL

    kind = f"{folder} is a {config.model_type} ({', '.join(config.architectures or [])})"
    if config.is_encoder_decoder:
        raise InputError(f"encoder: {kind}, an encoder and a decoder; pqk.models.encoder_decoder takes those")
    if getattr(config, "is_decoder", False) or config.model_type not in BIDIRECTIONAL:
        raise InputError(
            f"encoder: {kind}, which is not a bidirectional text encoder such as BERT; pqk.models.decoder takes causal "
            "models"
        )


def _refuse_other_pooling(folder: Path) -> None:
    """Raises `InputError` where sentence-transformers' own file says that an embedding is no mean over tokens."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return
    try:
        pooling = json.loads(path.read_text())
        modes = {k for k, v in pooling.items() if k.startswith("pooling_mode_") and v}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"encoder: {path} is not readable: {first_line(error)}") from error
    if modes - {"pooling_mode_mean_tokens"}:
        raise InputError(
            f"encoder: {path} says {', '.join(sorted(modes))}; only the mean over tokens can be compiled as an "
            "embedding: wrap the model in a module of your own that pools as it does"
        )


def _set_labels(config: Any, task: str, labels: int | Sequence[str] | None, folder: Path, new_head: bool) -> None:
    """Hold `labels` against the head's, or give `config` those of a new head."""
    count = labels if isinstance(labels, int) or labels is None else len(labels)
    if task == "regression":
        count = 1
    if new_head:
        if count is None:
            raise InputError("encoder: a new head needs labels, their number or their names")
        names = [str(i) for i in range(count)] if isinstance(labels, int | None) else list(labels)
        config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        config.problem_type = "regression" if task == "regression" else "single_label_classification"
        return
    if count is not None and count != config.num_labels:
        raise InputError(f"encoder: the head in {folder} has {config.num_labels} labels, and {count} are wanted")
    if task == "classification" and config.problem_type == "multi_label_classification":
        raise InputError(
            f"encoder: the head in {folder} gives several labels to a text (problem_type = "
            "multi_label_classification); a classification has one: write a pqk.Task with a loss and a decision of "
            "your own"
        )
    have = [config.id2label[i] for i in range(config.num_labels)]
    if task == "classification" and isinstance(labels, Sequence) and list(labels) != have:
        differing = next((a, b) for a, b in zip(labels, have, strict=True) if a != b)
        raise InputError(f'encoder: label "{differing[0]}" is called "{differing[1]}" by the head in {folder}')
