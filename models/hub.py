"""Directories of Hugging Face: where they are, what must be in them, and their tokenizers.

Nothing of them is executed, and weights in pickles are refused. Needs `pip install 'pqk[encoders]'`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pqk.data.folders import data_folders
from pqk.errors import InputError, Reason, first_line
from pqk.quiet import quiet

TABLES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model",
    "bpe.codes", "tokenizer.model",
)  # fmt: skip
"""what the tokens of a tokenizer may be stored in"""
TOKENIZER = (*TABLES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""what a tokenizer may be stored in; an artifact gets those that are there"""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.ckpt")
LAYER = re.compile(r"\b(?:layers?|h)\.(\d+)\.(.+)\.weight(?:_u?int\d+)?$")


@contextmanager
def quietly() -> Iterator[Any]:
    """`transformers`, without its advice. Raises `InputError` where it is not installed."""
    with quiet():
        try:
            import transformers
        except ImportError as error:
            raise InputError(f"{error}; install it: pip install 'pqk[encoders]'") from error
        with quiet("transformers", level=logging.ERROR):  # after the import, which sets the level
            yield transformers


def find_directory(name: str | Path, data: Path | None = None, what: str = "encoder") -> Path:
    """The folder `name`: as a path, in the data folder, or in a package. Raises `InputError` where it is nowhere."""
    package, _, inside = str(name).removeprefix("package:").partition("/")
    if str(name).startswith("package:"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{what}: no package {package} for directory {name}; install it")
        places = [Path(spec.submodule_search_locations[0]) / inside]
    else:
        places = [folder / name for folder in (Path(), *data_folders(data))]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InputError(f"{what}: no config.json in {' or '.join(dict.fromkeys(map(str, places)))}")


def need_safetensors(folder: Path, what: str = "encoder") -> None:
    """Raises `InputError`, beginning with `what`, where the weights are missing, or in pickles only."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = [name for name in PICKLES if (folder / name).is_file()]
    if pickled:
        raise InputError(
            f"{what}: {folder} holds its weights in {pickled[0]} only, which can run code when opened; where you "
            "trust it, load it with its own class and save it with save_pretrained(DIR, safe_serialization=True)"
        )
    raise InputError(f"{what}: {folder} has no *.safetensors; copy the whole directory")


UNREADABLE = (Exception,)
"""what `transformers` and `tokenizers` raise for files that they cannot read: whatever it is, as none of it is
documented; seen were a division by zero for no heads, a NameError for weights of GPTQ, and `Exception` itself"""
UNSAID = ("auto_map", "_name_or_path")
"""what a student's config.json does not take over: code, and the folder that the teacher's was read from"""
QUANTIZED = "quantization_config"
"""what a configuration says of weights that are stored in fewer bits"""


def read_part(kind: str, folder: Path, what: str, name: str) -> Any:
    """What an automatic class of `transformers` reads of `folder`.

    Raises `InputError`, beginning with `what` and naming `name`, where it is not readable.
    """
    with quietly() as transformers:
        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except UNREADABLE as error:
            raise InputError(f"{what}: {folder} has no readable {name}: {first_line(error)}") from error


def read_config(folder: Path, what: str) -> Any:
    """The configuration in `folder`. Raises `InputError`, beginning with `what`, where it is not readable."""
    return read_part("AutoConfig", folder, what, "config.json")


def check_ends(folder: Path, config: Any, what: str) -> None:
    """Raises `InputError`, beginning with `what`, where the token that ends texts is none of the model's.

    Args:
        folder: the directory, whose generation_config.json is read, too, where there is one.
        config: its configuration.
        what: what errors begin with.
    """
    said = {"config.json": getattr(config, "eos_token_id", None)}
    if (path := folder / "generation_config.json").is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # who generates from it says that it is broken
            said[path.name] = json.loads(path.read_text()).get("eos_token_id")
    words = getattr(config, "vocab_size", None)
    for name, ends in said.items():
        for token in ends if isinstance(ends, list) else [ends]:
            if token is not None and type(token) is not int:
                raise InputError(
                    f"{what}: {folder / name} says eos_token_id {token!r:.40}, which is no number of a token, nor a "
                    "list of them: no text would ever end; correct it"
                )
            if isinstance(token, int) and isinstance(words, int) and not 0 <= token < words:
                raise InputError(
                    f"{what}: {folder / name} says eos_token_id {token}, and the model has {words} tokens, from 0: no "
                    "text would ever end; correct it to the token that ends texts"
                )


def read_model(kind: Any, folder: Path, config: Any, what: str, **arguments: Any) -> tuple[Any, list[str]]:
    """A trained model of a directory, and the names of its parameters that are not stored there.

    Args:
        kind: one of the automatic classes of `transformers`.
        folder: the directory.
        config: its configuration.
        what: what errors begin with.
        arguments: of `from_pretrained`, beside these.

    Raises `InputError` where the weights are missing, in pickles only, not readable, not of this configuration, not all
    of its layers', quantized already, or not finite.
    """
    need_safetensors(folder, what)
    if getattr(config, QUANTIZED, None):
        how = config.to_dict()[QUANTIZED]
        raise InputError(
            f"{what}: {folder} holds weights that were quantized already ({how.get('quant_method', 'in fewer bits')}); "
            "a student is made of weights in float: take the directory that they were made of"
        )
    try:
        model, info = kind.from_pretrained(
            folder, config=config, attn_implementation="eager", use_safetensors=True, local_files_only=True,
            trust_remote_code=False, output_loading_info=True, **arguments,
        )  # fmt: skip
    except UNREADABLE as error:
        reason = _why_not_fitting(kind, folder, config) or first_line(error)
        raise InputError(f"{what}: {folder} cannot be loaded: {reason}") from error
    if (unlike := _why_not_whole(model, info["unexpected_keys"]) or _why_not_numbers(model)) is not None:
        raise InputError(f"{what}: {folder} {unlike}")
    return model, sorted(info["missing_keys"])


def _why_not_whole(model: Any, left: Iterable[str]) -> Reason | None:
    """Why a model is not all that is stored, where it has so many layers and the files more; else None.

    `left` are the names of stored tensors that the model has not. Others than those of layers may be of another head.
    """
    prefix = f"{model.base_model_prefix}."  # which files of a model with another head, or with none, may lack
    found = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    stacks = {name.removeprefix(prefix): count for name, count in found.items()}
    for name in (name.removeprefix(prefix) for name in sorted(left)):
        for stack, count in stacks.items():
            number = name.removeprefix(f"{stack}.").partition(".")[0]
            if name.startswith(f"{stack}.") and number.isdigit() and int(number) >= count:
                return (
                    f"has more layers than its config.json says, {count} at {stack}, such as {name}: what would be "
                    "read is another model; copy the config.json that belongs to the weights"
                )
    return None


def _why_not_numbers(model: Any) -> Reason | None:
    """The first parameter with a value that is NaN or infinite; None where there is none."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            return (
                f"has {bad} of {tensor.numel()} values in {name} that are NaN or infinite: its weights are not those "
                "of a trained model"
            )
    return None


