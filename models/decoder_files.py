"""What makes an artifact a directory that generates: configurations and the tokenizer beside its model.onnx.

The same directory opens in onnxruntime-genai (genai_config.json), in optimum's `ORTModelForCausalLM` and in
`transformers.pipeline` on top of it (config.json, generation_config.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from pqk.core.aten import GATHER_NBITS, aten
from pqk.core.attention import SIGHTS, sites
from pqk.core.graph import calls, operand, shape
from pqk.core.onnxruntime_session import IDS, MASK, PAST, PLACES, PRESENT
from pqk.errors import InputError, Reason
from pqk.models.hub import TOKENIZER, UNSAID, layer_weights, quietly, read_config, stored_shapes
from pqk.task.decoder_form import DecoderForm
from pqk.task.directory import GeneratingFiles

CONFIG, GENERATION, GENAI = "config.json", "generation_config.json", "genai_config.json"
CHAT = "chat_template.jinja"
SAID_WIDTH = ("gemma", "gemma3", "gemma3_text")
"""families whose head_dim optimum-onnx 0.1 reads; of others it takes the width over the number of heads"""
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""tokens that a configuration names"""
HIDDEN_UNITS = ("intermediate_size", "n_inner", "ffn_dim")
"""what configurations call the hidden units of a feed-forward network"""
LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class DecoderSizes:
    """What a causal model has of everything, as its graph says; per layer where layers may differ."""

    hidden: int
    vocabulary: int
    head_width: int
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    """of keys and values"""
    intermediate: tuple[int, ...]
    near: tuple[bool, ...]
    """whether a layer sees a window alone"""

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return all(len({*sizes}) < 2 for sizes in (self.heads, self.groups, self.intermediate))


def sizes_of_decoder(student: fx.GraphModule, wide: frozenset[str] = frozenset()) -> DecoderSizes:
    """The sizes of a captured decoder, in float or in integers.

    Args:
        student: `input_ids` and `attention_mask` to logits [B, S, V].
        wide: names, within a layer, of the weights that make or read the hidden units of its feed-forward network.

    Raises:
        InputError: the graph has no attention over embedded tokens.
    """
    found, tables = sites(student), [*calls(student.graph, aten.embedding.default, GATHER_NBITS)]
    if not found or not tables:
        raise InputError("decoder: the student has no attention over embedded tokens, so it is no causal model")
    ends = student.graph.output_node().args[0]
    assert isinstance(ends, fx.Node)
    hidden, near = shape(tables[0])[-1], student.meta.get("points", {}).get(SIGHTS[1])
    intermediate: dict[int, int] = {}
    for layer, tail, size in layer_weights({k: tuple(t.shape) for k, t in student.state_dict().items()}):
        if tail in wide and len(size) == 2:
            intermediate[layer] = next((s for s in size if s != hidden), size[0])
        elif tail in wide and (size[0] != hidden or layer not in intermediate):  # in blocks, which hide what it reads
            intermediate[layer] = size[0]
    return DecoderSizes(
        hidden=_known(hidden),
        vocabulary=_known(shape(ends)[-1]),
        head_width=_known(shape(found[0].key)[3]),
        heads=tuple(_known(shape(site.query)[1]) for site in found),
        groups=tuple(_known(shape(site.key)[1]) for site in found),
        intermediate=tuple(size for _, size in sorted(intermediate.items())),
        near=tuple(near in {n.name for n in _added(operand(site.total, 1))} for site in found),
    )


def _known(size: int | None) -> int:
    assert size is not None
    return size


def _added(seen: fx.Node) -> list[fx.Node]:
    """What is added to the scores of one head of each group, as well as to all of them."""
    return [seen, *(seen.all_input_nodes if seen.target is aten.cat.default else ())]


@dataclass(frozen=True)
class DecoderFiles(GeneratingFiles):
    """Files of a directory that generates, made for a student: name -> contents.

    Where layers differ, config.json says the largest sizes, and all of them under "pqk".
    """

    folder: Path
    """the teacher's directory"""
    longest: int
    """tokens that the student can take"""
    form: DecoderForm = field(default_factory=DecoderForm)
    """how its model.onnx is written"""

    def __call__(self, student: nn.Module) -> dict[str, bytes]:
        assert isinstance(student, fx.GraphModule)
        config = read_config(self.folder, "decoder")
        with quietly():
            sizes = sizes_of_decoder(student, self._wide(config))
            generation = generation_config(self.folder, config, ENDS)
            documents = {
                CONFIG: self._config(config, sizes),
                GENERATION: generation,
                GENAI: genai_config(
                    config, sizes, generation, self.longest, shared_buffer=self.form.attention == "grouped"
                ),
            }
        return {**json_files(documents), **stored_files(self.folder, (*TOKENIZER, CHAT))}

    @property
    def tokens(self) -> int:
        """How many tokens the directory's model knows."""
        return int(read_config(self.folder, "decoder").get_text_config().vocab_size)

    def why_not_everywhere(self, student: nn.Module) -> Reason | None:
        """Why not every tool that takes such a directory can run the student, else None."""
        assert isinstance(student, fx.GraphModule)
        config = read_config(self.folder, "decoder")
        with quietly():
            sizes = sizes_of_decoder(student, self._wide(config))
        width = None if config.model_type in SAID_WIDTH else sizes.hidden / max(sizes.heads)
        return why_not_one_cache(sizes.groups, sizes.head_width, width, "pqk and onnxruntime-genai can run it")

    def _wide(self, config: Any) -> frozenset[str]:
        """The names of the weights whose one side is the hidden units."""
        inner = {getattr(config, "intermediate_size", None), 4 * config.hidden_size} - {None}
        first = [(t, s) for layer, t, s in layer_weights(stored_shapes(self.folder)) if layer == 0 and len(s) == 2]
        return frozenset(t for t, s in first if config.hidden_size in s and inner & {*s})

    def _config(self, config: Any, sizes: DecoderSizes) -> dict[str, Any]:
        config.num_hidden_layers = len(sizes.heads)
        config.num_attention_heads, config.hidden_size = max(sizes.heads), sizes.hidden
        config.vocab_size = sizes.vocabulary
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = max(sizes.groups)
        if hasattr(config, "head_dim"):
            config.head_dim = sizes.head_width
        for name in HIDDEN_UNITS:
            if sizes.intermediate and hasattr(config, name):
                setattr(config, name, max(sizes.intermediate))
        if getattr(config, "layer_types", None) and len({*config.layer_types}) > 1:
            config.layer_types = [LAYER_KINDS[is_near] for is_near in sizes.near]
        elif getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * len(sizes.heads)
        document = config_document(config)
        if not sizes.uniform:
            rows = zip(sizes.heads, sizes.groups, sizes.intermediate, strict=False)
            document["pqk"] = {"layers": [{"heads": h, "groups": g, "intermediate": i} for h, g, i in rows]}
        return document


