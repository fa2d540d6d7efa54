"""The fixed sample set."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_neuro import probe_set
from lightning_neuro.checks import ArgumentError
from lightning_neuro.class_choice import stratified
from lightning_neuro.dataset_facts import class_names_of, dataset_labels
from lightning_neuro.isolation import isolated_random_state
from lightning_neuro.probe_set import LoadedBatch


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are loaded in this process, so that what they count can be read."""
    monkeypatch.setattr("lightning_neuro.dataset_loading._can_fork", lambda: False)


def load_probe_set(*args: Any, **options: Any) -> Any:
    found = probe_set.load_probe_set(*args, **options)
    return None if found is None else found.batches


def numbered(count: int, labels: list[int] | None = None) -> TensorDataset:
    """Sample i is the number i; nine of ten are of class 0, the others of classes 1 and 2."""
    y = labels or [0 if i % 10 else 1 + (i // 10) % 2 for i in range(count)]
    return TensorDataset(torch.arange(float(count)), torch.tensor(y))


def ids(samples: Any) -> list[int]:
    """The numbers of the chosen samples."""
    return torch.cat([part.batch[0] for part in samples]).long().tolist()


def size(samples: list[LoadedBatch] | None) -> int:
    assert samples is not None
    return sum(len(part.keys) for part in samples)


def counts(samples: Any) -> Counter[int]:
    return Counter(torch.cat([part.batch[1] for part in samples]).tolist())


class Plain(Dataset[Any]):
    """A map-style dataset that tells no labels; counts what it loads."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return self.data[index]


class Told(Plain):
    """One that tells its labels as an attribute."""

    def __init__(self, data: TensorDataset, name: str, kind: Any) -> None:
        super().__init__(data)
        setattr(self, name, kind(data.tensors[1].tolist()))


class Stream(IterableDataset[Any]):
    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))  # type: ignore[arg-type]


# Choosing ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-2, 5), max_size=40))
def test_every_prefix_of_the_stratified_order_is_as_balanced_as_can_be(labels: list[int]) -> None:
    order = stratified(torch.tensor(labels, dtype=torch.long)).tolist()
    assert sorted(order) == list(range(len(labels)))
    total, seen = Counter(labels), Counter[int]()
    for position in order:
        seen[labels[position]] += 1
        top = max(seen.values())
        # A class has as many as any other, one fewer, or all that it has.
        assert all(seen[label] >= min(top - 1, total[label]) for label in total)
    of_class = {label: [i for i in order if labels[i] == label] for label in total}
    assert all(positions == sorted(positions) for positions in of_class.values())


def test_the_choice_is_balanced_and_fixed_by_the_seed() -> None:
    data = numbered(200)
    samples = load_probe_set(data, num_samples=24)
    assert counts(samples) == {0: 8, 1: 8, 2: 8}
    assert size(samples) == 24
    assert len(set(ids(samples))) == 24
    assert ids(load_probe_set(data, num_samples=24)) == ids(samples)
    assert ids(load_probe_set(data, num_samples=24, seed=1)) != ids(samples)
    # A rare class gives all it has.
    assert counts(load_probe_set(data, num_samples=60)) == {0: 40, 1: 10, 2: 10}


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_shards_are_disjoint_and_together_the_choice_of_one_process(world_size: int) -> None:
    data = numbered(100)
    whole = ids(load_probe_set(data, num_samples=20))
    shards = [ids(load_probe_set(data, num_samples=20, rank=r, world_size=world_size)) for r in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(
    "data",
    [
        Told(numbered(200), "targets", list),
        Told(numbered(200), "targets", torch.tensor),
        Told(numbered(200), "labels", np.array),
        Subset(Told(numbered(400), "targets", list), range(203, 400)),
        Subset(Subset(numbered(400), range(399, 99, -1)), range(1, 300, 1)),
        ConcatDataset(
            [Subset(numbered(400), range(100)), Told(Subset(numbered(200), range(100)).dataset, "targets", list)]
        ),
    ],
    ids=["targets-list", "targets-tensor", "labels-array", "subset", "subset-subset", "concat"],
)
def test_labels_are_found_without_loading(data: Any) -> None:
    labels = dataset_labels(data)
    assert labels is not None
    assert labels.tolist() == [int(data[i][1]) for i in range(len(data))]
    assert counts(load_probe_set(data, num_samples=15)) == {0: 5, 1: 5, 2: 5}


def test_labels_that_the_dataset_tells_cost_no_loading() -> None:
    data = Told(numbered(200), "targets", list)
    samples = load_probe_set(data, num_samples=12)
    assert data.loaded == ids(samples)


def test_labels_only_known_by_loading() -> None:
    data = Plain(numbered(60, [0, 0, 1] * 20))
    samples = load_probe_set(data, num_samples=10)
    assert counts(samples) == {0: 5, 1: 5}
    # Twice as many are looked at, then the chosen ones are loaded.
    assert len(data.loaded) == 30


@pytest.mark.parametrize(
    "found", [None, "text", ["cat", "dog"], [[1, 2], [3]], [0.5, 1.5], [1], torch.zeros(2, 3).long(), lambda: None]
)
def test_labels_that_are_none(found: Any) -> None:
    data = Plain(numbered(2))
    data.targets = found  # type: ignore[attr-defined]
    assert dataset_labels(data) is None
    assert sorted(ids(load_probe_set(data, num_samples=2))) == [0, 1]


def test_a_target_function_of_ones_own_is_asked_instead_of_the_dataset() -> None:
    data = numbered(100, [0] * 100)
    samples = load_probe_set(data, num_samples=10, target_fn=lambda batch: (batch[0] >= 50).long())
    assert sum(i >= 50 for i in ids(samples)) == 5


def test_unlabelled_and_regression_data_are_drawn_at_random() -> None:
    for data in (
        TensorDataset(torch.arange(100.0)),
        TensorDataset(torch.arange(100.0), torch.arange(100.0)),
        TensorDataset(torch.arange(100.0), torch.ones(100, 4, dtype=torch.long)),
    ):
        samples = load_probe_set(data, num_samples=20)
        assert len(set(ids(samples))) == 20 and ids(samples) != list(range(20))
        assert size(samples) == 20


def test_a_set_smaller_than_asked_for_is_taken_whole() -> None:
    samples = load_probe_set(numbered(7), num_samples=512)
    assert sorted(ids(samples)) == list(range(7)) and size(samples) == 7


@pytest.mark.parametrize(
    "source",
    [TensorDataset(torch.zeros(0, 2), torch.zeros(0).long()), Plain(numbered(0, [])), [], Stream(numbered(0, []))],
    ids=["tensors", "plain", "list", "stream"],
)
def test_an_empty_source_explains(source: Any) -> None:
    with pytest.raises(ArgumentError, match=r"no samples for rank 0 of 1 in the .*Probe\(source="):
        load_probe_set(source, num_samples=4)


@pytest.mark.parametrize(("size", "num_samples"), [(2, 10), (10, 2)])
def test_fewer_samples_than_ranks_is_an_error_on_every_rank(size: int, num_samples: int) -> None:
    for rank in range(3):
        with pytest.raises(ArgumentError, match=f"for rank {rank} of 3 in the TensorDataset"):
            load_probe_set(numbered(size), num_samples=num_samples, rank=rank, world_size=3)
    assert ids(load_probe_set(numbered(3), num_samples=3, rank=2, world_size=3))


# Loading -------------------------------------------------------------------------------------------------------------


def test_the_loader_keeps_its_batch_size_and_collate_function() -> None:
    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {"image": torch.stack([x for x, _ in items]) * 10, "label": torch.stack([y for _, y in items])}

    loader = DataLoader(numbered(50), batch_size=4, collate_fn=collate, drop_last=True, shuffle=True)
    samples = load_probe_set(loader, num_samples=10)
    assert [len(part.batch["image"]) for part in samples] == [4, 4, 2]
    assert size(samples) == 10
    assert all((part.batch["image"] % 10 == 0).all() for part in samples)


def test_a_huge_batch_size_is_cut() -> None:
    samples = load_probe_set(DataLoader(numbered(600), batch_size=600), num_samples=600)
    assert [len(part.batch[0]) for part in samples] == [256, 256, 88]


def test_only_what_the_sampler_draws_is_chosen() -> None:
    # As in the split of one dataset by two samplers: validation must not look at training samples.
    part = DataLoader(numbered(100), sampler=SubsetRandomSampler(range(90, 100)))
    assert sorted(ids(load_probe_set(part, num_samples=50))) == list(range(90, 100))
    assert set(ids(load_probe_set(part, num_samples=4))) < set(range(90, 100))
    batches = DataLoader(numbered(100), batch_sampler=[[1, 2], [3]])
    assert sorted(ids(load_probe_set(batches, num_samples=9))) == [1, 2, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_distributed_sampler_does_not_halve_the_choice(rank: int) -> None:
    sampler = DistributedSampler(numbered(20), num_replicas=2, rank=rank)
    loader = DataLoader(numbered(20), sampler=sampler)
    mine = ids(load_probe_set(loader, num_samples=20, rank=rank, world_size=2))
    assert mine == ids(load_probe_set(numbered(20), num_samples=20, rank=rank, world_size=2))


@pytest.mark.parametrize("num_samples", [1, 10, 16, 50])
def test_a_stream_gives_exactly_its_first_samples(num_samples: int) -> None:
    loader = DataLoader(Stream(numbered(40)), batch_size=8, drop_last=True)
    samples = load_probe_set(loader, num_samples=num_samples)
    assert ids(samples) == list(range(min(num_samples, 40)))
    assert size(samples) == min(num_samples, 40)
    assert ids(load_probe_set(Stream(numbered(40)), num_samples=num_samples)) == ids(samples)


def test_a_stream_is_read_no_further_than_needed() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for i in range(12):
                yield torch.tensor([float(i)]), 0
            raise AssertionError("read too far")

    samples = load_probe_set(DataLoader(Endless(), batch_size=5), num_samples=12)
    assert [len(part.batch[0]) for part in samples] == [5, 5, 2]


def test_streams_are_shared_out_by_number() -> None:
    shard = load_probe_set(Stream(numbered(40)), num_samples=11, rank=1, world_size=4)
    assert size(shard) == 3


def batches_of_three(count: int) -> list[Any]:
    return [(torch.arange(3.0) + 3 * i, torch.tensor([0, 1, i])) for i in range(count)]


class Batches(Dataset[Any]):
    """Its items are whole batches; without an end to its own iteration."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.tensor(index) * 1.0, torch.zeros(len(index)).long()
        return batches_of_three(5)[min(index, 4)]


def test_items_that_are_batches_come_in_the_loaders_order() -> None:
    for source in (batches_of_three(5), tuple(batches_of_three(5)), DataLoader(Batches(), batch_size=None)):
        samples = load_probe_set(source, num_samples=8)
        assert ids(samples) == list(range(9))
        assert size(samples) == 9
    every = load_probe_set(DataLoader(Batches(), batch_size=None), num_samples=100)
    assert ids(every) == list(range(15))


def test_a_sampler_of_batches_is_followed() -> None:
    sampler = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
    samples = load_probe_set(DataLoader(Batches(), sampler=sampler, batch_size=None), num_samples=6)
    assert ids(samples) == list(range(8))


def test_the_users_own_generator_is_not_moved() -> None:
    for batch_size in (None, 2):
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        load_probe_set(DataLoader(Batches(), batch_size=batch_size, shuffle=True, generator=generator), num_samples=6)
        assert torch.equal(generator.get_state(), before)


def test_batches_that_do_not_tell_their_size_still_end() -> None:
    assert len(load_probe_set([object() for _ in range(9)], num_samples=4)) == 4


class Augmenting(Plain):
    """Draws from all three global generators while loading."""

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + torch.rand(()) + random.random() + np.random.rand(), y  # noqa: NPY002


def test_what_a_dataset_draws_is_fixed_by_the_seed_and_costs_the_run_nothing() -> None:
    def draws() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002

    seed()
    expected = draws()
    found = []
    for state in (5, 6):
        seed()
        if state == 6:
            draws()
        saved = torch.get_rng_state()
        with isolated_random_state(torch.device("cpu")):
            found.append(load_probe_set(Augmenting(numbered(30)), num_samples=10, seed=-1)[0].batch[0])
        assert torch.equal(torch.get_rng_state(), saved)
        if state == 5:
            assert draws() == expected
    assert torch.equal(*found)
    assert (found[0] % 1).unique().numel() == 10


def test_persistent_workers_are_left_alone() -> None:
    loader = DataLoader(numbered(12), batch_size=2, num_workers=1, persistent_workers=True)
    epoch = iter(loader)
    got = [next(epoch)[0].tolist()]
    worker = epoch._workers[0].pid  # type: ignore[attr-defined]
    assert size(load_probe_set(loader, num_samples=6)) == 6
    got += [batch[0].tolist() for batch in epoch]
    assert got == [[i, i + 1] for i in range(0, 12, 2)]
    assert iter(loader)._workers[0].pid == worker  # type: ignore[attr-defined]


class Named(Plain):
    classes = ("cat", "dog", "bird")


def test_class_names_are_those_of_the_dataset() -> None:
    data = Named(numbered(40))
    for source in (data, Subset(data, range(20)), ConcatDataset([data, data]), DataLoader(Subset(data, range(9)))):
        assert class_names_of(getattr(source, "dataset", source)) == ("cat", "dog", "bird")
    assert class_names_of(numbered(40)) is None
    assert class_names_of(batches_of_three(2)) is None


@pytest.mark.parametrize("classes", [None, 10, [], {"cat": 0}, ["cat", 1], "cat", property(lambda self: 1 / 0)])
def test_other_things_of_that_name_are_no_class_names(classes: Any) -> None:
    assert class_names_of(type("Odd", (Plain,), {"classes": classes})(numbered(4))) is None


def test_a_sampler_with_a_generator_of_its_own_is_not_moved() -> None:
    from torch.utils.data import WeightedRandomSampler

    class OwnState(SequentialSampler):
        def __init__(self, data: Any) -> None:
            super().__init__(data)
            self.passes = 0
            self.random = np.random.RandomState(0)

        def __iter__(self) -> Iterator[int]:
            self.passes += 1
            return iter(self.random.permutation(20).tolist())

    data = numbered(40)
    for make in (
        lambda g: WeightedRandomSampler([1.0] * 20, 15, generator=g),
        lambda g: SubsetRandomSampler(range(20), generator=g),
        lambda g: BatchSampler(SubsetRandomSampler(range(20), generator=g), 4, False),
    ):
        generator = torch.Generator().manual_seed(3)
        sampler = make(generator)
        batches = isinstance(sampler, BatchSampler)
        before = generator.get_state()
        options = {"batch_sampler": sampler} if batches else {"sampler": sampler}
        found = ids(load_probe_set(DataLoader(data, **options), num_samples=30))
        assert set(found) <= set(range(20)) and len(found) > 5
        assert torch.equal(generator.get_state(), before)
    own = OwnState(data)
    state = str(own.random.get_state())
    assert sorted(ids(load_probe_set(DataLoader(data, sampler=own), num_samples=30))) == list(range(20))
    assert own.passes == 0 and str(own.random.get_state()) == state


def test_labels_that_are_not_one_per_sample_do_not_misalign_the_choice() -> None:
    data = Plain(numbered(60, [0, 0, 1] * 20))
    for target_fn in (lambda batch: batch[1].repeat(2), lambda batch: batch[1][::2]):
        chosen = load_probe_set(data, num_samples=10, target_fn=target_fn)
        assert size(chosen) == 10 and len(set(ids(chosen))) == 10


def test_a_property_of_the_dataset_that_raises_does_no_harm() -> None:
    class Odd(Plain):
        @property
        def targets(self) -> Any:
            raise RuntimeError("not loaded yet")

    assert dataset_labels(Odd(numbered(6))) is None
