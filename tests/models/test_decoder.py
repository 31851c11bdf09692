"""Decoders of every family: the numbers of `transformers`, of any length, padded or not, and continued from a cache."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import causal_models as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from pqk.core.aten import aten
from pqk.deploy.generation import Cache, continued, places, with_past
from pqk.deploy.token_operators import ATTENTION, ROTARY, with_token_operators
from pqk.errors import InputError
from pqk.models.decoder import Decoder, decoder
from pqk.models.decoder_files import DecoderFiles
from pqk.models.language import language_task
from pqk.passes.capture.capture import capture
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.cuts import cut_channels
from pqk.passes.prune.groups import find_groups

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

AXES = (("batch", "sequence"), ("batch", "sequence"))
TEXT, HALF = 15, 8
FEW = ("llama", "gpt2", "gemma3")


def text() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, tiny.VOCABULARY, (2, TEXT), generator=torch.Generator().manual_seed(3))
    return ids, torch.ones_like(ids)


def heads(group: ChannelGroup) -> bool:
    return any(m.dim == "heads" and any(m.places) for m in group.members)


def captured(family: str) -> tuple[Decoder, fx.GraphModule]:
    model = Decoder(tiny.hub_model(family)).eval()
    return model, capture(model, text(), axes=AXES)


@torch.no_grad()
@pytest.mark.parametrize("family", [n if n in FEW else pytest.param(n, marks=pytest.mark.full) for n in tiny.FAMILIES])
def test_every_family_answers_as_transformers_does(family: str) -> None:
    """Of whole texts, of padded ones, in graphs of another length; step by step behind a cache, spelled out and not."""
    ids, mask = text()
    short = mask.clone()
    short[1, HALF:] = 0
    hub = tiny.hub_model(family)
    expected = hub(input_ids=ids, attention_mask=mask).logits
    padded = hub(input_ids=ids, attention_mask=short).logits
    model, graph = captured(family)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(model(ids, mask), expected, **close)
    torch.testing.assert_close(model(ids, short)[short > 0], padded[short > 0], **close)
    torch.testing.assert_close(graph(ids[:, :HALF], mask[:, :HALF]), expected[:, :HALF], **close)
    continuing, cache = with_past(graph)
    for form in (continuing, with_token_operators(continuing)):
        torch.testing.assert_close(_step_by_step(form, cache), expected, **close)


def _step_by_step(form: fx.GraphModule, cache: Cache) -> Tensor:
    ids, mask = text()
    where = places(mask)
    scores, *kept = form(ids[:, :HALF], mask[:, :HALF], where[:, :HALF], *cache.empty(2))
    found = [scores]
    for t in range(HALF, TEXT):
        scores, *kept = form(ids[:, t : t + 1], mask[:, : t + 1], where[:, t : t + 1], *kept)
        found.append(scores)
    return torch.cat(found, 1)


@torch.no_grad()
def test_padding_in_front_is_not_seen_behind_a_cache() -> None:
    """As tools that generate for several prompts at once pad them."""
    _, graph = captured("llama")
    ids, mask = text()
    padded, seen = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1), torch.cat([mask[:, :3] * 0, mask], 1)
    for form in (with_past(graph)[0], with_token_operators(with_past(graph)[0])):
        scores, *_ = form(padded, seen, places(seen), *with_past(graph)[1].empty(2))
        torch.testing.assert_close(scores[:, 3:], graph(ids, mask), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_text_is_continued_in_its_middle() -> None:
    _, graph = captured("qwen3")
    form, inputs = continued(graph, text())
    torch.testing.assert_close(form(*inputs)[0], graph(*text())[:, TEXT // 2 :], atol=2e-5, rtol=1e-4)


def _operators(graph: fx.GraphModule) -> Counter[str]:
    known = {ROTARY: "rotary", ATTENTION: "attention", aten.rms_norm.default: "norm", aten.softmax.int: "softmax"}
    return Counter(known[n.target] for n in graph.graph.nodes if n.target in known)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"rotary": 4, "attention": 2, "norm": 5}),
        ("qwen3", {"rotary": 4, "attention": 2, "norm": 9}),  # heads of queries and keys have norms of their own
        ("gpt2", {"attention": 2}),
        ("phi", {"rotary": 4, "attention": 2}),  # of half of each head
        ("gemma2", {"rotary": 4, "attention": 2, "norm": 9}),  # its scores are capped before the mask is added
    ],
)
def test_what_a_model_spells_out_becomes_one_operator(family: str, expected: dict[str, int]) -> None:
    _, graph = captured(family)
    assert _operators(with_token_operators(with_past(graph)[0])) == expected


def test_no_reshape_stands_between_tokens_and_their_heads() -> None:
    """Linear layers take two axes in training, and three where one token is computed at a time."""
    _, graph = captured("llama")
    form = with_token_operators(with_past(graph)[0])
    assert {n.target for n in graph.graph.nodes} >= {aten.reshape.default}
    assert not {n.target for n in form.graph.nodes} & {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }


def test_a_layer_remembers_its_own_number_of_groups() -> None:
    cache = with_past(captured("llama")[1])[1]
    assert [(e.groups, e.key_width, e.value_width) for e in cache.entries] == [(2, 8, 8)] * 2
    assert cache.names("past") == ("past.0.key", "past.0.value", "past.1.key", "past.1.value")
    assert [tuple(t.shape) for t in cache.empty(3)] == [(3, 2, 0, 8)] * 4


def test_a_graph_that_does_not_say_what_tokens_see_is_refused() -> None:
    class Alone(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids * attention_mask

    graph = capture(Alone(), text(), axes=AXES)
    with pytest.raises(InputError, match="no attention"):
        with_past(graph)


def test_a_family_that_computes_attention_by_itself_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="bloom (computes attention by itself|does not run with attention)"):
        Decoder(model)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("pickle", "only, which can run code"),
        ("encoder", "which is no causal model"),
        ("nothing", "no config.json"),
        ("width", r"is \[\d+, 32\] in the file, and \[\d+, 64\] after its config.json"),
    ],
)
def test_a_directory_that_is_no_decoder_is_refused(tmp_path: Path, broken: str, words: str) -> None:
    folder = tmp_path / "model"
    if broken != "nothing":
        tiny.directory(folder)
    config = folder / "config.json"
    if broken == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if broken == "encoder":
        config.write_text(config.read_text().replace('"llama"', '"bert"').replace("LlamaForCausalLM", "BertModel"))
    if broken == "width":
        config.write_text(config.read_text().replace(f'"hidden_size": {tiny.WIDTH}', '"hidden_size": 64'))
    with pytest.raises(InputError, match=words):
        decoder(folder)


@pytest.mark.parametrize(
    ("vocabulary", "kept", "words"), [(900, True, "belongs to another model"), (None, False, "none of tokenizer.json")]
)
def test_a_tokenizer_that_is_missing_or_another_models_is_refused(
    tmp_path: Path, vocabulary: int | None, kept: bool, words: str
) -> None:
    folder = tiny.directory(tmp_path / "model", **({} if vocabulary is None else {"vocab_size": vocabulary}))
    if not kept:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=words):
        language_task(directory=folder, train=None, evaluation={"text": ["a"]}, validation={"text": ["a"]})


def test_a_configuration_says_the_hidden_units_by_its_own_name(tmp_path: Path) -> None:
    """GPT-2's says none where they are four times the width, which would be wrong of a student that has fewer."""
    folder = tiny.directory(tmp_path / "gpt2", "gpt2")
    graph = capture(decoder(folder), text(), axes=AXES)
    assert json.loads(DecoderFiles(folder, 64)(graph)["config.json"])["n_inner"] == 4 * tiny.WIDTH