def read_trained(kind: Any, folder: Path, config: Any, what: str) -> Any:
    """A trained model of a directory, in float32. Raises `InputError` as `read_model`, and for what is not stored."""
    model, untrained = read_model(kind, folder, config, what)
    if untrained:
        missing = ", ".join(untrained[:4])
        raise InputError(f"{what}: {folder} has no trained {missing}, which would be random; copy the whole model")
    return model.float()


def _why_not_fitting(kind: Any, folder: Path, config: Any) -> Reason | None:
    """The first stored tensor that has another shape than config.json gives it; None where all fit."""
    with contextlib.suppress(*UNREADABLE):
        stored = stored_shapes(folder)
        with torch.device("meta"):
            wanted = {k: tuple(t.shape) for k, t in kind.from_config(config).state_dict().items()}
        for name, shape in stored.items():
            if wanted.get(name, shape) != shape:
                return f"{name} is {list(shape)} in the file, and {list(wanted[name])} after its config.json"
    return None


def read_tokenizer(folder: Path, what: str) -> Any:
    """The tokenizer in `folder`. Raises `InputError`, beginning with `what`, where there is none or not readable."""
    with quietly() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except UNREADABLE as error:
            missing = not any((folder / name).is_file() for name in TABLES)
            reason = f"none of {', '.join(TABLES)} is there; copy them" if missing else first_line(error)
            raise InputError(f"{what}: {folder} has no readable tokenizer: {reason}") from error


def load_tokenizer(
    folder: Path, config: Any, what: str = "encoder", *, least: float = 0.99, needs_padding: bool = True
) -> Any:
    """The directory's tokenizer.

    Args:
        folder: the directory.
        config: that of its model.
        what: what errors begin with.
        least: the share of the model's table that it must have tokens for; tables are rounded up to multiples.
        needs_padding: it must have a padding token, the model's.

    Raises `InputError` where there is none, or it is not that of the model.
    """
    tokenizer = read_tokenizer(folder, what)
    words = len(tokenizer)
    if not least * config.vocab_size <= words <= config.vocab_size:
        raise InputError(
            f"{what}: the tokenizer in {folder} has {words} tokens and the model {config.vocab_size}; it belongs to "
            "another model: copy the right one"
        )
    ids = (tokenizer.pad_token_id, config.pad_token_id)
    if needs_padding and (ids[0] is None or (ids[1] is not None and ids[0] != ids[1])):
        raise InputError(f"{what}: the tokenizer in {folder} pads with token {ids[0]} and the model with {ids[1]}")
    return tokenizer


def layer_weights(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(layer, name within it, shape) of every weight that stands in a numbered layer."""
    for key, shape in shapes.items():
        if (match := LAYER.search(key)) is not None:
            yield int(match[1]), match[2], shape


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the safetensors files of `folder`, read from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            shapes |= {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (not a dict)
    return shapes
