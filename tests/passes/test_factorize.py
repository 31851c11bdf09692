"""Laws of low rank: the best halves on data, the least harm for what is saved, students that survive what follows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluations import TABLE
from lowered import Encoder
from pruning import data, program_of, task_of, trained
from torch import Tensor, nn

from pqk.compiler import compress
from pqk.core.costs import count_macs
from pqk.core.decisions import Journal
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.pipeline import load, run_passes, save
from pqk.core.program import Program, Stage
from pqk.deploy.artifact import Artifact
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError
from pqk.knowledge import Hint, KLDivergence
from pqk.models.resnet import resnet
from pqk.passes import REWRITES, Capture, Convert, Distill, Factorize, Prune, Quantize
from pqk.passes.factorize.choice import RankOption, ranks_after, schedule
from pqk.passes.factorize.layers import find_layers, ranks_of
from pqk.passes.factorize.responses import responses_of, spectra
from pqk.passes.prune.cuts import cut_channels, kept_channels
from pqk.passes.prune.law import check_groups
from pqk.passes.prune.low_rank import LowRank, split_layers
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (12,)),
    "tokens": (lambda: nn.Linear(12, 20, bias=False), (5, 12)),
    "pointwise": (lambda: nn.Conv2d(12, 8, 1, stride=2), (12, 6, 6)),
    "3x3": (lambda: nn.Conv2d(4, 9, 3, stride=2, padding=1, bias=False), (4, 7, 7)),
    "dilated": (lambda: nn.Conv2d(4, 9, (3, 1), dilation=2, padding=1, padding_mode="reflect"), (4, 7, 7)),
    "sound": (lambda: nn.Conv1d(4, 9, 5, padding="same"), (4, 16)),
}


def layer_and_data(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer under the name "0", and inputs of a mean that is not 0, with directions that hardly vary."""
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    x = data(shape, 96)
    axis = -1 if isinstance(make(), nn.Linear) else 1
    mixing = torch.randn(x.shape[axis], x.shape[axis]) * torch.linspace(0.02, 1, x.shape[axis]) ** 2
    return trained(nn.Sequential(make())), (x.movedim(axis, -1) @ mixing + 0.7).movedim(-1, axis)


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What each response of a layer is computed from, [N, K]: rows, or patches under the kernel."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    if isinstance(layer, nn.Conv1d):
        return F.pad(x, (2, 2)).unfold(2, 5, 1).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    assert isinstance(layer, nn.Conv2d)
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    x = x if layer.padding_mode == "zeros" else F.pad(x, (1, 1, 1, 1), mode=layer.padding_mode)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_at_full_rank_the_layer_is_what_it_was_on_any_input(kind: str) -> None:
    model, x = layer_and_data(kind)
    halves = spectra(model, ["0"], [(x,)])["0"].halves(model[0], model[0].weight.shape[0])
    other = 3 * data(tuple(x.shape[1:]), 8) - 1
    torch.testing.assert_close(halves(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_is_the_known_optimum_in_the_whitened_norm(kind: str) -> None:
    """Eckart and Young for W S, S the Cholesky factor of the inputs' covariance, which the pass never computes."""
    model, x = layer_and_data(kind)
    layer, inputs = model[0], rows_of(model[0], x).double()
    whitening = torch.linalg.cholesky(torch.cov(inputs.T, correction=0) + 1e-12 * torch.eye(inputs.shape[1]))
    singular = torch.linalg.svdvals(layer.weight.detach().double().flatten(1) @ whitening)
    spectrum = spectra(model, ["0"], [(x[:50],), (x[50:],)])["0"]
    axis = -1 if isinstance(layer, nn.Linear) else 1
    for rank in (1, 3, 6):
        halves = spectrum.halves(layer, rank)
        with torch.no_grad():
            error = (halves(x) - model(x)).double().square().sum(axis).mean()
        best = float(singular[rank:].square().sum())
        assert float(error) == pytest.approx(best, rel=2e-3) and spectrum.error(rank) == pytest.approx(best, rel=1e-5)


def test_moments_in_portions_are_those_at_once() -> None:
    model = trained(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 7), nn.Linear(7, 6)))
    batches, names = [(data((12,), 40)[i : i + 16],) for i in (0, 16, 32)], ["0", "2", "3"]
    whole, parts = (responses_of(model, names, batches, at_once=n) for n in (1 << 20, 1))
    assert whole.keys() == parts.keys() and all(r.count == 40 for r in parts.values())
    for name in names:
        assert torch.equal(whole[name].products, parts[name].products)
        with torch.no_grad():
            want = torch.cov((model[: int(name) + 1](data((12,), 40)) - model[int(name)].bias).T.double(), correction=0)
        torch.testing.assert_close(parts[name].covariance, want, rtol=1e-5, atol=1e-7)


