"""Encoder-decoder models of Hugging Face (T5, BART, Marian, Whisper …): a directory in, a module between tensors out.

An encoder reads a source once, and a decoder generates the target token by token. Positions and masks of the target are
computed here, by modules of their own (`QueryPositions`, `KeyPositions`, `CausalMask`), and attention is two products
of four axes: captured, a graph that can be split into the two files that run (`pqk.deploy.two_files`). Needs
`pip install 'pqk[encoders]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.models.decoder import UNSEEN, check_same, grouped_attention, use_attention
from pqk.models.hub import check_ends, find_directory, quietly, read_config, read_trained

SOURCE = ("input_ids", "attention_mask")
SOUNDS = ("input_features",)
AXES = {
    "input_ids": {0: "batch", 1: "source"},
    "attention_mask": {0: "batch", 1: "source"},
    "input_features": {0: "batch"},
    "decoder_input_ids": {0: "batch", 1: "target"},
    "decoder_attention_mask": {0: "batch", 1: "target"},
}
"""free axes by input"""
ATTENTION = "pqk-masked"
"""the name under which `transformers` knows `masked_attention`"""
ATTENTIONS = ("self_attn", "encoder_attn", "SelfAttention", "EncDecAttention")
CROSS_ATTENTIONS, T5_ATTENTIONS = ("encoder_attn", "EncDecAttention"), ("SelfAttention", "EncDecAttention")
"""what models call theirs"""
SOURCE_SAMPLE, TARGET_SAMPLE = 12, 7
"""tokens of each that a model is compared on with `transformers`' own attention"""


class QueryPositions(nn.Module):
    """The position of each target token that is computed: int64 [T] of ids [B, T]."""

    def forward(self, decoder_input_ids: Tensor) -> Tensor:
        return torch.arange(decoder_input_ids.shape[1], device=decoder_input_ids.device)


class KeyPositions(nn.Module):
    """The position of each target token that may be attended to: int64 [T] of a mask [B, T].

    Equal to `QueryPositions` in a graph of whole targets, and not in one with a cache: computed otherwise, as equal
    nodes of a graph would become one.
    """

    def forward(self, decoder_attention_mask: Tensor) -> Tensor:
        return torch.arange(1, decoder_attention_mask.shape[1] + 1, device=decoder_attention_mask.device) - 1


class CausalMask(nn.Module):
    """What is added to the scores of the decoder's self-attention: float32 [1, 1, T, T], 0 from a token back.

    Padding stands behind the target, so no token of it attends to padding.
    """

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.where((queries[:, None] - keys[None, :] >= 0)[None, None], 0.0, UNSEEN)


class SourceMask(nn.Module):
    """What is added to the scores of attention to the source: float32 [B, 1, 1, S], 0 except for padding."""

    def forward(self, attention_mask: Tensor) -> Tensor:
        return torch.where(attention_mask[:, None, None, :] > 0, 0.0, UNSEEN)


class RelativePositionBias(nn.Module):
    """What T5 adds to the scores of a stack's self-attention, by the distance of two tokens: float32 [1, H, Q, K].

    Of int64 positions [Q] and [K]. Distances fall into buckets, and are all the same from `farthest` on (Raffel et al.
    2020, "Exploring the Limits of Transfer Learning", section 2.1).

    Args:
        attention: the self-attention of the stack's first layer, which has the table.
    """

    buckets: Tensor
    """int64 [2 * farthest + 1], by distance"""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.table: nn.Embedding = attention.relative_attention_bias
        farthest = attention.relative_attention_max_distance
        buckets = attention._relative_position_bucket(  # the one place where its definition stands
            torch.arange(-farthest, farthest + 1), not attention.is_decoder,
            attention.relative_attention_num_buckets, farthest,
        )  # fmt: skip
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        farthest = len(self.buckets) // 2
        distances = (keys[None, :] - queries[:, None]).clamp(-farthest, farthest)
        bias: Tensor = self.table(self.buckets[distances + farthest])
        return bias.permute(2, 0, 1)[None]


