"""The probe set: the samples of a probe, chosen once from the user's data and fixed throughout the run."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lightning_neuro.batches import batch_length, class_labels, default_target
from lightning_neuro.checks import ArgumentError
from lightning_neuro.identity import number_in_group

DEFAULT_BATCH_SIZE = 128

TargetFunction = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """This rank's part of the probe set.

    Attributes:
        batches: Collated batches on the CPU, as the user's loader would return them.
        num_samples: Number of samples in them; batches whose size is not known are not counted.
        num_classes: Largest class label plus one; 0 without class labels.
        class_names: Names of the classes from the dataset, or None.
    """

    batches: tuple[Any, ...]
    num_samples: int
    num_classes: int
    class_names: tuple[str, ...] | None = None


def load_probe_set(
    source: Any,
    *,
    num_samples: int,
    seed: int = 0,
    target_fn: TargetFunction = default_target,
    rank: int = 0,
    world_size: int = 1,
) -> ProbeSet:
    """Choose the samples and load them.

    From a map-style dataset, or the part of it that the loader's sampler covers, samples are chosen with a private
    generator and spread evenly over the classes, if there are class labels; every rank chooses the same samples and
    loads its own part. From a stream (an `IterableDataset`) the first samples of each rank's own stream are taken, and
    from a list of batches the first batches.

    The caller must isolate the random state, because datasets may use the global generators (augmentation).

    Args:
        source: A `DataLoader`, a `Dataset` or an iterable of batches.
        num_samples: Number of samples over all ranks; if there are fewer, all of them.
        seed: Seed of the choice, and of the global generators while the dataset loads samples.
        target_fn: Finds the target in a batch.
        rank: Which part to load.
        world_size: Number of parts.

    Returns:
        This rank's part.

    Raises:
        ArgumentError: If the source is empty or has fewer samples than there are ranks.
    """
    # Not `torch.manual_seed`, which would also seed accelerators that the caller does not isolate.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that datasets use
    if isinstance(source, Dataset):
        source = DataLoader(source, batch_size=DEFAULT_BATCH_SIZE)
    if isinstance(source, DataLoader) and _is_indexed(source):
        batches = list(_chosen_batches(source, num_samples, seed, target_fn, rank, world_size))
    else:
        # Each rank has its own stream; batches in a list are the same on all ranks, so each rank takes every n-th.
        share = source if isinstance(source, DataLoader) else islice(source, rank, None, world_size)
        batches = list(_first_batches(share, -(-num_samples // world_size)))
    if not batches:
        raise ArgumentError(
            f"The probe found no samples for rank {rank} of {world_size} in {_name(source)}. Pass a source with at"
            " least one sample per rank, for example `Probe(source=my_dataset)` or `Probe(source='train')`."
        )
    labels = [label for batch in batches if (label := class_labels(target_fn(batch))) is not None and len(label)]
    return ProbeSet(
        batches=tuple(batches),
        num_samples=sum(batch_length(batch) or 0 for batch in batches),
        num_classes=max((int(label.max()) + 1 for label in labels), default=0),
        class_names=class_names_of(getattr(source, "dataset", source)),
    )


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """The names of the classes, from `classes` of a dataset or of the one it is a part of; None without them."""
    while isinstance(dataset, (Subset, ConcatDataset)):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    with suppress(Exception):  # a property of a user's dataset may raise any error
        return as_class_names(dataset.classes)
    return None


def as_class_names(names: Any) -> tuple[str, ...] | None:
    """A sequence of strings as a tuple; None for anything else."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) or None


def _name(source: Any) -> str:
    return f"the {type(getattr(source, 'dataset', source)).__name__}"


def _is_indexed(loader: DataLoader[Any]) -> bool:
    dataset = loader.dataset
    # Without a batch sampler the dataset's items are batches.
    has_batches = loader.batch_sampler is not None
    return has_batches and not isinstance(dataset, IterableDataset) and isinstance(dataset, Sized)


def _load(loader: DataLoader[Any], indices: Sequence[int]) -> Iterator[Any]:
    """Load batches of chosen samples with the user's collate function, in this process.

    The user's loader is not used, because a new iterator would restart its persistent workers in the middle of an
    epoch.
    """
    batch_size = min(loader.batch_size or DEFAULT_BATCH_SIZE, 2 * DEFAULT_BATCH_SIZE)
    return iter(DataLoader(Subset(loader.dataset, indices), batch_size=batch_size, collate_fn=loader.collate_fn))


