"""Every family of causal models: prune, distill, capture, quantize in three forms, distill, convert; the file's parity.

What comes of a family is held against models/results/causal_families.json, from which a README's table is made.
With PQK_FAMILIES_OUT=models/results/causal_families.json and -m "full or not full" the rows are written anew instead.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import causal_models
import pytest
import torch
from causal_tables import COLUMNS, FORMS, RESULTS, families_table, joined
from committed_rows import hold
from prunable_parts import prunable
from torch import fx

from pqk.core.costs import count_parameters
from pqk.core.onnxruntime_session import Continuing, session
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.core.steps import Steps
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.files import read_json
from pqk.models.decoder import decoder
from pqk.models.language import language_task
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.target.target import Target
from pqk.task.classes import IGNORED
from pqk.task.task import Task
from pqk.verify.coverage import integer_coverage
from pqk.verify.parity import check_layers_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
FAMILIES = [n if n == "llama" else pytest.param(n, marks=pytest.mark.full) for n in causal_models.FAMILIES]
ROWS = [name for f in causal_models.FAMILIES for name in (f, *(f"{f} {form}" for form in FORMS))]
TRAINING = Distill(epochs=1, learning_rate=1e-3, optimizer="adamw")


def task_of(folder: Path) -> Task:
    """Next letters of a few words."""
    train, validation, evaluation = ({"text": causal_models.stories(n, seed)} for n, seed in ((32, 0), (8, 1), (8, 2)))
    return language_task(
        directory=folder, train=train, validation=validation, evaluation=evaluation, batch_size=8, max_length=24
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_may_be_pruned(family: str, tmp_path: Path) -> None:
    folder = causal_models.directory(tmp_path, family)
    model = decoder(folder)
    scores = next(p for p, m in model.named_modules() if m is model.model.get_output_embeddings())
    row = prunable(model, task_of(folder).sized, scores)
    assert row["heads"] != "0/0" and row["units"][0] != "0" and row["layers"][0] != "0"
    hold(family, row, RESULTS, ROWS)


@pytest.mark.full  # in every run test_generating_directory.py and test_blockwise.py go the way of a Llama
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_the_whole_way(family: str, form: str, tmp_path: Path) -> None:
    """Smaller, in integers: parity of every layer behind a cache, and of the tokens that both find most likely."""
    folder = causal_models.directory(tmp_path / "model", family)
    teacher, task = decoder(folder), task_of(folder)
    program = Program.begin(teacher, Target.named("x86-avx2"), RunContext())
    passes = (
        Prune(parameters_ratio=1.1, multiple=4), TRAINING, Capture(), Quantize(activations=form, samples=16), TRAINING,
        Convert(),
    )  # fmt: skip
    for index, step in enumerate(passes):
        program = dataclasses.replace(program, run=program.run.enter(f"{index}-{step.name}"))
        program = dataclasses.replace(step.apply(program, task), stage=step.result_stage(program.stage))
        if step.name == "prune":
            assert count_parameters(program.student) * 1.1 <= count_parameters(teacher)
    graph, path = program.student, tmp_path / "model.onnx"
    assert isinstance(graph, fx.GraphModule)
    emit_onnx_for(graph, task, path)
    layers = check_layers_of(graph, path, task, task.sized(8))
    assert layers and [layer for layer in layers if not layer.passed] == []
    assert agreement(graph, path, task) > 0.9
    coverage = integer_coverage(path, task.feeds(2))
    assert {la.op for la in coverage.layers if not la.integer} <= {"Attention", "MatMul", "FusedMatMul"}
    row = {
        "parity": f"{sum(la.passed for la in layers)}/{len(layers)}",
        "integer": f"{sum(la.integer for la in coverage.layers)}/{len(coverage.layers)}",
    }
    hold(f"{family} {form}", row, RESULTS, ROWS)


def agreement(graph: fx.GraphModule, path: Path, task: Task) -> float:
    """The share of next tokens that the graph, on whole texts, and the file, token by token, find most likely."""
    run, found = session(path), []
    assert isinstance(run, Continuing)
    steps = Steps(run)
    for batch in task.evaluation.batches():
        with torch.no_grad():
            wanted = graph(*batch.inputs).argmax(-1)
        for row, length, choices, targets in zip(
            batch.inputs[0], batch.inputs[1].sum(1).tolist(), wanted, batch.targets, strict=True
        ):
            text, past, said = row[:length].tolist(), steps.empty, []
            for t in range(length):
                scores, past = steps(text[t : t + 1], past, t + 1)
                said.append(int(scores[-1].argmax()))
            learned = targets[:length] != IGNORED
            found.append((torch.tensor(said) == choices[:length])[learned])
    return float(torch.cat(found).double().mean())


def test_the_table_has_every_family_and_every_reason() -> None:
    committed = read_json(RESULTS)
    assert list(committed) == ROWS
    text = families_table()
    for family, row in joined().items():
        assert f"\n| {family} | " in text and {*COLUMNS} <= {*row}
        assert all(f"] {reason}." in text for reasons in row["reasons"].values() for reason in reasons)
        assert all(len({*row[f"{form} parity"].split("/")}) == 1 for form in FORMS)