class ScoreMask:
    """What attentions of one kind add to their scores in the call that runs, which `transformers` does not hand on."""

    def __init__(self) -> None:
        self.added: Tensor | None = None


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B, H, T, D] to key and value [B, H, S, D]: [B, T, H, D], as `transformers` calls it.

    What is added to scores is the module's own (`ScoreMask`), and not what `transformers` makes of masks.
    """
    mask = module.score_mask
    assert isinstance(mask, ScoreMask)
    return grouped_attention(module, query, key, value, mask.added, scaling)


class T5Attention(nn.Module):
    """Attention of T5 with its own parameters, by `grouped_attention`: its scores are not scaled.

    Args:
        attention: that of `transformers`, whose table of positions is read elsewhere (`RelativePositionBias`).
        mask: what is added to its scores.
    """

    def __init__(self, attention: Any, mask: ScoreMask) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = attention.q, attention.k, attention.v, attention.o
        self.width, self.score_mask = attention.key_value_proj_dim, mask

    def forward(
        self, hidden_states: Tensor, mask: Any = None, key_value_states: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """[B, T, C] of hidden states [B, T, C], and no bias for `transformers` to give the next layers."""
        source = hidden_states if key_value_states is None else key_value_states
        projected = (self.q(hidden_states), self.k(source), self.v(source))
        query, key, value = (x.unflatten(2, (-1, self.width)).transpose(1, 2) for x in projected)
        found, _ = grouped_attention(self, query, key, value, self.score_mask.added, 1.0)
        return self.o(found.flatten(2)), None


def encoder_decoder(directory: str | Path, data: str | Path | None = None) -> EncoderDecoder:
    """The trained encoder-decoder model in a Hugging Face directory, in eval mode, in float32.

    Args:
        directory: config.json, *.safetensors and a tokenizer; `package:NAME/FOLDER` is a folder of a Python package.
        data: a folder that `directory` is looked up in, beside the current one.

    Raises `InputError` for a directory that is incomplete or holds pickled weights only, or has no encoder and decoder.
    """
    what = "encoder_decoder"
    folder = find_directory(directory, None if data is None else Path(data), what)
    config = encoder_decoder_config(folder)
    with quietly() as transformers:
        kind = transformers.AutoModelForSpeechSeq2Seq if reads_sounds(config) else transformers.AutoModelForSeq2SeqLM
        model = read_trained(kind, folder, config, what)
    return EncoderDecoder(model).eval()


def encoder_decoder_config(folder: Path) -> Any:
    """The configuration in `folder`. Raises `InputError` where it is not readable or has no encoder and decoder."""
    config = read_config(folder, "encoder_decoder")
    if not config.is_encoder_decoder:
        raise InputError(
            f"encoder_decoder: {folder} is a {config.model_type}, which has no encoder and decoder; "
            "pqk.models.decoder takes causal models, pqk.models.encoder those that classify"
        )
    check_ends(folder, config, "encoder_decoder")
    return config


def reads_sounds(config: Any) -> bool:
    """Whether a model reads sounds, [B, 80, 3000] or as its configuration says, and no tokens."""
    return hasattr(config, "num_mel_bins")


class EncoderDecoder(nn.Module):
    """An encoder-decoder model of `transformers` between plain tensors.

    `input_ids` and `attention_mask` int64 [B, S], or `input_features` float32 [B, M, F] of a model that reads sounds,
    and `decoder_input_ids` and `decoder_attention_mask` int64 [B, T], to logits float32 [B, T, V]. In the source's mask
    padding is 0; targets are padded behind, where no token attends to padding, and only the length of their mask is
    read. Raises `InputError` for a model whose attention cannot be replaced, or which then computes other logits.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.kind = model.eval(), model.config.model_type
        self.reads_sounds = reads_sounds(model.config)
        sample = self._sample()
        with quietly(), torch.no_grad():
            expected = self._expected(sample)
        self.queries, self.keys = QueryPositions(), KeyPositions()
        self.causal_mask, self.source_mask = CausalMask(), SourceMask()
        self.encoder_bias: RelativePositionBias | None = None
        self.decoder_bias: RelativePositionBias | None = None
        self.in_encoder, self.in_decoder, self.across = ScoreMask(), ScoreMask(), ScoreMask()
        """for self-attention of the encoder and of the decoder, and for cross-attention"""
        self._replace_attention()
        check_same(self, sample, expected, f"encoder_decoder: {self.kind}")

    def forward(self, *inputs: Tensor) -> Tensor:
        *source, ids, mask = inputs
        queries, keys = self.queries(ids), self.keys(mask)
        try:
            if not self.reads_sounds:
                self.across.added = self.source_mask(source[1])
                positions = torch.arange(source[0].shape[1], device=ids.device)
                self.in_encoder.added = _biased(self.across.added, self.encoder_bias, positions, positions)
            self.in_decoder.added = _biased(self.causal_mask(queries, keys), self.decoder_bias, queries, keys)
            hidden = self.model.get_encoder()(source[0])[0]
            output = self.model(
                encoder_outputs=(hidden,), decoder_input_ids=ids, cache_position=queries, use_cache=False
            )
        finally:
            for kind in (self.in_encoder, self.in_decoder, self.across):
                kind.added = None  # no tensor of a call outlives it
        logits: Tensor = output.logits
        return logits

    def _sample(self) -> tuple[Tensor, ...]:
        config = self.model.config
        ids = torch.arange(2 * SOURCE_SAMPLE).reshape(2, -1) % config.vocab_size
        target = torch.arange(2 * TARGET_SAMPLE).reshape(2, -1) % config.vocab_size
        masks = [torch.ones_like(t) for t in (ids, target)]
        masks[0][1, SOURCE_SAMPLE // 2 :] = 0
        if not self.reads_sounds:
            return ids, masks[0], target, masks[1]
        frames = 2 * config.max_source_positions
        wave = torch.arange(2 * config.num_mel_bins * frames).float().sin().reshape(2, config.num_mel_bins, frames)
        return wave, target, masks[1]

    def _expected(self, sample: tuple[Tensor, ...]) -> Tensor:
        """The logits of `transformers`' own attention."""
        *source, ids, mask = sample
        names = SOUNDS if self.reads_sounds else SOURCE
        named = dict(zip(names, source, strict=True))
        logits: Tensor = self.model(**named, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False).logits
        return logits

    def _replace_attention(self) -> None:
        """Give every attention its mask, and T5's another form. Raises `InputError` where there is none to find."""
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
        parts = [
            *((encoder, path, self.in_encoder) for path, _ in encoder.named_modules()),
            *((decoder, path, self.in_decoder) for path, _ in decoder.named_modules()),
        ]
        found = [(stack, path, kind) for stack, path, kind in parts if path.rpartition(".")[2] in ATTENTIONS]
        if not found:
            raise InputError(f"encoder_decoder: {self.kind} names its attention in no way that is known here")
        for stack, path, kind in found:
            module, (before, _, name) = stack.get_submodule(path), path.rpartition(".")
            mask = self.across if name in CROSS_ATTENTIONS else kind
            if name in T5_ATTENTIONS:
                _keep_whole(stack.get_submodule(before.rpartition(".layer.")[0]))
                setattr(stack.get_submodule(before), name, T5Attention(module, mask))
                if module.has_relative_attention_bias:
                    bias = RelativePositionBias(module)
                    self.encoder_bias, self.decoder_bias = (
                        (bias, self.decoder_bias) if stack is encoder else (self.encoder_bias, bias)
                    )
            else:
                module.score_mask = mask
        if not any(isinstance(module, T5Attention) for module in self.model.modules()):
            use_attention(self.model, ATTENTION, masked_attention, f"encoder_decoder: {self.kind}")


def _keep_whole(block: Any) -> None:
    """Has pruning take a layer of T5 out as a whole: a cache has keys and values of both attentions of each."""
    for part in block.layer:
        part.why_not_removed = "a layer of T5 goes as a whole"


def _biased(mask: Tensor, bias: RelativePositionBias | None, queries: Tensor, keys: Tensor) -> Tensor:
    return mask if bias is None else mask + bias(queries, keys)