def _chosen_batches(
    loader: DataLoader[Any], num_samples: int, seed: int, target_fn: TargetFunction, rank: int, world_size: int
) -> Iterator[Any]:
    indices = _sampled_indices(loader)
    order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    labels = dataset_labels(loader.dataset) if target_fn is default_target else None
    if labels is None:
        # The labels are only known after loading, so twice as many samples as needed are considered.
        order = order[: 2 * num_samples]
        found = [class_labels(target_fn(batch)) for batch in _load(loader, order.tolist())]
        known = [label for label in found if label is not None]
        labels_in_order = torch.cat(known) if known and len(known) == len(found) else torch.zeros(0).long()
        if len(labels_in_order) != len(order):  # no labels, or not one per sample: two views of each, labels per token
            labels_in_order = torch.zeros(len(order)).long()
    else:
        labels_in_order = labels[order]
    chosen = order[stratified(labels_in_order)[:num_samples]]
    # If there are too few samples for all ranks, no rank gets any: an error on some ranks would block the others.
    share = chosen[rank::world_size].tolist() if len(chosen) >= world_size else []
    return _load(loader, share) if share else iter(())


def _sampled_indices(loader: DataLoader[Any]) -> Tensor:
    """The samples that the loader draws from: its whole dataset, unless its sampler covers only a part of it."""
    plain = type(loader.batch_sampler) is BatchSampler
    sampler: Any = loader.batch_sampler.sampler if plain else loader.sampler  # type: ignore[union-attr]
    # Lightning puts its distributed sampler around the user's own.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    num_samples = len(loader.dataset)  # type: ignore[arg-type]
    if type(sampler) in (SequentialSampler, RandomSampler) or isinstance(sampler, DistributedSampler):
        if plain or isinstance(sampler, DistributedSampler):
            return torch.arange(num_samples)
        batches = _copy_of(loader.batch_sampler, loader.dataset)
        return _distinct((index for batch in batches for index in batch), num_samples)
    return _distinct(_copy_of(sampler, loader.dataset), num_samples)


def _copy_of(sampler: Any, dataset: Any) -> Any:
    """A copy of a sampler; iterating over it does not change the state of the user's sampler or its generator."""
    return copy.deepcopy(sampler, {id(dataset): dataset})


def _distinct(indices: Iterable[int], num_samples: int) -> Tensor:
    return torch.tensor(sorted(set(islice(indices, num_samples))), dtype=torch.long)


def stratified(labels: Tensor) -> Tensor:
    """A permutation of the samples in which every prefix is as class-balanced as possible.

    Args:
        labels: (N,) integer labels, themselves in random order.

    Returns:
        (N,) positions: the first sample of each class, then the second of each, and so on.

    Example:
        >>> stratified(torch.tensor([0, 0, 0, 1, 2])).tolist()
        [0, 3, 4, 1, 2]
    """
    return torch.argsort(number_in_group(labels), stable=True)


def dataset_labels(dataset: Any) -> Tensor | None:
    """The class labels of a whole dataset; None if they are not available without loading its samples."""
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        found = None
    try:
        if not isinstance(dataset, TensorDataset):
            found = getattr(dataset, "targets", getattr(dataset, "labels", None))
        labels = class_labels(torch.as_tensor(found))
    except Exception:  # a property of the user's may do anything
        return None
    return labels.cpu() if labels is not None and len(labels) == len(dataset) else None


class _FirstSamples(IterableDataset[Any]):
    """The first samples of a stream."""

    def __init__(self, dataset: Any, num_samples: int) -> None:
        self.dataset = dataset
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[Any]:
        return islice(self.dataset, self.num_samples)


def _first_batches(source: Any, num_samples: int) -> Iterator[Any]:
    if isinstance(source, DataLoader):
        batch_size, collate_fn = source.batch_size, source.collate_fn
        if batch_size is not None:
            source = DataLoader(
                _FirstSamples(source.dataset, num_samples), batch_size=batch_size, collate_fn=collate_fn
            )
        else:
            source = map(collate_fn, _unbatched(source, num_samples))
    seen = 0
    # A batch of unknown size counts as one sample, so that an endless stream of such batches also ends.
    for batch in source:
        yield batch
        seen += batch_length(batch) or 1
        if seen >= num_samples:
            return


def _unbatched(loader: DataLoader[Any], num_samples: int) -> Iterator[Any]:
    """The items of a loader that does no batching: each of them is a sample or a batch."""
    if isinstance(loader.dataset, IterableDataset):
        return iter(loader.dataset)
    indices = list(islice(_copy_of(loader.sampler, loader.dataset), num_samples))
    return (loader.dataset[index] for index in indices)
