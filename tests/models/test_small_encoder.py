"""Small text encoders: of the teacher's family and outputs, with sizes of their own, in and out of a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_models as tiny
import torch
from evaluations import UNTIMED
from torch import nn

from pqk.errors import InputError
from pqk.models.encoder import Encoder, encoder
from pqk.models.small_encoder import principal_components, small_encoder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "classifier")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Encoder:
    return encoder(folder)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([[5], [9]])).long()
    return torch.randint(5, len(tiny.WORDS), (2, 9), generator=g) * mask, mask


def table(model: Encoder) -> torch.Tensor:
    return model.model.get_input_embeddings().weight  # type: ignore[operator,return-value]


@torch.no_grad()
def test_it_has_its_own_sizes_and_the_teacher_s_outputs(teacher: Encoder) -> None:
    student = small_encoder(teacher, layers=1, width=8, hidden=24)
    layers = student.get_submodule("model.bert.encoder.layer")
    assert len(layers) == 1  # type: ignore[arg-type]
    shapes = {name: tuple(p.shape) for name, p in layers.named_parameters()}
    assert shapes["0.intermediate.dense.weight"] == (24, 8) and shapes["0.attention.self.query.weight"] == (8, 8)
    attention = layers.get_submodule("0.attention.self")
    assert (attention.num_attention_heads, attention.attention_head_size) == (1, 8)  # heads are of the teacher's size
    assert student(*inputs()).shape == teacher(*inputs()).shape
    padded = tuple(torch.cat([x, torch.zeros_like(x)], 1) for x in inputs())
    torch.testing.assert_close(student(*padded), student(*inputs()), atol=1e-5, rtol=0)


def test_the_table_begins_as_the_teacher_s(teacher: Encoder) -> None:
    assert torch.equal(table(small_encoder(teacher)), table(teacher))
    narrow = table(small_encoder(teacher, width=8))
    assert torch.equal(narrow, principal_components(table(teacher).detach(), 8))
    torch.manual_seed(0)
    assert not torch.equal(table(small_encoder(teacher, width=8, table="random")), narrow)


def test_principal_components_keep_the_most_of_all_products() -> None:
    """A known answer: rows in a plane lose nothing in two directions; and the largest direction comes first."""
    g = torch.Generator().manual_seed(0)
    plane = torch.randn(20, 2, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    basis, _ = torch.linalg.qr(torch.randn(6, 2, generator=g, dtype=torch.float64))
    rows = plane @ basis.T
    kept = principal_components(rows, 2)
    torch.testing.assert_close(kept @ kept.T, rows @ rows.T)
    assert kept[:, 0].norm() > kept[:, 1].norm()
    assert torch.equal(principal_components(rows, 6), rows)
    torch.testing.assert_close(principal_components(-rows, 2), -kept)  # the directions have signs of their own
    with pytest.raises(InputError, match="7 channels of a table that has 6"):
        principal_components(rows, 7)


@torch.no_grad()
def test_an_embedding_is_as_wide_as_its_teacher(tmp_path: Path) -> None:
    teacher = encoder(tiny.directory(tmp_path / "base", "Model"), "embedding")
    student = small_encoder(teacher, layers=1, hidden=8)
    want, got = teacher(*inputs()), student(*inputs())
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    with pytest.raises(InputError, match="width=8, and the teacher's embeddings have 16 channels"):
        small_encoder(teacher, width=8)


def test_what_is_no_small_encoder_is_refused(teacher: Encoder) -> None:
    with pytest.raises(InputError, match="whole heads of 8"):
        small_encoder(teacher, width=12)
    with pytest.raises(InputError, match="layers=0"):
        small_encoder(teacher, layers=0)
    with pytest.raises(InputError, match='table="mine"'):
        small_encoder(teacher, table="mine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the teacher is a Linear"):
        small_encoder(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.full  # other encoders are in every run
@pytest.mark.slow
def test_it_is_compiled_into_a_directory(folder: Path, tmp_path: Path) -> None:
    """The recipe's factory gets the teacher; config.json says the student's own sizes; a rebuild needs no module."""
    from pqk import compress
    from pqk.models.text import text_task
    from pqk.recipe.recipe import Recipe

    rows = tiny.texts(48)
    labels = [tiny.LABELS[i % 3] for i in range(48)]
    train = tiny.write_tsv(tmp_path / "train.tsv", labels, rows)
    recipe = Recipe.loads(
        '[teacher]\nfactory = "pqk.models.encoder:encoder"\n'
        f'arguments = {{ directory = "{folder}" }}\n'
        '[student]\nfactory = "pqk.models.small_encoder:small_encoder"\n'
        "arguments = { layers = 1, width = 8, hidden = 24 }\n"
        '[target]\nname = "x86-avx2"\n'
        '[[pass]]\nname = "distill"\nepochs = 1\nterms = [{ term = "kl" }]\n'
        '[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n[[pass]]\nname = "convert"\n'
    )
    task = text_task(directory=folder, train=train, evaluation=train, timed_lengths=(16,))
    artifact = compress(encoder(folder), task, recipe, out=tmp_path / "out", evaluation=UNTIMED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert [config[name] for name in sizes] == [1, 8, 24, 1]
    again = artifact.rebuild()(*inputs())
    torch.testing.assert_close(again, torch.from_numpy(artifact.run(*inputs())), atol=1e-4, rtol=0)
