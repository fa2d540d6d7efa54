"""The probe set: which samples a probe looks at, chosen once and kept on the CPU as the model was given them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from lightning_neuro.batches import batch_length, default_target, sample_dim, tensors_in
from lightning_neuro.checks import ArgumentError
from lightning_neuro.dataset_facts import dataset_labels
from lightning_neuro.dataset_loading import DEFAULT_BATCH_SIZE, DeliveredOrder, drawn_range, is_indexed, load_batches
from lightning_neuro.identity import number_in_group
from lightning_neuro.kept_batch import KeptBatch
from lightning_neuro.targets import TargetFormat, target_format

MAX_BATCH_SIZE = 2 * DEFAULT_BATCH_SIZE
# Up to this number of samples, all of them are shuffled; of more, some are drawn.
MAX_SHUFFLED = 10_000_000

# Keys of samples are the number of their batch in the loader times this, plus their row in it.
ROWS_PER_BATCH = 2**20

TargetFunction = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """This rank's part of the probe set.

    Attributes:
        batches: The samples.
        targets: The form of their targets, the same on all ranks.
        num_classes: Largest class label plus one, over all ranks; 0 without class labels.
        places: Number of a batch of the validation loader -> rows of its samples that belong to the set, and their
            numbers in it; rows None: all. Empty if the samples are not taken from the validation loop.
    """

    batches: tuple[KeptBatch, ...]
    targets: TargetFormat
    num_classes: int
    places: dict[int, tuple[Tensor | None, Tensor]]

    @property
    def num_samples(self) -> int:
        """Number of samples on this rank; batches of unknown size are not counted."""
        return sum(batch.num_samples or 0 for batch in self.batches)

    def holds(self, samples: Any, number: int) -> bool:
        """Whether the first of some samples is the one with this number in the set; compared by its first tensor."""
        for kept in self.batches:
            count = kept.num_samples or 0
            if number >= count:
                number -= count
                continue
            for one, other in zip(tensors_in(samples), tensors_in(kept.batch), strict=False):
                dim = sample_dim(other, count)
                if dim is not None and one.ndim == other.ndim and one.ndim > dim and one.shape[dim] > 0:
                    first, known = one.select(dim, 0).to(other.device), other.select(dim, number)
                    both_nan = (first != first) & (known != known) if first.shape == known.shape else None
                    return both_nan is not None and bool(((first == known) | both_nan).all())
            break
        return True


@dataclass(frozen=True, eq=False)
class LoadedBatch:
    """A batch of chosen samples as the loader's collate function returns it, and the samples' keys."""

    batch: Any
    keys: Tensor


def load_probe_set(
    source: Any,
    *,
    num_samples: int,
    seed: int = 0,
    target_fn: TargetFunction = default_target,
    rank: int = 0,
    world_size: int = 1,
    iterate: bool = True,
) -> list[LoadedBatch] | None:
    """Choose the samples of a source and load them.

    From a map-style dataset, or the part of it that the loader's sampler is known to cover, samples are chosen with a
    private generator and spread evenly over the classes, if there are class labels; every rank chooses the same samples
    and loads its own part. From a list of batches the first ones are taken, and from an `IterableDataset` the first
    samples of each rank's stream.

    The caller must isolate the random state.

    Args:
        source: A `DataLoader`, a `Dataset` or an iterable of batches.
        num_samples: Number of samples over all ranks; if there are fewer, all of them.
        seed: Seed of the choice, and of the global generators while the dataset loads samples.
        target_fn: Finds the target in a batch.
        rank: Which part to load.
        world_size: Number of parts.
        iterate: Whether the source may be iterated over. A loader of the run must not be: its sampler, generator or
            stream would be moved.

    Returns:
        This rank's part; None if it can only be found by iterating over the source.

    Raises:
        ArgumentError: If the source is empty or has fewer samples than there are ranks.
    """
    if isinstance(source, Dataset):
        source = DataLoader(source, batch_size=DEFAULT_BATCH_SIZE)
    if isinstance(source, DataLoader) and is_indexed(source):
        drawn = drawn_range(source)
        if drawn is None and iterate:
            drawn = sorted(set(islice(_drawn(source), len(source.dataset))))  # type: ignore[arg-type]
        if drawn is None:
            return None
        chosen = choose(source, drawn, num_samples=num_samples, seed=seed, target_fn=target_fn)
        # If there are too few samples for all ranks, no rank gets any: an error on some ranks would block the others.
        share = chosen[rank::world_size] if len(chosen) >= world_size else chosen[:0]
        batches = load_chosen(source, share, share, seed)
    elif not iterate:
        return None
    else:
        # Each rank has its own stream; batches in a list are the same on all ranks, so each rank takes every n-th.
        mine = source if isinstance(source, DataLoader) else islice(source, rank, None, world_size)
        batches = _numbered(_first_batches(mine, -(-num_samples // world_size)))
    if not batches:
        raise ArgumentError(
            f"The probe found no samples for rank {rank} of {world_size} in {_name(source)}. Pass a source with at"
            " least one sample per rank, for example `Probe(source=my_dataset)` or `Probe(source='train')`."
        )
    return batches


def load_delivered(
    loader: DataLoader[Any], order: DeliveredOrder, *, num_samples: int, seed: int, target_fn: TargetFunction
) -> list[LoadedBatch]:
    """Choose samples of a loader that delivers them in a known order, and load them."""
    positions = choose(
        loader, range(order.count), num_samples=num_samples, seed=seed, target_fn=target_fn, index_of=order.indices
    )
    numbers, rows = order.places(positions)
    return load_chosen(loader, numbers * ROWS_PER_BATCH + rows, order.indices(positions), seed)


def choose(
    loader: DataLoader[Any],
    candidates: Sequence[int],
    *,
    num_samples: int,
    seed: int,
    target_fn: TargetFunction,
    index_of: Callable[[Tensor], Tensor] = lambda positions: positions,
) -> Tensor:
    """Choose samples at random, evenly spread over the classes if there are any.

    Args:
        loader: A loader over the dataset.
        candidates: The samples to choose from.
        num_samples: How many to choose; if there are fewer, all.
        seed: Seed of the choice.
        target_fn: Finds the target in a batch.
        index_of: Candidates -> dataset indices.

    Returns:
        The chosen candidates, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(candidates) <= MAX_SHUFFLED:
        order = torch.as_tensor(candidates, dtype=torch.long)[torch.randperm(len(candidates), generator=generator)]
    else:
        drawn = torch.unique(torch.randint(len(candidates), (4 * num_samples,), generator=generator))
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        order = torch.tensor([candidates[number] for number in drawn.tolist()])
    labels = dataset_labels(loader.dataset) if target_fn is default_target else None
    if labels is None:
        # The labels are only known after loading, so twice as many samples as needed are considered.
        order = order[: 2 * num_samples]
        loaded = load_batches(loader, _split(index_of(order), loader), seed)
        labels_in_order = labels_of([target_fn(batch) for batch in loaded])
        if labels_in_order is None or len(labels_in_order) != len(order):  # two views of each sample, labels per token
            labels_in_order = torch.zeros(len(order), dtype=torch.long)
    else:
        labels_in_order = labels[index_of(order)]
    return order[stratified(labels_in_order)[:num_samples]]


