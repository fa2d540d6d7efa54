"""Loads chosen samples of a dataset without disturbing it, and tells in which batches a loader delivers its samples."""

import multiprocessing
import random
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

DEFAULT_BATCH_SIZE = 128


def is_indexed(loader: Any) -> bool:
    """Whether a loader makes its batches from single samples of a dataset that has indices."""
    if not isinstance(loader, DataLoader):
        return False
    has_batches = loader.batch_sampler is not None
    return has_batches and not isinstance(loader.dataset, IterableDataset) and isinstance(loader.dataset, Sized)


def load_batches(loader: DataLoader[Any], batches: Sequence[Sequence[int]], seed: int) -> Iterator[Any]:
    """Load batches of chosen samples with the collate function of a loader.

    A dataset or its transforms may hold generators, counters, caches and files, which loading would change. So samples
    are loaded in a process of their own, a worker as those of a `DataLoader`, unless the dataset holds nothing but
    tensors, or the platform cannot fork processes.

    The caller must isolate the global random state.

    Args:
        loader: The loader; it is not iterated over, because its workers may be persistent.
        batches: The indices of the samples in each batch.
        seed: Seed of the global generators while samples are loaded.

    Yields:
        The batches.
    """
    # Not `torch.manual_seed`, which would also seed accelerators that the caller does not isolate.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that datasets use
    apart = not _holds_only_tensors(loader.dataset) and _can_fork()
    options: dict[str, Any] = {}
    if apart:
        options = {"num_workers": 1, "multiprocessing_context": "fork", "worker_init_fn": loader.worker_init_fn}
    yield from DataLoader(
        loader.dataset,
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def _holds_only_tensors(dataset: Any) -> bool:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset


def _can_fork() -> bool:
    daemon = multiprocessing.current_process().daemon
    return "fork" in multiprocessing.get_all_start_methods() and not daemon


@dataclass(frozen=True)
class DeliveredOrder:
    """The order in which a loader delivers the samples of a dataset on this rank, the same in every epoch.

    Attributes:
        count: Number of samples that are delivered.
        batch_size: Number of samples in each batch but the last.
        start: Dataset index of the first sample.
        step: Difference between the indices of successive samples.
    """

    count: int
    batch_size: int
    start: int
    step: int

    def indices(self, positions: Tensor) -> Tensor:
        """The dataset indices of the samples at some positions in this order, int64."""
        return self.start + self.step * positions

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return -(-self.count // self.batch_size)

    def spread(self, num_batches: int) -> Tensor:
        """The positions of all samples in some batches, which are spread evenly over all of them."""
        numbers = (torch.arange(num_batches) + 0.5) * self.num_batches / num_batches
        positions = (numbers.long()[:, None] * self.batch_size + torch.arange(self.batch_size)).flatten()
        return positions[positions < self.count]

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the batches, and rows in them, of the samples at some positions."""
        return positions // self.batch_size, positions % self.batch_size


def delivered_order(loader: Any, num_batches: float = float("inf")) -> DeliveredOrder | None:
    """The order in which a loader delivers its samples; None if it is not known, or changes between epochs.

    Args:
        loader: The loader.
        num_batches: Number of batches after which the trainer stops.
    """
    if not is_indexed(loader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler, size, num_samples = loader.batch_sampler.sampler, loader.batch_sampler.batch_size, len(loader.dataset)
    count, start, step = num_samples, 0, 1
    if isinstance(sampler, DistributedSampler) and not sampler.shuffle and sampler.dataset is loader.dataset:
        start, step = sampler.rank, sampler.num_replicas
        # Without the samples that are repeated at the end, so that all ranks have equally many.
        count = min(len(sampler), -(-(num_samples - start) // step))
    elif type(sampler) is not SequentialSampler:
        return None
    if loader.batch_sampler.drop_last:
        count -= count % size
    if num_batches != float("inf"):
        count = min(count, int(num_batches) * size)
    return DeliveredOrder(count, size, start, step) if count > 0 else None


def drawn_range(loader: DataLoader[Any]) -> Sequence[int] | None:
    """The samples that a loader draws from, known without iterating over its sampler; None if they are not known."""
    if type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler: Any = loader.batch_sampler.sampler
    # Lightning puts its distributed sampler around the user's own.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if type(sampler) in (SequentialSampler, RandomSampler) or isinstance(sampler, DistributedSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    if type(sampler) is WeightedRandomSampler:
        drawn: list[int] = sampler.weights.nonzero().flatten().tolist()
        return drawn
    return None