@pytest.mark.parametrize(
    ("family", "layers", "said"),
    [
        ("llama", (), None),
        ("llama", (0,), "this student's keep keys and values of 1 to 2"),
        ("llama", (0, 1), "width of a head, 16, and this student's are 8 wide"),
        ("gemma", (0, 1), None),  # all alike, and its configuration is read
    ],
)
def test_who_cannot_make_the_cache_of_a_student_is_said(
    tmp_path: Path, family: str, layers: tuple[int, ...], said: str | None
) -> None:
    folder = tiny.directory(tmp_path / family, family)
    model, task = decoder(folder), DecoderFiles(folder, 64)
    for layer in layers:
        groups = [g for g in find_groups(model, text()) if f".{layer}." in g.name and heads(g)]
        model = cut_channels(model, text(), cuts=groups[0].cuts(groups[0].units[0]))
    reason = task.why_not_everywhere(capture(model, text(), axes=AXES))
    assert reason is None if said is None else reason is not None and said in reason


def test_weights_that_are_not_numbers_are_said_to_be(tmp_path: Path) -> None:
    folder = tiny.directory(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if "down_proj" in n)
    save_file({**state, name: state[name] * torch.nan}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1536 of 1536 values in model.layers.0.mlp.down_proj.weight that are NaN"):
        decoder(folder)


def test_a_token_that_no_trial_reads_is_a_number_too(tmp_path: Path) -> None:
    folder = tiny.directory(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"][200, 3] = torch.inf
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 of 8288 values in model.embed_tokens.weight that are NaN or infinite"):
        decoder(folder)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_hidden_layers": 1}, r"more layers than its config.json says, 1 at layers, such as layers.1"),
        ({"num_hidden_layers": 0}, r"more layers than its config.json says, 0 at layers"),
        ({"num_key_value_heads": 0}, "cannot be loaded: ZeroDivisionError"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"were quantized already \(gptq\)"),
        ({"eos_token_id": "2"}, "says eos_token_id '2', which is no number of a token"),
        ({"eos_token_id": -1}, "says eos_token_id -1, and the model has 259 tokens"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    """Weights of layers that it does not say would be left out without a word."""
    folder = tiny.directory(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(InputError, match=words):
        decoder(folder)


@pytest.mark.parametrize("broken", ["{", "{}", '{"vocab": 3}'])
def test_a_tokenizer_that_is_broken_is_refused(tmp_path: Path, broken: str) -> None:
    folder = tiny.directory(tmp_path / "model")
    (folder / "tokenizer.json").write_text(broken)
    with pytest.raises(InputError, match="has no readable tokenizer"):
        language_task(directory=folder, train=None, evaluation={"text": ["a"]}, validation={"text": ["a"]})


def test_a_students_configuration_does_not_say_where_its_teacher_was(tmp_path: Path) -> None:
    """It was read from a folder that may be another one in every run."""
    folder = tiny.directory(tmp_path / "model")
    files = DecoderFiles(folder, 64)(capture(decoder(folder), text(), axes=AXES))
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
