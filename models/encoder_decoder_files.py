"""What makes an artifact a directory that generates: configurations and the tokenizer beside its two files.

The same directory opens in optimum's `ORTModelForSeq2SeqLM` and in transformers.js, which both look for
`encoder_model.onnx` and `decoder_model_merged.onnx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from pqk.core.attention import Site, attentions_by_kind, encoder_states
from pqk.core.graph import shape
from pqk.errors import Reason
from pqk.models.decoder_files import (
    CHAT,
    CONFIG,
    GENERATION,
    config_document,
    generation_config,
    json_files,
    stored_files,
    why_not_one_cache,
)
from pqk.models.hub import TOKENIZER, read_config
from pqk.task.directory import GeneratingFiles

SPELLING = ("source.spm", "target.spm", "normalizer.json", "preprocessor_config.json")
"""what tokenizers of translating models, and what makes sounds the inputs of one that reads them, are stored in"""
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
        "forced_eos_token_id")  # fmt: skip
LAYERS = {"encoder": ("num_layers", "encoder_layers", "num_hidden_layers"),
          "decoder": ("num_decoder_layers", "decoder_layers")}  # fmt: skip
HEADS = {stack: ("num_heads", f"{stack}_attention_heads", "num_attention_heads") for stack in LAYERS}
HIDDEN_UNITS = {stack: ("d_ff", f"{stack}_ffn_dim") for stack in LAYERS}
"""what configurations call what a stack has of everything; one name may be of both"""
WIDENING = ("fc1", "wi", "wi_0")
"""what models call the first linear layer of a feed-forward network"""


@dataclass(frozen=True)
class EncoderDecoderFiles(GeneratingFiles):
    """Files of a directory that generates, made for a student: name -> contents.

    Where layers differ, config.json says the largest sizes, and all of them under "pqk".
    """

    folder: Path
    """the teacher's directory"""

    def __call__(self, student: nn.Module) -> dict[str, bytes]:
        assert isinstance(student, fx.GraphModule)
        config = read_config(self.folder, "encoder_decoder")
        documents = {
            CONFIG: student_config(config, student),
            GENERATION: generation_config(self.folder, config, ENDS),
        }
        return {**json_files(documents), **stored_files(self.folder, (*TOKENIZER, CHAT, *SPELLING))}

    @property
    def tokens(self) -> int:
        """How many tokens of targets the directory's model knows."""
        config = read_config(self.folder, "encoder_decoder")
        return int(getattr(config, "decoder_vocab_size", None) or config.vocab_size)

    def why_not_everywhere(self, student: nn.Module) -> Reason | None:
        """Why not every tool that takes such a directory can run the student, else None."""
        assert isinstance(student, fx.GraphModule)
        config, parts = read_config(self.folder, "encoder_decoder"), attentions_by_kind(student)
        kept = [*parts.decoder, *parts.cross]
        width, residual = shape(kept[0].key)[3], shape(encoder_states(parts.cross))[-1]
        heads = [_heads(site) for site in kept]
        assert width is not None and residual is not None
        derived = None if hasattr(config, "d_kv") else residual / max(heads)
        return why_not_one_cache(heads, width, derived, "pqk can run it")


def student_config(config: Any, student: fx.GraphModule) -> dict[str, Any]:
    """The configuration of the teacher with the sizes of a captured student, in float or in integers."""
    parts = attentions_by_kind(student)
    sites = {"encoder": parts.encoder, "decoder": parts.decoder}
    width, logits = shape(encoder_states(parts.cross))[-1], student.graph.output_node().args[0]
    assert isinstance(logits, fx.Node) and width is not None
    rows = {stack: [{"heads": _heads(site)} for site in sites[stack]] for stack in sites}
    for stack, layers in rows.items():
        _set(config, LAYERS[stack], len(layers))
        for layer, units in zip(layers, _hidden_units(student, stack, width), strict=False):
            layer["intermediate"] = units
    for names, key in ((HEADS, "heads"), (HIDDEN_UNITS, "intermediate")):
        for stack, layers in rows.items():
            _set(config, names[stack], max((layer[key] for layer in layers if key in layer), default=None))
    _set(config, ("d_model",), width)
    _set(config, ("vocab_size", "decoder_vocab_size"), shape(logits)[-1])
    document = config_document(config)
    if any(layer != layers[0] for layers in rows.values() for layer in layers):
        document["pqk"] = rows
    return document


def _set(config: Any, names: Sequence[str], value: int | None) -> None:
    """Set those of these names that a configuration has."""
    for name in names:
        if value is not None and name in config.to_dict():
            setattr(config, name, value)


def _hidden_units(student: fx.GraphModule, stack: str, width: int) -> list[int]:
    """The hidden units of each feed-forward network of a stack, in the order of its layers."""
    found = []
    for name, tensor in student.state_dict().items():
        path, _, weight = name.rpartition(".")
        ours = (
            f"{stack}." in path
            and path.rpartition(".")[2] in WIDENING
            and weight.startswith("weight")
            and "scale" not in weight
        )
        if ours and tensor.ndim == 2:  # turned or not, in integers and in float
            found.append(next((size for size in tensor.shape if size != width), width))
        elif ours and tensor.ndim == 3:  # in blocks
            found.append(tensor.shape[0])
    return found


def _heads(site: Site) -> int:
    found = shape(site.key)[1]
    assert found is not None
    return found
