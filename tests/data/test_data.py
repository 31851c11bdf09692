"""Data: order, augmentation and identity are functions of a seed, and bad data is refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset

from pqk.data.data import ArrayData, Batch, Data, LoaderData, as_data, split
from pqk.data.structures import map_tensors
from pqk.errors import InputError
from pqk.models.images import CropFlip, Normalize


def images(count: int = 10, batch_size: int = 4, views: int | None = 3) -> ArrayData:
    pixels = torch.arange(count * 3 * 6 * 6).remainder(251).to(torch.uint8).view(count, 3, 6, 6)
    return ArrayData(pixels, torch.arange(count) % 4, batch_size, augment=CropFlip(count, pad=2), views=views)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments with torch's global generator, as most data sets do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.full((2,), float(i)) + torch.rand(2), torch.tensor(i)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True)) and torch.equal(a.targets, b.targets)


def sources() -> dict[str, Callable[[], Data]]:
    return {
        "array": images,
        "unbounded": lambda: images(views=None),
        "loader": lambda: LoaderData(DataLoader(Noisy(), batch_size=3, shuffle=True)),
        "list": lambda: LoaderData([(torch.full((2, 1), float(i)), torch.tensor([i, i])) for i in range(4)]),
    }


@pytest.mark.parametrize("kind", sources())
def test_an_epoch_entered_in_the_middle_is_the_same_epoch(kind: str) -> None:
    """Also where the data set draws from the generator that the model's dropout draws from."""
    data, states, whole = sources()[kind](), [], []
    for batch in data.batches(seed=5, epoch=2):
        whole.append(batch)
        torch.rand(3)  # a model's dropout
        states.append(torch.get_rng_state())
    assert len(whole) == len(data) > 2
    for start in range(1, len(data)):
        torch.manual_seed(99)
        rest = data.batches(seed=5, epoch=2, start=start, state=states[start - 1])
        for i, batch in enumerate(rest, start):
            assert same(batch, whole[i])
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), states[-1])


@pytest.mark.parametrize("kind", ["array", "loader"])
def test_the_order_is_a_function_of_the_seed(kind: str) -> None:
    data = sources()[kind]()

    def order(seed: int | None) -> list[int]:
        if kind == "array" and seed is None:  # in the stored order
            return torch.cat([b.targets for b in data.batches()]).tolist()
        return torch.cat([b.targets if kind == "loader" else b.keys // 3 for b in data.batches(seed)]).tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(10))
    assert order(None) == order(None)


def test_the_same_sample_and_view_is_the_same_tensor() -> None:
    """In any batch, order and epoch that has it; and another view is another tensor."""
    data, found = images(), {}
    for seed, epoch in itertools.product((1, 2), range(6)):
        for batch in data.batches(seed, epoch):
            assert batch.keys is not None
            assert bool((batch.keys % 3 == epoch % 3).all())  # `views` bounds them
            for key, x in zip(batch.keys.tolist(), batch.inputs[0], strict=True):
                assert torch.equal(found.setdefault(key, x), x)
    assert sorted(found) == list(range(data.key_count or 0)) == list(range(30))
    assert len({x.numpy().tobytes() for x in found.values()}) > 20


def test_a_stored_sample_is_none_of_its_augmented_views() -> None:
    """A teacher's answer to it must not be taken for the answer to the first view."""
    assert next(images().batches()).keys is None and next(images().batches(seed=0)).keys is not None
    plain = images().subset(torch.arange(4), augmented=False)
    assert torch.equal(next(plain.batches()).keys, torch.arange(4))


def test_unbounded_views_have_no_keys() -> None:
    data = images(views=None)
    assert data.key_count is None and "views=N" in data.unkeyed_reason
    first = [next(data.batches(1, epoch)).inputs[0] for epoch in range(3)]
    assert not torch.equal(first[0], first[1]) and next(data.batches(1)).keys is None


def test_preparation_follows_augmentation_and_nothing_is_augmented_without_a_seed() -> None:
    data = images()
    data.prepare = Normalize((0.5,) * 3, (0.25,) * 3)
    stored = torch.cat([b.inputs[0] for b in data.batches()])
    torch.testing.assert_close(stored, (data.inputs[0].float() / 255 - 0.5) / 0.25)


def test_crops_are_windows_of_the_padded_image() -> None:
    x = torch.arange(1, 50, dtype=torch.float32).view(1, 1, 7, 7)
    padded = torch.nn.functional.pad(x, (2,) * 4)
    windows = [padded[:, :, i : i + 7, j : j + 7] for i in range(5) for j in range(5)]
    windows += [w.flip(3) for w in windows]
    for view in range(20):
        (crop,) = CropFlip(1, pad=2)((x,), torch.tensor([0]), view)
        assert any(torch.equal(crop, w) for w in windows)


def test_split_is_disjoint_deterministic_and_the_held_out_part_is_as_stored() -> None:
    data = images(count=20)
    rest, held = split(data, 0.25, seed=3)
    again = split(images(count=20), 0.25, seed=3)
    assert isinstance(rest, ArrayData) and isinstance(held, ArrayData)
    assert torch.equal(held.ids, again[1].ids) and (rest.samples, held.samples) == (15, 5)  # type: ignore[attr-defined]
    assert sorted([*rest.ids.tolist(), *held.ids.tolist()]) == list(range(20))
    for batch in held.batches(seed=1, epoch=1):
        assert batch.keys is not None
        assert torch.equal(batch.inputs[0], data.inputs[0][batch.keys])  # one view: the stored one


def test_split_of_a_loader_keeps_what_the_user_meant() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0)[:, None], torch.arange(10)), 3, shuffle=True, drop_last=True)
    rest, held = split(LoaderData(loader), 0.3)
    found = [torch.cat([b.targets for b in d.batches(1)]).tolist() for d in (rest, held)]
    assert len(found[0]) == 6 and len(found[1]) == 3 and not set(found[0]) & set(found[1])  # 7 left, the last dropped
    chosen = DataLoader(TensorDataset(torch.arange(10.0)), 2, sampler=SubsetRandomSampler(range(4)))
    with pytest.raises(InputError, match="cannot be split"):
        split(LoaderData(chosen), 0.5)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 0.99])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="hold out|held out"):
        split(images(), share)


