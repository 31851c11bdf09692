"""What a causal model learns of texts, whatever its tokenizer puts around them: the tokens of the whole text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import SPECIAL, byte_letters, letters

from pqk.data.tokenizing import open_tokens
from pqk.errors import InputError
from pqk.models.decoder import decoder_config
from pqk.models.language import NextTokens, language_task
from pqk.task.task import Task

transformers = pytest.importorskip("transformers")

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CHAT = (
    "{% for m in messages %}[{{ m.role[0] }}]: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]: {% endif %}"
)
DOG = {"prompt": ["a dog "], "completion": ["ran"]}


def pieces(template: str = "<s> $A") -> Any:
    """A tokenizer as SentencePiece makes them: a space is `▁`, one stands before every text, and `▁7` is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = [*SPECIAL, "<unk>", *"▁3478+=\nans", "▁7", "▁s"]
    merges = [("▁", "7"), ("▁", "s")]
    made = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, names.index(t)) for t in template.split() if t in SPECIAL]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **NAMED)


def folder_of(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """The directory of a Llama without its weights, which no task reads."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    transformers.LlamaConfig(**{"vocab_size": len(tokenizer), **sizes, **IDS, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task(folder: Path, table: Any, **changes: Any) -> Task:
    return language_task(directory=folder, **{"train": None, "evaluation": table, "validation": table} | changes)


def tokens_of(made: Task) -> tuple[list[int], list[int]]:
    """The first text of the evaluation data, and what is learned of it."""
    data = made.evaluation
    assert isinstance(data, NextTokens)
    return data.tokens[0].tolist(), data.tokens[0][data.learned[0] > 0].tolist()


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [
        ("3+4=", "7", ["7", "</s>"]),
        ("3+4=", " 7", ["▁7", "</s>"]),
        ("3+4= ", "7", ["▁7", "</s>"]),
        ("", "7", ["▁7", "</s>"]),
    ],
)
def test_a_completion_has_the_tokens_of_the_whole_text(
    tmp_path: Path, prompt: str, completion: str, learned: list[str]
) -> None:
    """Tokenized apart, "3+4=" with "7" would be learned as "3+4= 7"."""
    tokenizer = pieces()
    made = task(folder_of(tmp_path, tokenizer), {"prompt": [prompt], "completion": [completion]})
    whole, found = tokens_of(made)
    assert tokenizer.convert_ids_to_tokens(found) == learned
    assert whole == [*tokenizer(prompt + completion)["input_ids"], 2]
    assert bool(made.notes) == (prompt == "3+4= ")
    assert all("in 1 of 1 " in note and "a token stands across the end of the prompt" in note for note in made.notes)


def test_worked_steps_have_the_tokens_of_the_whole_text(tmp_path: Path) -> None:
    tokenizer = pieces()
    table = {"prompt": ["3+4="], "steps": ["7"], "completion": ["7"]}
    _, found = tokens_of(task(folder_of(tmp_path, tokenizer), table, rationale="steps"))
    assert tokenizer.convert_ids_to_tokens(found) == ["7", "\n", "7", "</s>"]


def test_a_prompt_that_is_one_token_with_its_completion_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, pieces("$A"))
    with pytest.raises(InputError, match=r"row 2 of the table: the prompt is one token with what follows it \(' '\)"):
        task(folder, {"prompt": ["3=", " "], "completion": ["7", "7"]})


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>", "$A <pad> </s>"])
def test_no_end_stands_between_prompt_and_completion(tmp_path: Path, template: str) -> None:
    """Whatever the tokenizer puts behind a text, and it ends once."""
    tokenizer = byte_letters(SPECIAL, template, **NAMED)
    folder, begin = folder_of(tmp_path, tokenizer), ["<s>"] * template.startswith("<s>")
    whole, found = tokens_of(task(folder, DOG))
    assert tokenizer.convert_ids_to_tokens(whole) == [*begin, *"aĠdogĠran", "</s>"]
    assert tokenizer.decode(found) == "ran</s>"
    assert tokens_of(task(folder, {"prompt": ["a "], "completion": ["b</s>"]}))[0].count(2) == 1


@pytest.mark.parametrize(("ends", "count"), [(None, 1), (True, 1), (False, 0)])
def test_a_text_that_its_tokenizer_ends_has_one_end_at_most(tmp_path: Path, ends: bool | None, count: int) -> None:
    folder = folder_of(tmp_path, byte_letters(SPECIAL, "<s> $A </s>", **NAMED))
    whole, _ = tokens_of(task(folder, {"text": ["a dog"]}, ends=ends))
    assert len(whole) == 6 + count and whole.count(2) == count


def test_an_open_text_has_nothing_behind_it() -> None:
    """Also an empty one, and one whose tokenizer knows few letters."""
    assert open_tokens(byte_letters(SPECIAL, "<s> $A </s>", **NAMED), ["", "</s>"]) == [[1], [1, 2]]
    assert open_tokens(letters(), ["ab"]) == [letters()("ab")["input_ids"]]
    assert open_tokens(pieces("<s> $A </s>"), ["7"]) == [pieces()("7")["input_ids"]]
    assert open_tokens(pieces(), []) == []


# ---- conversations


def talk(*contents: Any) -> dict[str, Any]:
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [said]}


def talking(folder: Path, template: str = CHAT) -> Path:
    tokenizer = pieces()
    tokenizer.chat_template = template
    return folder_of(folder, tokenizer)


def test_a_template_may_begin_an_answer_with_a_space(tmp_path: Path) -> None:
    """`[a]: ` ends with a token of its own, which is none before an answer."""
    made = task(talking(tmp_path), talk("3+4=", "78"), messages="messages")
    _, found = tokens_of(made)
    assert pieces().convert_ids_to_tokens(found) == ["▁7", "8", "</s>"]
    assert any("1 of 1 evaluation texts a token stands across" in note for note in made.notes)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (talk("3", " "), "row 1 of the table has in messages an empty answer"),
        (talk("3", None), "row 1 of the table has in messages a message 2 whose content is no text but NoneType"),
        (talk(None, "3"), "has in messages a message 1 whose content is no text but NoneType"),
        (talk("a\ud83d", "3"), "has in messages a message 1 whose content is half a character"),
    ],
)
def test_messages_without_texts_are_refused(tmp_path: Path, table: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(talking(tmp_path), table, messages="messages")


def test_parts_of_a_message_that_a_template_does_not_know_are_refused(tmp_path: Path) -> None:
    """Jinja writes a list as Python does, and the model would learn to."""
    said = talk([{"type": "text", "text": "3"}], "7")
    with pytest.raises(InputError, match="does not take the parts of message 1 in row 1 of the table"):
        task(talking(tmp_path / "texts"), said, messages="messages")
    parts = CHAT.replace("m.content", "m.content if m.content is string else m.content[0].text")
    assert tokens_of(task(talking(tmp_path / "parts", parts), said, messages="messages")) == tokens_of(
        task(talking(tmp_path / "texts"), talk("3", "7"), messages="messages")
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}", "'13' becomes '23274'"),
        ("{{ raise_exception('roles must alternate') }}", "does not take row 1 of the table: .*roles must alternate"),
    ],
)
def test_what_a_template_does_to_a_conversation_is_said(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(talking(tmp_path, template), talk("3", "74"), messages="messages")


# ---- what does not fit


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("plain"), letters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number, at least 1"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"batch_size": "8"}, "batch_size='8' must be a whole number"),
        ({"context": -5}, "context=-5 must be a whole number, at least 1"),
        ({"context": 0}, "context=0 must be a whole number, at least 1"),
        ({"max_length": 20.0}, "max_length=20.0 must be a whole number, at least 2"),
        ({"limit": 1.5}, "limit=1.5 must be a whole number, at least 1"),
        ({"critic": 5}, "critic must be a function of a prompt and answers, not 5"),
    ],
)
def test_numbers_and_functions_are_checked(plain: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(plain, DOG, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"prompt": ["a", "b"], "completion": ["c"]}}, "different lengths: prompt 2, completion 1"),
        (
            {"train": {"prompt": ["a\ud83d"], "completion": ["c"]}},
            r"row 1 .* in prompt half a character \(\\ud83d at 1",
        ),
        (
            {"train": {"text": ["abc"]}},
            r"training data \(the table\) has the columns text, and the evaluation data comp",
        ),
        ({"retained": {"text": ["abc"]}}, r"retained data \(the table\) has the columns text"),
        ({"train": 5}, "a table is a .jsonl or .tsv file, .* and not int"),
        ({"train": [DOG, 5]}, "row 2 of the table is no dict with a value for each column, but int"),
        ({"train": {"prompt": "ab", "completion": "cd"}}, "the column prompt of the table is no list, but str"),
    ],
)
def test_tables_that_are_none_are_refused(plain: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        task(plain, DOG, **changes)


def test_a_list_of_rows_is_a_table(plain: Path) -> None:
    rows = [{"prompt": "a dog ", "completion": "ran"}, {"prompt": "a cat ", "completion": "sat"}]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found, expected = task(plain, rows).evaluation, task(plain, columns).evaluation
    assert found.fingerprint() == expected.fingerprint() and found.samples == 2


def test_a_text_of_one_token_is_said_to_be_too_short(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, byte_letters(SPECIAL, "$A", **NAMED))
    with pytest.raises(InputError, match="row 2 has a text of 1 token, .* two are needed; give longer texts"):
        task(folder, {"text": ["ab", "c"]})


def test_a_token_that_the_model_has_not_is_refused_where_it_is_used(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, letters(), vocab_size=len(letters()) + 1)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["z"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert task(folder, {"text": ["a dog"]}).evaluation.samples == 1
    with pytest.raises(InputError, match="row 2 of the table has token 500 and the model 260 tokens"):
        task(folder, {"text": ["a dog", "zoo"]})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_the_model_has_not_is_refused(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, letters())
    config = folder / name
    known = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps(known | {"eos_token_id": [2, 7000]}))
    with pytest.raises(InputError, match=f"{name} says eos_token_id 7000, and the model has 259 tokens"):
        decoder_config(folder)


@pytest.mark.parametrize(
    ("family", "sizes", "longest"),
    [
        ("Bloom", {"hidden_size": 8, "n_layer": 1, "n_head": 1}, 300),
        ("Mamba", {"hidden_size": 8, "num_hidden_layers": 1}, 300),
        ("Mpt", {"d_model": 8, "n_layers": 1, "n_heads": 1, "max_seq_len": 48}, 48),
        ("GPT2", {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 40}, 40),
    ],
)
def test_positions_are_what_a_family_calls_them(
    tmp_path: Path, family: str, sizes: dict[str, int], longest: int
) -> None:
    """Some have none, and take texts of any length."""
    tokenizer = letters()
    getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **IDS, **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = task(tmp_path, {"text": ["a" * 400]}, max_length=300)
    assert made.preprocessing["max_length"] == longest == len(tokens_of(made)[0])


def test_a_critic_is_shown_the_space_before_an_answer(tmp_path: Path) -> None:
    """Tokens of an answer alone are decoded without it."""
    shown: list[tuple[str, list[str]]] = []

    def critic(prompt: str, answers: Any) -> list[float]:
        shown.append((prompt, [*answers]))
        return [0.0] * len(answers)

    tokenizer = pieces()
    made = task(folder_of(tmp_path, tokenizer), {"prompt": ["3+4="], "completion": [" 7"]}, critic=critic)
    prompt = torch.tensor(tokenizer("3+4=")["input_ids"])
    assert made.critic is not None
    made.critic(prompt, [torch.tensor(tokenizer.convert_tokens_to_ids(t)) for t in (["▁7"], ["7", "</s>"])])
    assert shown == [("3+4=", [" 7", "7"])]