def low_rank_net() -> nn.Module:
    """Two layers of 48 x 48, the second of which has rank 5."""
    model = trained(nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6)))
    with torch.no_grad():
        left, values, right = torch.linalg.svd(model[2].weight)
        model[2].weight.copy_(left[:, :5] * values[:5] @ right[:5])
    return model


def test_a_layer_of_low_rank_is_split_without_loss_and_the_others_stay() -> None:
    model = low_rank_net()
    task = task_of(model, (48,))
    config = Factorize(max_divergence=1e-7, ranks=(0.75, 0.5, 0.34), multiple=4)
    program = config.apply(program_of(model), task)
    assert program.details["ranks"] == {"2": 8} and isinstance(program.student[2], LowRank)
    x = 2 * data((48,), 32) + 1
    torch.testing.assert_close(program.student(x), model(x), rtol=1e-3, atol=1e-4)
    reasons = {d.layer: d.reason for d in program.declined}
    assert "further from the teacher's than max_divergence allows" in reasons["0"]


def test_the_steps_of_a_schedule_are_the_best_there_is_for_what_they_save() -> None:
    """Against every choice of one rank a layer."""
    generator = torch.Generator().manual_seed(2)
    options = [
        RankOption(layer, rank, float(torch.rand((), generator=generator)), float(torch.rand((), generator=generator)))
        for layer in "abcd"
        for rank in (1, 2, 3)
    ]
    by_layer = [[None, *(o for o in options if o.layer == layer)] for layer in "abcd"]
    choices = [[o for o in choice if o] for choice in itertools.product(*by_layer)]
    totals = [(sum(o.saved for o in c), sum(o.cost for o in c)) for c in choices]
    steps = schedule(options)
    chosen = [ranks_after(steps[:n]) for n in range(1, len(steps) + 1)]
    for ranks in chosen:
        own = [o for o in options if ranks.get(o.layer) == o.rank]
        saved, cost = sum(o.saved for o in own), sum(o.cost for o in own)
        assert cost <= min(c for s, c in totals if s >= saved - 1e-12) + 1e-12
    assert len(steps) >= 4 and sum(o.saved for o in options if chosen[-1][o.layer] == o.rank) == pytest.approx(
        max(s for s, _ in totals)
    )


def test_what_saves_nothing_is_no_step_and_noise_below_zero_is_no_gain() -> None:
    options = [RankOption("a", 8, -0.2, 1.0), RankOption("a", 4, 0.1, 2.0), RankOption("b", 8, 0.0, 0.0)]
    assert [(o.layer, o.rank, o.cost) for o in schedule(options)] == [("a", 8, 0.0), ("a", 4, 0.1)]


