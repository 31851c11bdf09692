"""`[student]` of a recipe: read and written, and its factory called alike in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pqk.comparison.config import Comparison
from pqk.errors import InputError
from pqk.knowledge.teachers.base import network_fingerprint
from pqk.models.plain import plain
from pqk.recipe.factories import load_student, student_of
from pqk.recipe.recipe import Recipe
from pqk.recipe.specs import StudentSpec

PASSES = '[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n[[pass]]\nname = "convert"\n'
TABLE = '[student]\nfactory = "pqk.models.plain:plain"\narguments = { width = 4, stages = [1] }\n'


def spec(**options: object) -> StudentSpec:
    options = {"factory": "pqk.models.plain:plain", "arguments": {"width": 4, "stages": [1]}, **options}
    return StudentSpec(**options)  # type: ignore[arg-type]


def test_it_survives_toml_and_the_command_line_changes_its_arguments() -> None:
    recipe = Recipe.loads("seed = 3\n" + TABLE + PASSES)
    assert recipe.student == spec() and Recipe.loads(recipe.dumps()) == recipe
    changed = recipe.override(["student.width=8"])
    assert changed.student == spec(arguments={"width": 8, "stages": [1]}) and changed.passes == recipe.passes
    assert Recipe.loads(PASSES).student is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[student]\n", r"\[student\]"),
        ('[student]\nfactory = "plain"\n', r"\[student\]: factory: .*pattern"),
        ('[student]\nfactory = "a:b"\nweight = "w"\n', 'unknown key "weight" .*"weights"'),
        ('[pupil]\nfactory = "a:b"\n', 'unknown table "pupil"'),
    ],
)
def test_what_is_wrong_with_it_is_refused_by_name(table: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.loads(table + PASSES)


def test_a_comparison_has_one_too() -> None:
    two = '[[variant]]\nname = "a"\n[[variant]]\nname = "b"\n'
    assert Comparison.loads(TABLE + PASSES + two).recipe.student == spec()


def test_what_a_factory_draws_follows_from_the_seed_alone() -> None:
    """Whatever was drawn before; and what is drawn afterwards is what it would have been."""
    torch.manual_seed(0)
    first, expected = load_student(spec(), None, 5), torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), expected)
    again = load_student(spec(), None, 5)
    assert network_fingerprint(again) == network_fingerprint(first) and not again.training
    assert network_fingerprint(load_student(spec(), None, 6)) != network_fingerprint(first)


def test_weights_come_from_a_file_beside_the_recipe(tmp_path: Path) -> None:
    net = plain(4, (1,))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    loaded = load_student(spec(weights="net.safetensors"), None, 0, beside=tmp_path)
    assert network_fingerprint(loaded) == network_fingerprint(net.eval())
    with pytest.raises(InputError, match=r"\[student\] weights: no file gone.safetensors"):
        load_student(spec(weights="gone.safetensors"), None, 0, beside=tmp_path)


def test_a_factory_may_take_the_teacher_and_lies_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "taught_of_a_test.py").write_text(
        "from torch import nn\n\n\ndef taught(teacher, width):\n    return nn.Linear(teacher.in_features, width)\n\n\n"
        "def nothing():\n    return 3\n"
    )
    table = '[student]\nfactory = "taught_of_a_test:taught"\narguments = { width = 2 }\n'
    made = student_of(Recipe.loads(table + PASSES), nn.Linear(7, 5), tmp_path / "recipe.toml")
    assert isinstance(made, nn.Linear) and (made.in_features, made.out_features) == (7, 2)
    assert student_of(Recipe.loads(PASSES), nn.Linear(7, 5)) is None
    with pytest.raises(InputError, match=r"\[student\] taught_of_a_test:nothing returned a int, not a torch module"):
        load_student(spec(factory="taught_of_a_test:nothing", arguments={}), None, 0, beside=tmp_path)
    with pytest.raises(InputError, match=r"\[student\] taught_of_a_test:taught\(width=…\): TypeError"):
        load_student(spec(factory="taught_of_a_test:taught", arguments={"width": 2}), None, 0, beside=tmp_path)


def test_a_fingerprint_is_of_architecture_and_weights() -> None:
    """Modules with equal tensors that compute something else are told apart; where they lie in memory is not."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    other = nn.Sequential(net[0], nn.GELU())
    assert network_fingerprint(net) != network_fingerprint(other)
    moved = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert network_fingerprint(moved) != network_fingerprint(net)
    moved.load_state_dict(net.state_dict())
    assert network_fingerprint(moved) == network_fingerprint(net)

    class Printed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thing = object()

        def extra_repr(self) -> str:
            return repr(self.thing)

    one, two = Printed(), Printed()
    assert repr(one) != repr(two) and network_fingerprint(one) == network_fingerprint(two)
