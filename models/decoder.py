"""Causal language models of Hugging Face: a directory in, a module between plain tensors out.

What a token sees and where it stands are computed here, by modules of their own (`Sight`, `Positions`), and attention
is two products of four axes: captured, a graph in which the way with a cache can be found and written
(`pqk.deploy.generation`). Needs `pip install 'pqk[encoders]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import InputError, first_line
from pqk.models.hub import check_ends, find_directory, quietly, read_config, read_trained

INPUTS = ("input_ids", "attention_mask")
FREE = {name: {0: "batch", 1: "sequence"} for name in INPUTS}
ATTENTION = "pqk"
"""the name under which `transformers` knows `grouped_attention`"""
SAMPLE, SAME = 12, 1e-3
"""tokens that a model is compared on with `transformers`' own attention, and by how much it may differ"""
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""what configurations call the number of tokens that a model has positions for"""
UNSEEN = -1e9
"""what is added to the scores of what a token does not see: finite, as a row that sees nothing must stay finite"""


class Positions(nn.Module):
    """The place of each token among the tokens of its text, from 0: int64 [B, S] of a mask [B, S]."""

    def forward(self, attention_mask: Tensor) -> Tensor:
        there = attention_mask > 0
        count = there.cumsum(1) - 1
        begins = F.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0)) & there
        return (count - (count * begins).cummax(1).values).clamp(min=0)


class Sight(nn.Module):
    """What is added to attention's scores: float32 [B, 1, S, S] of a mask [B, S], 0 where a token sees another.

    A token sees itself and those before it that are no padding (0 in the mask) and of the same text (the same number);
    with a `window`, of those the last so many. Padding sees all texts before it, as it does in a file with a cache.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(self, attention_mask: Tensor) -> Tensor:
        order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        back = order[:, None] - order[None, :]
        seen = (back >= 0) if self.window is None else (back >= 0) & (back < self.window)
        there, own = attention_mask[:, None, None, :], attention_mask[:, None, :, None]
        return torch.where(seen & (there > 0) & ((there == own) | (own == 0)), 0.0, UNSEEN)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B, H, S, D] to key and value [B, G, S, D]: [B, S, H, D], as `transformers` calls it.

    The heads of a group are rows of one product with its keys (Ainslie et al. 2023, "GQA", arXiv:2305.13245), so keys
    are not repeated and no axis of theirs is named.
    """
    batch, heads, length, width = query.shape
    share = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = rows @ key.transpose(2, 3)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:  # else everything is seen
        scores = scores + (attention_mask if share == 1 else torch.cat([attention_mask] * share, 2))
    found = scores.softmax(-1) @ value
    return found.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2), None


def decoder(directory: str | Path, data: str | Path | None = None) -> Decoder:
    """The trained causal model in a Hugging Face directory, in eval mode, in float32.

    Args:
        directory: config.json, *.safetensors and a tokenizer; `package:NAME/FOLDER` is a folder of a Python package.
        data: a folder that `directory` is looked up in, beside the current one.

    Raises `InputError` for a directory that is incomplete or holds pickled weights only, or is no causal model.
    """
    folder = find_directory(directory, None if data is None else Path(data), "decoder")
    config = decoder_config(folder)
    with quietly() as transformers:
        model = read_trained(transformers.AutoModelForCausalLM, folder, config, "decoder")
    return Decoder(model).eval()


def decoder_config(folder: Path) -> Any:
    """The configuration in `folder`. Raises `InputError` where it is not readable or none of a causal model."""
    config = read_config(folder, "decoder")
    with quietly():
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as BIDIRECTIONAL

    if config.is_encoder_decoder:
        raise InputError(
            f"decoder: {folder} is a {config.model_type}, an encoder and a decoder; pqk.models.encoder_decoder takes it"
        )
    if config.model_type in BIDIRECTIONAL and not config.is_decoder:
        raise InputError(
            f"decoder: {folder} is a {config.model_type}, which is no causal model; pqk.models.encoder takes it"
        )
    check_ends(folder, config, "decoder")
    return config


def positions(config: Any) -> int | None:
    """How many tokens a causal model has positions for; None: it has no table of them, as with ALiBi or a state."""
    sizes = (getattr(config, name, None) for name in POSITIONS)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


@torch.no_grad()
def check_same(module: nn.Module, sample: tuple[Tensor, ...], expected: Tensor, what: str) -> None:
    """Raises `InputError` where a model whose attention was replaced computes other logits than `expected`.

    Args:
        module: what computes logits of `sample`.
        expected: those of `transformers`' own attention.
        what: what errors begin with, such as "decoder: llama".
    """
    try:
        with quietly():
            found = module(*sample)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{what} does not run with attention of another kind: {first_line(error)}") from error
    if not bool(expected.isfinite().all()):
        raise InputError(f"{what}'s own logits are NaN or infinite: its weights are not those of a trained model")
    off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not off <= SAME:
        raise InputError(
            f"{what} computes attention by itself, or adds to it what is not known here: with attention of this kind "
            f"its logits differ by {off:.1e} of the largest one (at most {SAME:.0e} may)"
        )


def use_attention(model: Any, name: str, function: Callable[..., Any], what: str) -> None:
    """Has a model of `transformers` compute attention by `function`, which it knows by `name`.

    Raises `InputError`, beginning with `what`, where the model does not let anybody replace it.
    """
    with quietly() as transformers:
        transformers.AttentionInterface.register(name, function)
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            raise InputError(f"{what} computes attention by itself: {first_line(error)}") from error


def linear_layers(model: nn.Module) -> None:
    """Puts linear layers in the place of GPT-2's `Conv1D`, which are the same with the weight turned. In place."""
    with quietly() as transformers:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, transformers.pytorch_utils.Conv1D):
                linear = nn.Linear(layer.nx, layer.nf, device="meta")
                linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), layer.weight.requires_grad)
                linear.bias = layer.bias
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, linear)