def test_a_private_generator_is_no_mid_epoch_resume_and_says_why() -> None:
    dataset = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))
    private = torch.Generator().manual_seed(0)
    for loader in (
        DataLoader(dataset, 2, shuffle=True, generator=private),
        DataLoader(dataset, 2, sampler=RandomSampler(dataset, generator=private)),
    ):
        data = LoaderData(loader)
        assert data.resume_reason is not None and "generator" in data.resume_reason
        assert data.fingerprint() == data.fingerprint()
    assert LoaderData(DataLoader(dataset, 2, shuffle=True)).resume_reason is None
    assert images().resume_reason is None


def poisoned(where: int) -> Tensor:
    x = torch.zeros(6, 2)
    x[where, 1] = float("nan")
    return x


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.zeros(1)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArrayData(poisoned(4), None), "input 0 of sample 4 is NaN"),
        (lambda: ArrayData(poisoned(4)[:, 1], None), "input 0 of sample 4 is NaN"),
        (lambda: ArrayData((torch.zeros(6), poisoned(2)), None), "input 1 of sample 2"),
        (lambda: ArrayData(torch.zeros(6, 1), poisoned(3)), "the target of sample 3"),
        (lambda: ArrayData(torch.zeros(5, 2), torch.zeros(4)), r"different lengths: \[5, 4\]"),
        (lambda: ArrayData(torch.zeros(0, 2), torch.zeros(0)), "no samples"),
        (lambda: ArrayData(torch.zeros(2, 2), None, 0), "batch_size=0"),
        (lambda: ArrayData(torch.zeros(2, 2), None, views=0), "views=0"),
        (lambda: as_data(iter([torch.zeros(2)]), "train"), "one-shot iterator"),
        (lambda: as_data((b for b in [torch.zeros(2)]), "train"), "one-shot iterator"),
        (lambda: as_data([], "train"), "the loader is empty"),
        (lambda: as_data(DataLoader(TensorDataset(torch.zeros(0, 2))), "train"), "the loader is empty"),
        (lambda: as_data(DataLoader(Stream()), "train"), "Stream has no length"),
        (lambda: as_data(3, "task train"), "task train: a int is no data"),
        (lambda: as_data([{"x": torch.zeros(2)}], "train"), "batch 0 is a dict"),
        (lambda: [*as_data([torch.zeros(6, 2), poisoned(5)], "train").batches()], "batch 1: input 0 of sample 5"),
    ],
)
def test_bad_data_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_fingerprints_differ_where_the_data_does() -> None:
    base = images()
    others = [
        images(count=11),
        images(batch_size=5),
        images(views=2),
        images(views=None),
        base.subset(torch.arange(5), augmented=True),
    ]
    changed = images()
    changed.inputs[0][3, 0, 0, 0] += 1
    digests = [d.fingerprint() for d in (base, *others, changed)]
    assert len(set(digests)) == len(digests) and images().fingerprint() == base.fingerprint()
    batches = [(torch.zeros(2, 1), torch.tensor([0, 1]))]
    relabelled = [(torch.zeros(2, 1), torch.tensor([1, 0]))]
    assert LoaderData(batches).fingerprint() != LoaderData(relabelled).fingerprint()


def test_tensors_in_structures_are_mapped() -> None:
    value = {"a": torch.ones(2), "b": (torch.ones(1), [torch.ones(3), "text"])}
    assert map_tensors(len, value) == {"a": 2, "b": (1, [3, "text"])}
    assert map_tensors(len, Batch((torch.ones(4),), None, None)) == Batch((4,), None, None)  # type: ignore[arg-type]


def test_inputs_alone_are_unlabelled_however_they_come() -> None:
    """A `TensorDataset` of inputs alone gives lists of one tensor."""
    inputs = torch.arange(6.0).view(3, 2)
    for loader in (DataLoader(TensorDataset(inputs), 3), [inputs], [(inputs,)]):
        data = LoaderData(loader)
        (batch,) = data.batches()
        assert data.samples == 3 and not data.labelled
        assert len(batch.inputs) == 1 and torch.equal(batch.inputs[0], inputs)


def test_samples_are_counted() -> None:
    dataset = TensorDataset(torch.zeros(7, 2))
    assert LoaderData(DataLoader(dataset, 3)).samples == 7
    assert LoaderData(DataLoader(dataset, 3, sampler=SubsetRandomSampler(range(4)))).samples == 4
    assert LoaderData([torch.zeros(3, 2), torch.zeros(2, 2)]).samples == 5


def test_a_loader_that_drops_its_last_batch_has_the_samples_that_it_gives() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(95, 2), torch.zeros(95)), batch_size=32, drop_last=True)
    data = LoaderData(loader)
    assert data.samples == 64 == sum(len(b.inputs[0]) for b in data.batches())


@pytest.mark.parametrize("target", [["a", "b"], (1, 2), np.zeros(2), {"x": [1.0, 2.0]}])
def test_targets_that_are_no_tensors_are_refused_by_their_type(target: Any) -> None:
    with pytest.raises(InputError, match="batch 0: the target has a (str|int|ndarray|float)"):
        next(LoaderData([(torch.zeros(2, 3), target)]).batches())