def test_a_budget_is_met_by_the_cheapest_splits_and_the_plan_rebuilds_the_student(tmp_path: Path) -> None:
    model = trained(resnet((2, 2), 16))
    task = task_of(model, (3, 8, 8))
    config = Factorize(macs_ratio=1.25, multiple=2, ranking_samples=32)
    program = run_passes(program_of(model, folder=tmp_path), task, [config])
    details = program.records[0].details
    assert count_macs(model, task.example) >= 1.25 * count_macs(program.student, task.example)
    assert details["budget"]["reached"] >= 1.25 and details["divergence"][0] == 0 < details["divergence"][1] < 0.2
    assert {r["layer"] for r in details["options"]} >= details["ranks"].keys()
    assert [json.loads(json.dumps(r.arguments)) for r in program.plan] == [r.arguments for r in program.plan]
    again = load(program_of(model, folder=tmp_path), task, tmp_path / "00-factorize", REWRITES)
    assert torch.equal(again.student(task.example[0]), program.student(task.example[0]))
    assert not [n for n, p in program.student.named_parameters() if not p.requires_grad]


class Uses(nn.Module):
    """Layers that are more, or less, to the model than what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read, self.tied, self.also_tied = (nn.Linear(24, 24) for _ in range(4))
        self.also_tied.weight = self.tied.weight
        self.hooked, self.shared, self.idle = (nn.Linear(24, 24) for _ in range(3))
        self.alias = self.shared
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.own, self.grouped = (
            nn.modules.linear.NonDynamicallyQuantizableLinear(24, 24),
            nn.Conv1d(24, 24, 1, groups=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) + F.linear(x, self.read.weight) * 0.1 + self.read(x) * 0.1
        x = self.hooked(self.also_tied(self.tied(x).relu())).relu()
        return self.grouped(self.own(self.alias(self.shared(x)))[..., None])[..., 0]


def test_what_is_more_than_a_plain_layer_stays_whole_and_says_why() -> None:
    model = trained(Uses())
    program = Factorize(max_divergence=100, multiple=2).apply(program_of(model), task_of(model, (24,)))
    assert program.details["ranks"].keys() == {"plain"}
    reasons = {d.layer: d.reason for d in program.declined}
    said = {
        "read": "the model does more with it than to call it: .*no attribute 'weight'",
        "tied": "another layer's as well",
        "also_tied": "another layer's as well",
        "hooked": "it has hooks",
        "shared": "one layer under 2 names: shared, alias",
        "idle": "does not call it",
        "own": "NonDynamicallyQuantizableLinear, which may compute something else",
        "grouped": "2 groups",
    }
    for layer, words in said.items():
        assert re.search(words, reasons[layer]), (layer, reasons[layer])


def timer(price: float, calls: list[int]) -> Callable[[nn.Module], float]:
    """A latency in which a layer costs `price` beside its weights."""

    def measure(student: nn.Module) -> float:
        calls.append(1)
        layers = [m for m in student.modules() if isinstance(m, nn.Linear)]
        return sum(price + 1e-3 * m.weight.numel() for m in layers)

    return measure


def timed(model: nn.Module, price: float, calls: list[int], **run: Any) -> Program:
    base = timer(price, [])(model)
    return program_of(model, oracle=SimpleNamespace(latency=timer(price, calls), baseline=lambda: base), **run)


def deep() -> nn.Module:
    """Layers of 64, 32 and 32, 64 features, which differ in what their halves save where a layer has its price."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
    return trained(nn.Sequential(*layers, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)))


def test_a_latency_is_measured_and_what_is_no_faster_stays_whole() -> None:
    """Halves of the small layer have half its weights, and one more layer's price."""
    model = deep()
    calls: list[int] = []
    journal = Journal()
    config = Factorize(latency_ratio=1.3, multiple=4)
    program = config.apply(timed(model, 0.8, calls, journal=journal), task_of(model, (64,)))
    base, reached = timer(0.8, [])(model), timer(0.8, [])(program.student)
    assert base >= 1.3 * reached and program.details["budget"]["reached"] == pytest.approx(base / reached)
    reasons = {d.layer: d.reason for d in program.declined}
    assert reasons["6"] == "its halves of rank 12, 8, 4 save no ms" and "6" not in program.details["ranks"]
    saved = {(o["layer"], o["rank"]): o["saved"] for o in program.details["options"]}
    assert saved["0", 8] == saved["2", 8] == pytest.approx(1e-3 * (64 * 64 - 8 * 128) - 0.8)
    measured = len(calls)
    again = config.apply(timed(model, 0.8, calls, journal=journal), task_of(model, (64,)))
    assert again.plan == program.plan and len(calls) == measured
    assert torch.equal(again.student(data((64,))), program.student(data((64,))))


