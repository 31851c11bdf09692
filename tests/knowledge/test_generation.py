"""Continuing texts: the two ways of reading agree, what is drawn has the probabilities, and what refuses says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_decoder import VOCABULARY, small_decoder
from torch import Tensor

from pqk.errors import InputError
from pqk.knowledge.answers.generation import Ends, Mixing, TokenSampling, drawn, generate, next_probabilities
from pqk.models.decoder import Decoder

PROMPTS = [torch.tensor(p) for p in ([1, 5, 9, 33], [1, 40], [1, 7, 8, 9, 10, 11, 12])]
ENDS = Ends((2,), 48)
SEEDS = [3, 4, 5]


def whole(model: Decoder) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as one that cannot read on."""
    return lambda ids, mask: model(ids, mask)


WAYS = {
    "greedy": TokenSampling(max_new_tokens=20, temperature=0),
    "sampled": TokenSampling(max_new_tokens=20),
    "nucleus": TokenSampling(max_new_tokens=20, temperature=0.8, top_p=0.7),
    "top k": TokenSampling(max_new_tokens=20, temperature=1.3, top_k=5),
}


@pytest.mark.parametrize("way", WAYS)
def test_reading_on_is_reading_all_again(way: str) -> None:
    model = small_decoder()
    cached, again = (generate(m, PROMPTS, WAYS[way], SEEDS, ENDS) for m in (model, whole(model)))
    assert all(torch.equal(a, b) for a, b in zip(cached, again, strict=True))
    assert all(1 <= len(a) <= 20 for a in cached)


def test_windows_and_layers_of_two_kinds_read_on_alike() -> None:
    from pqk.models.hub import quietly

    with quietly() as transformers, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            vocab_size=VOCABULARY, max_position_embeddings=48, use_sliding_window=True, sliding_window=4,
            max_window_layers=1, initializer_range=0.3,
        )  # fmt: skip
        model = Decoder(transformers.Qwen2ForCausalLM(config)).eval()
    assert model.near is not None
    way = WAYS["sampled"]
    cached, again = (generate(m, PROMPTS, way, SEEDS, ENDS) for m in (model, whole(model)))
    assert all(torch.equal(a, b) for a, b in zip(cached, again, strict=True))


def test_an_answer_does_not_depend_on_its_batch_and_nothing_else_is_drawn() -> None:
    model, way = small_decoder().train(), WAYS["sampled"]
    before = torch.get_rng_state()
    together = generate(model, PROMPTS, way, SEEDS, ENDS)
    alone = [generate(model, [p], way, [s], ENDS)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert torch.equal(before, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert any(
        not torch.equal(a, b) for a, b in zip(together, generate(model, PROMPTS, way, [6, 7, 8], ENDS), strict=True)
    )


def test_an_answer_ends_at_its_token_or_where_there_is_no_room() -> None:
    def counting(ids: Tensor, mask: Tensor) -> Tensor:
        """Each token is followed by the next number."""
        return 100.0 * torch.nn.functional.one_hot((ids + 1).clamp(max=19), 20).float()

    prompts = [torch.tensor([3]), torch.tensor([1, 2, 3, 8])]
    way = TokenSampling(max_new_tokens=6, temperature=0)
    assert [a.tolist() for a in generate(counting, prompts, way, [0, 0], Ends((10,)))] == [[4, 5, 6, 7, 8, 9], [9, 10]]
    short = generate(counting, prompts, way, [0, 0], Ends((), 5))
    assert [a.tolist() for a in short] == [[4, 5, 6, 7], [9]]
    with pytest.raises(InputError, match="prompt 1 has 4 tokens, and a text may have 1 to 4"):
        generate(counting, prompts, way, [0, 0], Ends((), 4))
    with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
        generate(counting, [torch.tensor([], dtype=torch.int64)], way, [0], Ends())


def test_probabilities_are_cut_as_said() -> None:
    """In numbers: p = .5, .3, .15, .05."""
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()[:, [2, 0, 3, 1]]

    def of(**fields: float) -> list[float]:
        return next_probabilities(scores, TokenSampling(**fields))[0].tolist()  # type: ignore[arg-type]

    assert of() == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=1e-6)
    assert of(temperature=0) == [0, 1, 0, 0]
    assert of(top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=1e-6)
    assert of(top_p=0.79) == pytest.approx([0, 0.625, 0, 0.375], abs=1e-6)
    assert of(top_p=0.81) == pytest.approx([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], abs=1e-6)
    squares = [p**2 for p in (0.15, 0.5, 0.05, 0.3)]
    assert of(temperature=0.5) == pytest.approx([p / sum(squares) for p in squares], abs=1e-6)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64).expand(1000, 6)
    tokens = drawn(p, (torch.arange(1000) + 0.5).double() / 1000)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 200, 0, 500, 300, 0]
    ends = drawn(p[:2], torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [1, 4]  # never a token without any


def test_two_models_draw_from_the_mean_of_their_probabilities() -> None:
    def always(token: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda ids, mask: 100.0 * torch.nn.functional.one_hot(torch.full_like(ids, token), 8).float()

    prompts = [torch.tensor([1])] * 50
    answers = generate(always(3), prompts, TokenSampling(max_new_tokens=40), range(50), Ends(), always(6), Mixing(0.2))
    tokens = torch.cat(answers)
    assert set(tokens.tolist()) == {3, 6} and float((tokens == 6).float().mean()) == pytest.approx(0.2, abs=0.03)
