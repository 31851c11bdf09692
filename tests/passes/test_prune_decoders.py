"""Pruning of causal models: groups of heads, hidden units, residual width, layers. Laws and known answers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from decoders import FAMILIES, layers_of, small_decoder, texts
from pruning import program_of

from pqk.core.program import Program, replay
from pqk.deploy.generation import places, with_past
from pqk.errors import InputError
from pqk.models.decoder import Decoder
from pqk.passes import Prune
from pqk.passes.capture.capture import capture
from pqk.passes.prune.blocks import find_blocks
from pqk.passes.prune.channel_group import ChannelGroup, merge_cuts
from pqk.passes.prune.cuts import cut_channels, drop_block
from pqk.passes.prune.groups import find_groups
from pqk.passes.prune.law import check_groups, masked
from pqk.task.task import Task

AXES = (("batch", "sequence"), ("batch", "sequence"))
SLOW = [pytest.param(name, marks=pytest.mark.full) for name in FAMILIES if name != "llama"]


def groups_of(decoder: Decoder) -> dict[str, list[ChannelGroup]]:
    """The groups that may be cut: heads of the layers, hidden units of the layers, the residual stream."""
    found: dict[str, list[ChannelGroup]] = {"heads": [], "units": [], "width": []}
    for group in find_groups(decoder, texts()):
        attention = [m for m in group.members if m.dim == "heads"]
        kind = "heads" if any(any(m.places) for m in attention) else "width" if attention else "units"
        if group.reason is None and group.channels != 100:
            found[kind].append(group)
    return found


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def llama() -> Decoder:
    return small_decoder("llama")


# ---- what goes together


def test_a_group_of_keys_and_values_goes_with_its_query_heads(llama: Decoder) -> None:
    heads = groups_of(llama)["heads"]
    assert [len(g.units) for g in heads] == [2, 2, 2]
    attention = "model.model.layers.1.self_attn"
    cuts = {(c["module"].removeprefix(f"{attention}."), c["dim"]): c for c in heads[1].cuts(heads[1].units[1])}
    assert cuts["q_proj", "out"]["indices"] == [*range(16, 32)] == cuts["o_proj", "in"]["indices"]
    assert cuts["k_proj", "out"]["indices"] == [*range(8, 16)] == cuts["v_proj", "out"]["indices"]
    assert cuts[attention, "heads"] | {"module": ""} == {
        "module": "", "dim": "heads", "indices": [1], "of": 2, "size": 8, "share": 2,
    }  # fmt: skip


def test_without_a_group_the_others_attend_as_before(llama: Decoder) -> None:
    """Against the whole model whose heads say nothing, which is another way than the law's."""
    group = groups_of(llama)["heads"][0]
    student = cut_channels(copy.deepcopy(llama), texts(), cuts=group.cuts(group.units[0]))
    silent = copy.deepcopy(llama)
    with torch.no_grad():
        layers_of(silent)[0].self_attn.o_proj.weight[:, :16] = 0
        close(student(*texts()), silent(*texts()))
        assert (student(*texts()) - llama(*texts())).abs().max() > 0.1
    attention = layers_of(student)[0].self_attn
    assert (attention.config.num_attention_heads, attention.config.num_key_value_heads) == (2, 1)
    assert layers_of(student)[1].self_attn.config.num_attention_heads == 4
    second = next(g for g in groups_of(student)["heads"] if g.name.startswith("model.model.layers.1"))
    again = cut_channels(student, texts(), cuts=second.cuts(second.units[0]))
    assert [layer.self_attn.q_proj.out_features for layer in layers_of(again)] == [16, 16, 32]
    with torch.no_grad():
        assert again(*texts()).isfinite().all()


def test_a_layer_made_as_one_is_cut_in_its_parts() -> None:
    """GPT-2 makes queries, keys and values side by side; GPT-NeoX head by head."""
    for family, name, rows in (
        ("gpt2", "attn.c_attn", [*range(8, 16), *range(40, 48), *range(72, 80)]),
        ("gpt_neox", "attention.query_key_value", [*range(24, 48)]),
    ):
        group = groups_of(small_decoder(family))["heads"][0]
        assert [c["indices"] for c in group.cuts(group.units[1]) if c["module"].endswith(name)] == [rows]