def test_without_a_budget_latency_decides_where_it_can_be_measured_and_macs_elsewhere() -> None:
    model = deep()
    config = Factorize(max_divergence=1e3, multiple=4)
    here = config.apply(timed(model, 5.0, []), task_of(model, (64,)))
    assert here.details["budget"]["kind"] == "latency" and not here.details["ranks"] and not here.plan
    elsewhere = config.apply(program_of(model), task_of(model, (64,)))
    assert elsewhere.details["budget"]["kind"] == "macs" and elsewhere.details["ranks"].keys() == {"0", "2", "4", "6"}


def test_a_rehearsal_estimates_what_a_compile_times() -> None:
    model, calls = deep(), list[int]()
    config = Factorize(latency_ratio=1.3, multiple=4).rehearsal(1.0)
    program = config.apply(timed(model, 0.1, calls, rough=True), task_of(model, (64,)))
    assert len(calls) == 2 and program.details["estimated"]["candidates"] > 5
    assert program.details["budget"]["reached"] == pytest.approx(1.3, rel=0.25)


def test_a_pass_that_was_killed_ends_in_the_same_student(tmp_path: Path) -> None:
    """What was timed is replayed, though the machine has become another one since."""
    model, task = deep(), task_of(deep(), (64,))
    config = Factorize(latency_ratio=1.4, max_divergence=10, multiple=4)

    def run(name: str, price: float, most: int = 1 << 30) -> Program:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        calls: list[int] = []
        program = timed(model, price, calls, folder=folder, journal=Journal(folder / "journal.jsonl"))
        latency = program.run.oracle.latency  # type: ignore[union-attr]

        def limited(student: nn.Module) -> float:
            if len(calls) == most:
                raise KeyboardInterrupt
            return latency(student)

        program.run.oracle.latency = limited  # type: ignore[union-attr, method-assign]
        return run_passes(program, task, [config])

    whole = run("whole", 0.3)
    timings = [key for key in Journal(tmp_path / "whole" / "journal.jsonl").decisions if "latency" in key]
    assert len(timings) > 10
    for most in (1, 7, len(timings) - 1):
        with pytest.raises(KeyboardInterrupt):
            run(f"killed{most}", 0.3, most)
        resumed = run(f"killed{most}", 0.3)
        assert resumed.plan == whole.plan and resumed.records[0].details == whole.records[0].details
        states = resumed.student.state_dict(), whole.student.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_what_cuts_afterwards_counts_the_channels_of_the_layer_that_was_split() -> None:
    model = trained(resnet((2, 2), 16))
    task = task_of(model, (3, 8, 8))
    program = program_of(model)
    cuts = [
        {"module": "layer1.0.conv1", "dim": "out", "indices": [1, 2], "of": 16},
        {"module": "layer1.0.bn1", "dim": "out", "indices": [1, 2], "of": 16},
        {"module": "layer1.0.conv2", "dim": "in", "indices": [1, 2], "of": 16},
    ]
    program = program.rewrite(cut_channels, task.example, cuts=cuts)
    program = Factorize(max_divergence=100, ranks=(0.5,), multiple=2).apply(program, task)
    assert {"layer1.0.conv1", "layer1.0.conv2"} <= program.details["ranks"].keys()
    before = len(program.plan)
    program = Prune(parameters_ratio=2.5, multiple=2).apply(program, task)
    cut = {(c["module"], c["dim"]): c for r in program.plan[before:] for c in r.arguments["cuts"]}
    later = cut["layer1.0.conv1.expand", "out"]
    survivors = [c for c in range(16) if c not in (1, 2)]
    want = [c for i, c in enumerate(survivors) if i not in later["indices"]]
    for name in ("layer1.0.conv1", "layer1.0.conv1.expand"):
        assert kept_channels(program.plan, name) == want
    assert kept_channels(program.plan, "layer1.0.conv2.reduce", "in") == want
    assert program.details["widths"]["layer1.0.conv1.expand"] == [16, len(want)]
    between = next(g for g in check_groups(program.student, task.example) if g.name == "layer1.0.conv1.reduce")
    assert between.reason is None, "the channels between the halves may be cut as any"
    assert program.student(task.example[0]).shape == (2, 10)


