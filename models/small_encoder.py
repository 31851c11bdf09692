"""Small text encoders, as students that are not cut out of their teacher: one or two layers over a table of tokens.

A layer costs the start of each of its operators, whatever its width: few layers are what makes short texts fast.
Family, tokenizer, positions and the head's labels are the teacher's, so the artifact is a Hugging Face directory as the
teacher's is; layers, width and hidden units are not. Needs `pip install 'pqk[encoders]'`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.models.encoder import SAID, Encoder
from pqk.models.hub import quietly


def small_encoder(
    teacher: Encoder,
    *,
    layers: int = 1,
    width: int | None = None,
    hidden: int | None = None,
    table: Literal["teacher", "random"] = "teacher",
) -> Encoder:
    """A fresh encoder of the teacher's family, with fewer and narrower layers, for the same texts and outputs.

    In a recipe: `[student]` with `factory = "pqk.models.small_encoder:small_encoder"`; it gets the teacher.

    Args:
        teacher: what `pqk.models.encoder.encoder` gives: `input_ids` and `attention_mask`, int64 [B, S], to logits
            [B, C] or embeddings.
        layers: encoder layers.
        width: channels of the residual stream, whole heads of the teacher's size; the teacher's if None. An embedding
            has as many channels as its states, so there it must be the teacher's.
        hidden: units between the two linear layers of a layer; twice the width if None.
        table: what the table of tokens begins as: the teacher's, in its first principal components where the student
            is narrower, or random.

    Returns:
        The student, in eval mode; everything but the table has random weights.

    Raises:
        InputError: the teacher is no such encoder or of a family that names its sizes in another way, a size does not
            fit, or transformers is not installed.
    """
    if not isinstance(teacher, Encoder):
        raise InputError(f"small_encoder: the teacher is a {type(teacher).__name__}, not one of pqk.models.encoder")
    if table not in ("teacher", "random"):
        raise InputError(f'small_encoder: table="{table}" is neither "teacher" nor "random"')
    was: Any = teacher.model.config
    known = was.to_dict()
    names = {usual: usual if usual in known else own for usual, own in SAID.items()}
    if missing := [usual for usual, name in names.items() if name not in known]:
        raise InputError(f"small_encoder: a {was.model_type} does not say its {', '.join(missing)}")
    full, heads = known[names["hidden_size"]], known[names["num_attention_heads"]]
    width = full if width is None else width
    hidden = 2 * width if hidden is None else hidden
    if min(layers, width, hidden) < 1 or width % (full // heads):
        raise InputError(
            f"small_encoder: layers={layers}, width={width} and hidden={hidden} must be 1 or more, and the width whole "
            f"heads of {full // heads}"
        )
    if teacher.pooling is not None and width != full:
        raise InputError(
            f"small_encoder: width={width}, and the teacher's embeddings have {full} channels: an embedding's student "
            "is as wide as its teacher; make it faster by layers and hidden"
        )
    sizes = (layers, width * heads // full, hidden, width)
    model = _untrained(teacher.model, dict(zip(names.values(), sizes, strict=True)))
    if table == "teacher":
        _fill_table(model, teacher.model)
    return Encoder(model, "embedding" if teacher.pooling is not None else "classification").eval()


def _untrained(model: Any, sizes: dict[str, int]) -> nn.Module:
    """A model of the same class and configuration but for these sizes, with random weights."""
    with quietly():
        config = type(model.config).from_dict({**model.config.to_dict(), **sizes})
        config._attn_implementation = "eager"
        fresh: Any = type(model)(config)
    if getattr(model, "pooler", fresh) is None:  # reads the first token only, for a head that is not there
        fresh.pooler = None
    untrained: nn.Module = fresh.float()
    return untrained


@torch.no_grad()
def _fill_table(model: nn.Module, teacher: nn.Module) -> None:
    """Copy the teacher's table of tokens into the student's, as many principal components of it as fit."""
    ours, theirs = (m.get_input_embeddings().weight for m in (model, teacher))  # type: ignore[operator]
    ours.copy_(principal_components(theirs, ours.shape[1]))


def principal_components(rows: Tensor, count: int) -> Tensor:
    """`rows` [N, D] in the `count` directions in which they are largest: [N, count]; themselves where that is D.

    No other `count` directions keep more of the rows' products with each other. Each direction's largest entry is
    positive, so that the same rows always give the same values.
    """
    if not 1 <= count <= rows.shape[1]:
        raise InputError(f"small_encoder: {count} channels of a table that has {rows.shape[1]}")
    if count == rows.shape[1]:
        return rows
    wide = rows.double()
    _, directions = torch.linalg.eigh(wide.T @ wide)  # the largest last
    chosen = directions[:, -count:].flip(1)
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    return (wide @ (chosen * largest.sign())).to(rows.dtype)