def test_one_group_of_all_heads_stays_whole() -> None:
    decoder = small_decoder("llama", num_key_value_heads=1)
    reasons = {c.name.rpartition(".")[2]: c.reason for c in check_groups(decoder, texts()) if "self_attn" in c.name}
    assert reasons == {"q_proj": "its channels can only go all together"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", *SLOW])
def test_what_is_cut_computes_what_is_left(family: str) -> None:
    """A group of heads of one layer, hidden units of another, residual width and a layer; free sizes, and a cache."""
    decoder, example = small_decoder(family), texts()
    groups = groups_of(decoder)
    assert [len(each) for each in groups.values()] == [3, 3, 1]
    heads, units, width = groups["heads"][0], groups["units"][1], groups["width"][0]
    width_cuts = width.cuts(range(1, 32, 4))
    cuts = merge_cuts([*heads.cuts(heads.units[0]), *units.cuts(range(3, 19)), *width_cuts])
    with torch.no_grad(), masked(decoder, cuts):
        want = decoder(*example)
    student = cut_channels(copy.deepcopy(decoder), example, cuts=cuts)
    with torch.no_grad():
        close(student(*example), want)
        assert (want - decoder(*example)).abs().max() > 0.1
    table, head = student.model.get_input_embeddings(), student.model.get_output_embeddings()
    assert (head.weight is table.weight) == decoder.model.config.tie_word_embeddings
    assert table.weight.shape == (100, 24) == head.weight.shape
    blocks, declined = find_blocks(student, example)
    assert len(blocks) == 3 and not declined
    student = drop_block(student, example, block=blocks[1].path, returns=blocks[1].returns)
    runs_free_and_continues(student)


def runs_free_and_continues(student: Decoder) -> None:
    ids, mask = texts()
    graph = capture(student, (ids, mask), axes=AXES)
    whole = torch.ones_like(ids)
    with torch.no_grad():
        close(graph(ids[:1, :7], mask[:1, :7]), student(ids[:1, :7], mask[:1, :7]))
        want, where = student(ids, whole), places(whole)
        continuing, cache = with_past(graph)
        got, *past = continuing(ids[:, :8], whole[:, :8], where[:, :8], *cache.empty(2))
        close(got, want[:, :8])
        for t in range(8, 15):
            got, *past = continuing(ids[:, t : t + 1], whole[:, : t + 1], where[:, t : t + 1], *past)
            close(got, want[:, t : t + 1])
    assert len({entry.groups for entry in cache.entries}) == 2, "layers keep different numbers of groups"


@pytest.mark.slow
def test_a_model_of_a_window_goes_on_without_the_layers_that_see_all() -> None:
    """Gemma 2's layers are of two kinds, which the model asks each of."""
    decoder = small_decoder("gemma2")
    block = find_blocks(decoder, texts())[0][1]
    decoder = drop_block(decoder, texts(), block=block.path, returns=block.returns)
    assert layers_of(decoder)[1].attention_type == "full_attention"
    graph = capture(decoder, texts(), axes=AXES)
    continuing, cache = with_past(graph)
    ids, _ = texts()
    with torch.no_grad():
        got, *_ = continuing(ids, torch.ones_like(ids), places(torch.ones_like(ids)), *cache.empty(2))
        close(got, decoder(ids, torch.ones_like(ids)))


# ---- norms


class Rms(nn.Module):
    def __init__(self, width: int, forward: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Summing(Rms):
    """Not of one size, whatever it gets: a channel that is gone is missed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.mean(-1, keepdim=True)


class Stream(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), norm, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize(("norm", "width"), [(Rms(16), 12), (nn.RMSNorm(16), 12), (Summing(16), 16)])
def test_norms_of_any_make_take_their_statistics_over_what_is_left(norm: nn.Module, width: int) -> None:
    torch.manual_seed(0)
    model, x = Stream(norm).eval(), torch.randn(2, 6)
    (check,) = (c for c in check_groups(model, (x,)) if c.name == "first")
    assert (check.reason is None) == (width == 12), check.reason
    if width == 12:
        group = next(g for g in find_groups(model, (x,)) if g.name == "first")
        student = cut_channels(copy.deepcopy(model), (x,), cuts=group.cuts(range(0, 16, 4)))
        kept = [c for c in range(16) if c % 4]
        hidden = model.first(x)[:, kept]
        scaled = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * norm.weight[kept]
        close(student(x), scaled @ model.last.weight[:, kept].T + model.last.bias)


# ---- the pass


def language(rows: int = 12, vocabulary: int = 100) -> Task:
    """Next tokens of random texts of two lengths, padded."""
    from pqk.models.answer_match import LIKELIHOOD
    from pqk.models.language import Text, choice, next_tokens
    from pqk.task.kept_tokens import kept

    draw = torch.Generator().manual_seed(2)
    tokens = [torch.randint(3, vocabulary, (9 + i % 4,), generator=draw).tolist() for i in range(rows)]
    data = next_tokens([Text(row) for row in tokens], 4, 0)
    names = ("input_ids", "attention_mask")
    free = {name: {0: "batch", 1: "sequence"} for name in names}
    judged: dict[str, Any] = {"metric": LIKELIHOOD, "decision": choice, "kept": kept, "class_axis": 2}
    shown: dict[str, Any] = {"example": texts(), "input_names": names, "dynamic_axes": free}
    timed = {"a prompt of 15 tokens": texts()}
    return Task(data, data, data, generates=True, timed=timed, **judged, **shown)


class Clock:
    """An oracle by parameters: a token takes a nanosecond for each, a prompt as many as it has tokens."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.asked: list[str] = []

    def latency(self, student: nn.Module, timed: str = "") -> float:
        self.asked.append(timed)
        return 1e-6 * sum(p.numel() for p in student.parameters()) * (15 if timed else 1)

    def baseline(self, timed: str = "") -> float:
        return self.latency(self.teacher, timed)


@pytest.mark.parametrize(("pattern", "name"), [("", ""), ("a prompt *", "a prompt of 15 tokens")])
def test_a_budget_is_of_a_token_or_of_a_prompt(llama: Decoder, pattern: str, name: str) -> None:
    clock, task = Clock(llama), language()
    program = program_of(copy.deepcopy(llama), oracle=clock)
    program = Prune(latency_ratio=1.2, timed=pattern, depth=True, width=False).apply(program, task)
    assert {*clock.asked} == {name}
    budget = program.details["budget"]
    assert budget["teacher"] == clock.baseline(name) and budget["reached"] >= 1.2


def test_a_budget_of_what_is_not_timed_is_refused(llama: Decoder) -> None:
    program = program_of(copy.deepcopy(llama), oracle=Clock(llama))
    with pytest.raises(InputError, match=r'timed = "a image" fits 0 of the inputs .*: a prompt of 15 tokens'):
        Prune(latency_ratio=1.2, timed="a image").apply(program, language())
    with pytest.raises(InputError, match="with latency_ratio as the budget"):
        Prune(macs_ratio=1.2, timed="a prompt *")


def pruned(decoder: Decoder, task: Task, **settings: Any) -> Program:
    return Prune(**settings).apply(program_of(copy.deepcopy(decoder)), task)


def test_layers_are_ranked_by_the_divergence_on_tokens_that_are_predicted(llama: Decoder) -> None:
    task = language()
    program = pruned(llama, task, parameters_ratio=1.2, depth=True, width=False)
    expected = {}
    with torch.no_grad():
        for i in range(3):
            other, total, count = drop_block(copy.deepcopy(llama), texts(), block=f"model.model.layers.{i}"), 0.0, 0
            for batch in task.validation.batches():
                want, got = (m(*batch.inputs).log_softmax(-1) for m in (llama, other))
                counted = batch.targets != -100
                total += float((want.exp() * (want - got)).sum(-1)[counted].sum())
                count += int(counted.sum())
            expected[f"model.model.layers.{i}"] = total / count
    rows = {row["name"]: row["distance"] for row in program.details["ranking"][0]["ranking"]}
    assert rows == pytest.approx(expected, rel=1e-4)
    assert program.details["blocks_removed"] == [min(expected, key=lambda name: expected[name])]


def test_what_follows_a_text_has_no_part_in_the_ranking(llama: Decoder) -> None:
    """Padding is masked: other tokens there change nothing."""
    task = language()
    batch = next(b for b in task.validation.batches() if bool((b.targets[:, :-1] == -100).any()))
    with torch.no_grad():
        answers = llama(*batch.inputs)
    noise = torch.randn_like(answers) * (batch.targets == -100)[..., None]
    assert task.distance(answers + noise, answers, batch.targets) == 0
    assert task.distance(answers + noise, answers) > 0.01


def test_alike_layers_stay_alike_where_that_is_asked_for(llama: Decoder) -> None:
    settings = {"parameters_ratio": 1.35, "multiple": 1, "importance": "activation"}
    sizes = []
    for scope in ("per_layer", "uniform"):
        student = pruned(llama, language(), scope=scope, **settings).student
        sizes.append([(m.self_attn.q_proj.out_features, m.mlp.up_proj.out_features) for m in layers_of(student)])
    assert len({*sizes[0]}) > 1, "this budget is met with layers that differ"
    assert len({*sizes[1]}) == 1 and sizes[1][0] < (32, 48)


def test_alike_layers_and_one_removal_after_the_other_are_refused() -> None:
    with pytest.raises(InputError, match='scope = "uniform" narrows all layers at once'):
        Prune(macs_ratio=2, scope="uniform", depth=True)


def test_the_plan_of_a_decoder_is_replayed(llama: Decoder) -> None:
    program = pruned(llama, language(), parameters_ratio=1.2, depth=True, width=False)
    program = Prune(parameters_ratio=1.8, importance="taylor").apply(program, language())
    assert program.details["blocks_removed"] and program.details["widths"]
    steps = json.loads(json.dumps([{"function": s.function, "arguments": s.arguments} for s in program.plan]))
    assert [s["function"] for s in steps] == [s.function for s in program.plan]
    again = replay(copy.deepcopy(llama), texts(), program.plan, {f.__name__: f for f in Prune.rewrites})
    with torch.no_grad():
        assert torch.equal(again(*texts()), program.student(*texts()))