def config_document(config: Any) -> dict[str, Any]:
    """What a configuration says in config.json, without code and without the folder that it was read from."""
    document: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in document.items() if name not in UNSAID}


def why_not_one_cache(heads: Sequence[int], width: int, derived: float | None, others: str) -> Reason | None:
    """Why some tools cannot make an empty cache for a model's layers, else None.

    Args:
        heads: those of keys and values, layer by layer.
        width: of a head.
        derived: what optimum takes for it, the model's width over its heads; None where it reads what it is.
        others: what can run it all the same.
    """
    if len({*heads}) > 1:
        return (
            "optimum, transformers.pipeline and transformers.js make the empty cache of all layers by one number of "
            f"heads, and this student's keep keys and values of {min(heads)} to {max(heads)}; {others}. For those "
            'tools leave out whole layers or hidden units, or prune heads with scope = "uniform"'
        )
    if derived is not None and derived != width:
        return (
            "optimum, and transformers.pipeline with it, take the model's width over the number of heads for the width "
            f"of a head, {derived:.4g}, and this student's are {width} wide; {others}. For those tools leave heads and "
            "the residual width whole, or cut both alike"
        )
    return None


def generation_config(folder: Path, config: Any, ends: Sequence[str]) -> dict[str, Any]:
    """How the directory of a model says that it generates; where it does not, the tokens at the ends.

    Args:
        folder: the model's directory.
        config: its configuration.
        ends: what the tokens at the ends are called there.
    """
    if (folder / GENERATION).is_file():
        found: dict[str, Any] = json.loads((folder / GENERATION).read_text())
        return found
    tokens = {name: getattr(config, name, None) for name in ends}
    return {name: token for name, token in tokens.items() if token is not None}


def ends_of_texts(folder: Path, config: Any) -> frozenset[int]:
    """The tokens that end the texts of the model in a folder."""
    return token_ids(generation_config(folder, config, ENDS).get("eos_token_id", getattr(config, "eos_token_id", None)))


def token_ids(said: int | list[int] | None) -> frozenset[int]:
    """The tokens that a configuration names: none, one or several."""
    return frozenset(said if isinstance(said, list) else [] if said is None else [said])


def stored_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Those of the files of these names that are in a folder: name -> contents."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def json_files(documents: Mapping[str, Any]) -> dict[str, bytes]:
    """Documents as JSON files: name -> contents."""
    return {n: (json.dumps(d, indent=2, ensure_ascii=False) + "\n").encode() for n, d in documents.items()}


def genai_config(
    config: Any, sizes: DecoderSizes, generation: dict[str, Any], longest: int, *, shared_buffer: bool = False
) -> dict[str, Any]:
    """The document by which onnxruntime-genai (0.18) runs model.onnx.

    `shared_buffer`: new keys and values are written into one buffer with those before, which `GroupQueryAttention` can.
    """
    tokens = {name: generation.get(name, getattr(config, name, None)) for name in ("bos_token_id", "eos_token_id")}
    ends = tokens["eos_token_id"]
    last = ends[0] if isinstance(ends, list) else ends
    padding = generation.get("pad_token_id", getattr(config, "pad_token_id", None))
    tokens["pad_token_id"] = last if padding is None else padding
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": sizes.head_width,
        "hidden_size": sizes.hidden,
        "num_attention_heads": max(sizes.heads),
        "num_hidden_layers": len(sizes.heads),
        "num_key_value_heads": max(sizes.groups),
        "inputs": {
            "input_ids": IDS,
            "attention_mask": MASK,
            "position_ids": PLACES,
            "past_key_names": f"{PAST}%d.key",
            "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}%d.key",
            "present_value_names": f"{PRESENT}%d.value",
        },
    }
    known = {name: token for name, token in tokens.items() if token is not None}
    model = {"type": "decoder", **known, "context_length": longest, "vocab_size": sizes.vocabulary, "decoder": decoder}
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": longest,
        "num_beams": 1,
        "past_present_share_buffer": shared_buffer,
        "temperature": float(generation.get("temperature") or 1.0),
        "top_k": int(generation.get("top_k") or 50),
        "top_p": float(generation.get("top_p") or 1.0),
        "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
    }
    return {"model": model, "search": search}
