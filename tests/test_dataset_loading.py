"""Samples are loaded without disturbing the dataset; the order of a loader is known or not."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_neuro.dataset_loading import delivered_order, drawn_range, load_batches

DATA = TensorDataset(torch.arange(10.0))


class Stateful(Dataset[Any]):
    """Holds a generator, a counter, and a file that its workers open."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.count = 0
        self.handle: Any = None

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        self.count += 1
        return index + torch.rand((), generator=self.generator) / 2


def test_a_dataset_with_state_of_its_own_is_left_as_it_is() -> None:
    data = Stateful()
    before = data.generator.get_state()
    batches = list(load_batches(DataLoader(data, batch_size=4), [[1, 5], [7]], seed=0))
    assert [batch.floor().tolist() for batch in batches] == [[1.0, 5.0], [7.0]]
    assert torch.equal(data.generator.get_state(), before) and data.count == 0


def test_workers_are_set_up_as_the_users() -> None:
    class Opened(Stateful):
        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor(self.handle[index])

    def open_file(worker: int) -> None:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        info.dataset.handle = list(range(100, 110))

    loader = DataLoader(Opened(), worker_init_fn=open_file)
    assert [batch.tolist() for batch in load_batches(loader, [[0, 9]], seed=0)] == [[100, 109]]


def test_tensors_are_read_in_this_process() -> None:
    class Where(list[Any]):
        pass

    pids = Where()

    def collate(rows: list[Any]) -> Tensor:
        pids.append(os.getpid())
        return torch.stack([row[0] for row in rows])

    for data in (DATA, Subset(DATA, range(5))):
        list(load_batches(DataLoader(data, collate_fn=collate), [[0, 1]], seed=0))
    assert pids == [os.getpid()] * 2


def _delivered(loader: DataLoader[Any], num_batches: float = float("inf")) -> list[list[int]] | None:
    order = delivered_order(loader, num_batches)
    if order is None:
        return None
    positions = torch.arange(order.count)
    numbers, rows = order.places(positions)
    found: list[list[int]] = [[] for _ in range(int(numbers.max()) + 1)]
    for number, row, index in zip(numbers.tolist(), rows.tolist(), order.indices(positions).tolist(), strict=True):
        assert row == len(found[number])
        found[number].append(index)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATA, batch_size=4),
        lambda: DataLoader(DATA, batch_size=4, drop_last=True),
        lambda: DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, 3, 0, shuffle=False)),
        lambda: DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, 5, 2, shuffle=False)),
    ],
)
def test_the_order_is_the_one_in_which_the_loader_delivers(make: Any) -> None:
    assert _delivered(make()) == [batch[0].long().tolist() for batch in make()]


def test_samples_that_are_repeated_for_other_ranks_do_not_count_twice() -> None:
    # Rank 1 of 3 has samples 1, 4 and 7, and the first one of rank 0 again.
    assert _delivered(DataLoader(DATA, batch_size=2, sampler=DistributedSampler(DATA, 3, 1, shuffle=False))) == [
        [1, 4],
        [7],
    ]


def test_the_trainer_may_stop_early() -> None:
    assert _delivered(DataLoader(DATA, batch_size=4), 1) == [[0, 1, 2, 3]]
    assert delivered_order(DataLoader(DATA, batch_size=4), 0) is None


class Odd(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        raise AssertionError("a user's sampler is not iterated over")

    def __len__(self) -> int:
        return 10


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a stream is not read")


@pytest.mark.parametrize(
    ("loader", "drawn"),
    [
        (DataLoader(DATA, shuffle=True), list(range(10))),
        (DataLoader(DATA, sampler=RandomSampler(DATA)), list(range(10))),
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 1)), list(range(10))),
        (DataLoader(DATA, sampler=SubsetRandomSampler([7, 3])), [7, 3]),
        (DataLoader(DATA, sampler=WeightedRandomSampler([0.0, 1.0, 2.0], 5)), [1, 2]),
        (DataLoader(DATA, sampler=Odd()), None),
        (DataLoader(DATA, batch_sampler=[[0, 1], [2]]), None),
    ],
)
def test_what_a_loader_draws_from_is_known_without_iterating(loader: Any, drawn: Any) -> None:
    found = drawn_range(loader)
    assert (None if found is None else list(found)) == drawn
    if drawn is None or loader.sampler.__class__ is not SequentialSampler:
        assert delivered_order(loader) is None


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=2),
        DataLoader(DATA, batch_size=None),
        SimpleNamespace(dataset=DATA),
        [1, 2],
        DataLoader(DATA, batch_sampler=BatchSampler(Odd(), 2, drop_last=False)),
    ],
)
def test_an_unknown_order_is_said_to_be_unknown(loader: Any) -> None:
    assert delivered_order(loader) is None