def test_an_encoder_whose_queries_are_split_loses_heads_and_channels_as_before() -> None:
    model = trained(Encoder(64, 4))
    task = task_of(model, (7, 12))
    program = Factorize(max_divergence=100, ranks=(0.5,), multiple=8).apply(program_of(model), task)
    assert {"q", "k", "v", "o", "down"} <= program.details["ranks"].keys()
    groups = {g.name: g for g in check_groups(program.student, task.example)}
    assert groups["q.expand"].reason is None and "o.reduce" in groups["q.expand"].layers
    assert groups["down.expand"].reason is None, "the channels around the attention"


RECIPE = (
    Factorize(max_divergence=100, ranks=(0.5,), multiple=2, layers=("layer1", "layer2")),
    Prune(parameters_ratio=2.0, multiple=2, floor=0.5),
    Distill(epochs=1, terms=(KLDivergence(), Hint(point="layer1.0.conv1"), Hint(point="layer2.1"))),
    Capture(),
    Quantize(samples=32),
    Distill(epochs=1, learning_rate=1e-3, terms=(KLDivergence(), Hint(point="layer1.0.bn1"))),
    Convert(),
)


@pytest.mark.slow
def test_a_split_student_survives_everything_that_follows(tmp_path: Path) -> None:
    """Pruning, distillation at its points, quantization, and the file, which computes what the graph does."""
    model = trained(resnet((1, 2), 16))
    task = task_of(model, (3, 8, 8))
    program = run_passes(program_of(model, folder=tmp_path), task, RECIPE)
    assert program.stage == Stage.INT8
    layers = {n.meta.get("layer") for n in program.student.graph.nodes}  # type: ignore[union-attr]
    assert {"layer1.0.conv1.reduce", "layer1.0.conv1.expand"} <= layers
    emit_onnx_for(program.student, task, tmp_path / "model.onnx")
    x = data((3, 8, 8), 32)
    with torch.no_grad():
        want, got = program.student(x), OnnxModel(tmp_path / "model.onnx", model(x))(x)
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())
    assert float((got.argmax(1) == want.argmax(1)).float().mean()) >= 0.97
    save(program, tmp_path / "again")
    again = load(program, task, tmp_path / "again", REWRITES)
    assert torch.equal(again.student(x), program.student(x))