class Decoder(nn.Module):
    """A causal model of `transformers`: `input_ids` and `attention_mask` int64 [B, S] to logits [B, S, V].

    In the mask, padding is 0, and a token has the number of its text, which is 1 where a row is one text. Padding
    stands behind the texts or before them. Raises `InputError` for a model whose attention `transformers` does not let
    anybody replace, or which then answers otherwise.
    """

    why_not_traced: ClassVar[str] = "torch-pruning does not come back from rotary embeddings"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()
        kind, sample = model.config.model_type, torch.arange(SAMPLE)[None] % model.config.vocab_size
        with quietly(), torch.no_grad():
            expected = model(input_ids=sample, use_cache=False).logits
            linear_layers(model)
            use_attention(model, ATTENTION, grouped_attention, f"decoder: {kind}")
        self.positions, self.sight = Positions(), Sight()
        kinds = set(getattr(model.config, "layer_types", None) or ())
        window = getattr(model.config, "sliding_window", None)
        if window is not None and not kinds:  # one kind of layer, such as Mistral's
            self.sight = Sight(window)
        self.near = Sight(window) if "sliding_attention" in kinds and "full_attention" in kinds else None
        if kinds == {"sliding_attention"}:
            self.sight = Sight(window)
        check_same(self, (sample, torch.ones_like(sample)), expected, f"decoder: {kind}")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen: Any = self.sight(attention_mask)
        if self.near is not None:
            seen = {"full_attention": seen, "sliding_attention": self.near(attention_mask)}
        output = self.model(
            input_ids=input_ids, attention_mask=seen, position_ids=self.positions(attention_mask), use_cache=False
        )
        logits: Tensor = output.logits
        return logits

    def extend(self, input_ids: Tensor, attention_mask: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Reads on in texts, of which keys and values of the tokens before are kept.

        Args:
            input_ids: int64 [B, S], the new tokens.
            attention_mask: int64 [B, P + S] of all tokens; padding stands before the texts here, which so end alike.
            past: what the call before returned; None: these are the first tokens.

        Returns:
            The scores [B, V] of the token behind the last, and what is kept of all. `past` is written over.
        """
        count = input_ids.shape[1]

        def last(sight: Sight) -> Tensor:
            return sight(attention_mask)[:, :, -count:]

        seen: Any = last(self.sight)
        if self.near is not None:
            seen = {"full_attention": seen, "sliding_attention": last(self.near)}
        if past is None:
            with quietly() as transformers:
                past = transformers.DynamicCache()
        output = self.model(
            input_ids=input_ids,
            attention_mask=seen,
            position_ids=self.positions(attention_mask)[:, -count:],
            past_key_values=past,
            use_cache=True,
        )
        return output.logits[:, -1], output.past_key_values