def load_chosen(loader: DataLoader[Any], keys: Tensor, indices: Tensor, seed: int) -> list[LoadedBatch]:
    """Load chosen samples in batches of the loader's size."""
    parts = _split(indices, loader)
    batches = load_batches(loader, parts, seed)
    keys_of_parts = torch.split(keys, [len(part) for part in parts])
    return [LoadedBatch(batch, part) for batch, part in zip(batches, keys_of_parts, strict=True)]


def labels_of(targets: Sequence[Any]) -> Tensor | None:
    """The class labels of all batches, from their targets; None if these are no class labels."""
    form = target_format(targets)
    labels = [form.read(target).classes for target in targets]
    return (
        None
        if not labels or any(part is None for part in labels)
        else torch.cat([p.cpu() for p in labels if p is not None])
    )


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


def _split(indices: Tensor, loader: DataLoader[Any]) -> list[list[int]]:
    size = min(loader.batch_size or DEFAULT_BATCH_SIZE, MAX_BATCH_SIZE)
    return [part.tolist() for part in torch.split(indices, size)] if len(indices) else []


def _drawn(loader: DataLoader[Any]) -> Iterator[int]:
    """The samples that a loader's own sampler draws."""
    if type(loader.batch_sampler) is BatchSampler:
        return iter(_copy_of(loader.batch_sampler.sampler, loader))
    return (index for batch in _copy_of(loader.batch_sampler, loader) for index in batch)


def _copy_of(sampler: Any, loader: DataLoader[Any]) -> Any:
    """A copy of a sampler, because the sampler itself may hold a generator."""
    return copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})


def _name(source: Any) -> str:
    return f"the {type(getattr(source, 'dataset', source)).__name__}"


def _numbered(batches: Iterator[Any]) -> list[LoadedBatch]:
    found: list[LoadedBatch] = []
    count = 0
    for batch in batches:
        length = batch_length(default_target(batch), batch) or 1
        found.append(LoadedBatch(batch, torch.arange(count, count + length)))
        count += length
    return found


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
    return (loader.dataset[index] for index in islice(_copy_of(loader.sampler, loader), num_samples))
