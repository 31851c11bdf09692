"""What is given in Python and cannot be taken: refused in words, by an error of pqk's, naming the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pqk
from pqk import passes
from pqk.errors import InputError
from pqk.knowledge import TERMS
from pqk.knowledge.sources import SOURCES
from pqk.passes import Distill, Fuse, JointSearch, Prune, Quantize

DATA = pqk.ArrayData(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))


def task(**arguments: Any) -> pqk.Task:
    return pqk.Task(DATA, DATA, **arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pqk.Recipe(passes=()), r"recipe: it has no \[\[pass\]\] and no \[contract\]"),
        (lambda: pqk.Recipe(), "recipe: passes: Field required"),
        (lambda: pqk.Recipe(passes=(3,)), r"recipe: passes.0: .* instance of Pass \(got 3\)"),
        (lambda: pqk.Recipe(passes=(Quantize(),), seed="x"), "recipe: seed: .* integer"),
        (lambda: Prune(macs_ratio=-1), r"prune: macs_ratio: .* greater than 1 \(got -1\)"),
        (lambda: Prune(macs_ratio=2, parameters_ratio=2), "prune: exactly one of"),
        (lambda: JointSearch(macs_ratio=0.5), r"pqk: macs_ratio: .* greater than 1 \(got 0.5\)"),
        (lambda: Distill(epochs="x"), r"distill: epochs: .* \(got 'x'\)"),
        (lambda: Distill(epoch=1), r'distill: unknown key "epoch" \(did you mean "epochs"\?\)'),
        (lambda: Distill(keep="lst"), r"distill: keep: .* 'last', .*got 'lst'"),
        (lambda: Distill(terms=({"term": "kld"},)), r'terms.0: unknown term "kld" \(did you mean "kl"\?\)'),
        (lambda: Distill(terms=({"term": "kl", "wait": 1},)), r'"terms.0.kl.wait" \(did you mean "weight"\?\)'),
        (lambda: dataclasses.replace(Distill(), epochs=-1), "distill: epochs"),
        (lambda: Fuse(foo=1), 'fuse: unknown key "foo"'),
        (lambda: pqk.Contract(max_drops=3), 'contract: unknown key "max_drops"'),
        (lambda: pqk.Target("x86"), "target: activation: Field required"),
        (lambda: pqk.Target.named(3), 'unknown target "3"'),
        (lambda: pqk.Evaluation(threads="x"), "evaluation: threads"),
        (lambda: pqk.Evaluation(thread=2), r'evaluation: unknown key "thread" \(did you mean "threads"\?\)'),
        (lambda: pqk.Evaluation(timing=3), "evaluation: timing: .* TimingProtocol"),
        (lambda: pqk.Evaluation(timing=pqk.TimingProtocol(rounds=2)), "timing has 2 rounds; an interval needs"),
        (lambda: pqk.Evaluation.named(["quick"]), "evaluation: "),
        (lambda: pqk.TimingProtocol(pause=-1), "TimingProtocol: pause"),
        (lambda: pqk.Metric("mine", "share", 5), r"metric: function: .* callable \(got 5\)"),
        (lambda: pqk.Metric("mine"), "metric: unit: Field required"),
        (lambda: pqk.Views(teacher=3, student=len), "views: teacher: .* callable"),
        (lambda: pqk.Comparison(foo=3), 'comparison: .*unknown key "foo"'),
        (lambda: pqk.ArrayData(DATA.inputs, DATA.targets, batch=3), 'ArrayData: unknown key "batch"'),
        (lambda: pqk.ArrayData(3, None), "data: input 0 is a int and must be a tensor"),
        (lambda: pqk.LoaderData([], size=3), 'LoaderData: unknown key "size"'),
        (lambda: task(metrics="accuracy"), r'task: unknown key "metrics" \(did you mean "metric"\?\)'),
        (lambda: pqk.Task(DATA), "task: missing a required argument: 'evaluation'"),
        (lambda: task(loss=3), "task: loss is a int and must be a function"),
        (lambda: task(decision="argmax"), "task: decision is a str and must be a function"),
        (lambda: task(validation_share="x"), "task: validation_share='x' must be a number"),
        (lambda: task(views=3), "task: views is a int; pass Views"),
        (lambda: task(dynamic_axes=3), "task: dynamic_axes is a int and must be a dict"),
        (lambda: task(input_names="x"), "task: input_names is 'x' and must be texts in a tuple"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_in_words(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "pydantic" not in str(caught.value) and "\n" not in str(caught.value)


def public() -> list[type[Any]]:
    """Every dataclass that users make."""
    doors = [getattr(module, name) for module in (pqk, passes) for name in module.__all__]
    kinds = [kind for kind in (*doors, *TERMS, *SOURCES) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return list(dict.fromkeys(kinds))


@pytest.mark.parametrize("kind", [c for c in public() if c is not pqk.Artifact], ids=lambda c: c.__name__)
def test_every_public_dataclass_refuses_an_unknown_field_in_words(kind: type[Any]) -> None:
    """Those that pqk makes and users read, such as an artifact, are not made by users."""
    with pytest.raises(InputError, match='unknown key "nothing_has_this"'):
        kind(nothing_has_this=1)