@pytest.mark.slow
def test_a_compile_with_splits_has_parity_and_its_artifact_rebuilds_the_student(tmp_path: Path) -> None:
    model = trained(resnet((1, 2), 16))
    task = task_of(model, (3, 8, 8))
    # a budget in MACs: what a split of such layers saves in time depends on what else runs here
    split = Factorize(macs_ratio=1.3, best_effort=True, ranks=(0.5,), multiple=2, layers=("layer1", "layer2"))
    prune = Prune(parameters_ratio=4.0, multiple=2, floor=0.25)
    recipe = Recipe(passes=(split, prune, *RECIPE[2:]))
    artifact = compress(model, task, recipe, "x86-avx2", tmp_path / "out", evaluation=TABLE)
    rows = {row.variant: row for row in artifact.report.attribution}
    assert 0 < (rows["pruned"].macs or 0) < (rows["factorized"].macs or 0) < (rows["teacher_fp32"].macs or 0)
    assert rows["factorized"].metric is not None and artifact.report.parity.passed
    again, x = Artifact.load(tmp_path / "out"), data((3, 8, 8), 32)
    with torch.no_grad():
        want = again.rebuild(model)(x)
    assert float((torch.as_tensor(again.run(x)) - want).abs().max()) <= 0.05 * float(want.abs().max())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "nothing says how much to split; give one of macs_ratio, .* or max_divergence"),
        ({"macs_ratio": 2, "latency_ratio": 2}, "one budget at most; macs_ratio and latency_ratio are given"),
        ({"macs_ratio": 2, "ranks": (0.5, 1.0)}, "ranks = 1 is no share between 0 and 1"),
        ({"macs_ratio": 2, "layers": ()}, "layers names none"),
        ({"macs_ratio": 0.5}, "greater than 1"),
        ({"max_divergence": 0}, "greater than 0"),
        ({"macs_ratio": 2, "rank": 8}, "rank"),
    ],
)
def test_wrong_configurations_are_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Factorize(**fields)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"macs_ratio": 40},
            "factorize: macs_ratio = 40 cannot be met: the student, all split, is .* times less.*raise ",
        ),
        (
            {"macs_ratio": 1.5, "max_divergence": 1e-6},
            "cannot be met: the student, split as far as max_divergence = 1e-06 allows, is 1 times less",
        ),
        ({"macs_ratio": 1.5, "layers": ("6",), "multiple": 64}, "Not split are 6: it is too small"),
        ({"macs_ratio": 1.5, "layers": ("head",)}, 'layers = "head" names no linear or convolution layer'),
        ({"latency_ratio": 1.5}, "factorize.latency_ratio: a latency budget needs the target's runtime"),
    ],
)
def test_budgets_that_cannot_be_met_say_what_can(fields: dict[str, Any], what: str) -> None:
    model = deep()
    with pytest.raises(InputError, match=what):
        Factorize(**{"multiple": 4, **fields}).apply(program_of(model), task_of(model, (64,)))


def test_best_effort_goes_as_far_as_is_allowed() -> None:
    model = deep()
    task = task_of(model, (64,))
    far = Factorize(macs_ratio=40, best_effort=True, multiple=4).apply(program_of(model), task)
    assert far.details["ranks"] == {"0": 8, "2": 8, "4": 4, "6": 4}
    assert any(d.layer == "*" and "macs_ratio = 40 is out of reach" in d.reason for d in far.declined)
    near = Factorize(macs_ratio=40, best_effort=True, max_divergence=0.02, multiple=4).apply(program_of(model), task)
    now, then = near.details["divergence"]
    assert near.details["ranks"].keys() < {"0", "2", "4", "6"} and then - now <= 0.02 < far.details["divergence"][1]
    done = Factorize(macs_ratio=1.2).apply(Program.begin(model, Target.named("x86-avx2"), far.run, far.student), task)
    assert not done.plan and "already meets the budget" in done.declined[0].reason


def test_a_plan_for_another_network_is_refused() -> None:
    with pytest.raises(InputError, match='splitting "1" .ReLU. into rank 4: only a plain linear or convolution layer'):
        split_layers(deep(), (), splits=[{"layer": "1", "rank": 4}])


def test_ranks_are_multiples_below_the_rank_that_costs_as_much() -> None:
    assert ranks_of(nn.Linear(256, 64), (0.9, 0.5, 0.1), 8) == (40, 24)  # 51.2 costs as much; 5 is below 8
    assert ranks_of(nn.Conv2d(64, 64, 3), (0.75, 0.5), 16) == (32, 16)  # 57.6: 43.2 and 28.8
    assert ranks_of(nn.Linear(8, 8), (0.75,), 8) == ()
    none, why = find_layers(nn.Sequential(nn.ReLU()), (data((4,), 2),), ("*",), (0.5,), 8)
    assert none == [] and "no linear or convolution layer" in why["*"]
