"""The probe set: which samples a probe looks at, chosen once and kept on the CPU as the model was given them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from lightning_neuro.batches import batch_length, default_target, sample_dim, tensors_in
from lightning_neuro.checks import ArgumentError
from lightning_neuro.class_choice import ClassChoice, order_by_class
from lightning_neuro.dataset_facts import dataset_labels
from lightning_neuro.dataset_loading import DEFAULT_BATCH_SIZE, DeliveredOrder, drawn_range, is_indexed, load_batches
from lightning_neuro.kept_batch import KeptBatch
from lightning_neuro.targets import TargetFormat, target_format

MAX_BATCH_SIZE = 2 * DEFAULT_BATCH_SIZE
# Up to this number of samples, all of them are shuffled; of more, some are drawn.
MAX_SHUFFLED = 10_000_000

# Samples whose classes are known come from about this number of batches, because each batch that is looked at costs.
FEW_BATCHES = 16
# If the classes are only known after loading, so many times the wanted samples are loaded, and more if there are many.
LOADED, LOADED_OF_MANY_CLASSES = 2, 8

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
        classes: The classes that class-based measures cover, over all ranks, sorted; None: all.
        places: Number of a batch of the validation loader -> rows of its samples that belong to the set, and their
            numbers in it; rows None: all. Empty if the samples are not taken from the validation loop.
    """

    batches: tuple[KeptBatch, ...]
    targets: TargetFormat
    num_classes: int
    classes: Tensor | None
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


@dataclass(frozen=True, eq=False)
class LoadedSamples:
    """This rank's samples.

    Attributes:
        batches: The samples.
        labels: Each class label of the samples from which they were chosen, as far as it is known.
    """

    batches: list[LoadedBatch]
    labels: Tensor | None = None


def load_probe_set(
    source: Any,
    *,
    num_samples: int,
    seed: int = 0,
    target_fn: TargetFunction = default_target,
    rank: int = 0,
    world_size: int = 1,
    iterate: bool = True,
    class_choice: ClassChoice | None = None,
) -> LoadedSamples | None:
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
        class_choice: Of which classes; default: as many as fit.

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
        labels = known_labels(source, target_fn)
        chosen, labels = choose(
            source,
            drawn,
            num_samples=num_samples,
            seed=seed,
            target_fn=target_fn,
            class_choice=class_choice or ClassChoice(num_samples, seed),
            labels=labels,
        )
        # If there are too few samples for all ranks, no rank gets any: an error on some ranks would block the others.
        share = chosen[rank::world_size] if len(chosen) >= world_size else chosen[:0]
        batches = load_chosen(source, share, share, seed)
    elif not iterate:
        return None
    else:
        # Each rank has its own stream; batches in a list are the same on all ranks, so each rank takes every n-th.
        mine = source if isinstance(source, DataLoader) else islice(source, rank, None, world_size)
        labels = None
        batches = _numbered(_first_batches(mine, -(-num_samples // world_size)))
    if not batches:
        raise ArgumentError(
            f"The probe found no samples for rank {rank} of {world_size} in {_name(source)}. Pass a source with at"
            " least one sample per rank, for example `Probe(source=my_dataset)` or `Probe(source='train')`."
        )
    return LoadedSamples(batches, labels)


def load_delivered(
    loader: DataLoader[Any],
    order: DeliveredOrder,
    *,
    num_samples: int,
    seed: int,
    target_fn: TargetFunction,
    class_choice: ClassChoice,
) -> LoadedSamples:
    """Choose samples of a loader that delivers them in a known order, and load them.

    If the classes are known, the samples come from few batches, spread over the loader, as long as this does not change
    how many of each class there are.

    Args:
        loader: The loader.
        order: The order in which it delivers the samples on this rank.
        num_samples: Number of samples on this rank.
        seed: Seed of the choice.
        target_fn: Finds the target in a batch.
        class_choice: Of which classes.

    Returns:
        The samples; their keys are the number of their batch times `ROWS_PER_BATCH`, plus their row.
    """
    labels = known_labels(loader, target_fn)
    choose_among = partial(
        choose,
        loader,
        num_samples=num_samples,
        seed=seed,
        target_fn=target_fn,
        index_of=order.indices,
        class_choice=class_choice,
        labels=labels,
    )
    positions, found = choose_among(range(order.count))
    if labels is not None:
        num_batches = FEW_BATCHES
        wanted = labels[order.indices(positions)]
        while num_batches < order.num_batches:
            fewer, _ = choose_among(order.spread(num_batches).tolist())
            if _as_many_of_each(labels[order.indices(fewer)], wanted):
                positions = fewer
                break
            num_batches *= 2
    numbers, rows = order.places(positions)
    batches = load_chosen(loader, numbers * ROWS_PER_BATCH + rows, order.indices(positions), seed)
    return LoadedSamples(batches, found)


def _as_many_of_each(labels: Tensor, wanted: Tensor) -> bool:
    """Whether both hold the same classes, and as many of each, but for one that is left over."""
    size = int(torch.cat([labels, wanted]).max()) + 2  # negative labels are no class
    one, other = (torch.bincount(part.clamp(min=-1) + 1, minlength=size) for part in (labels, wanted))
    return bool(((one - other).abs() <= 1).all() and ((one > 0) == (other > 0)).all())


def known_labels(loader: DataLoader[Any], target_fn: TargetFunction) -> Tensor | None:
    """The class labels of a loader's dataset; None if they are only known after loading."""
    return dataset_labels(loader.dataset) if target_fn is default_target else None


def choose(
    loader: DataLoader[Any],
    candidates: Sequence[int],
    *,
    num_samples: int,
    seed: int,
    target_fn: TargetFunction,
    index_of: Callable[[Tensor], Tensor] = lambda positions: positions,
    class_choice: ClassChoice,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Choose samples at random, evenly spread over the classes if there are any, or over as many as fit.

    Args:
        loader: A loader over the dataset.
        candidates: The samples to choose from.
        num_samples: How many to choose; if there are fewer, all.
        seed: Seed of the choice.
        target_fn: Finds the target in a batch.
        index_of: Candidates -> dataset indices.
        class_choice: Of which classes.
        labels: The class labels of the whole dataset; None if they are only known after loading.

    Returns:
        The chosen candidates, int64, and each class label of the samples that were looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(candidates) <= MAX_SHUFFLED:
        order = torch.as_tensor(candidates, dtype=torch.long)[torch.randperm(len(candidates), generator=generator)]
    else:
        drawn = torch.unique(torch.randint(len(candidates), (4 * num_samples,), generator=generator))
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        order = torch.tensor([candidates[number] for number in drawn.tolist()])
    if labels is not None:
        # Of the whole dataset, so that all ranks choose the same classes.
        classes = class_choice.among(labels)
        return order[order_by_class(labels[index_of(order)], classes)[:num_samples]], torch.unique(labels)
    found = torch.zeros(0, dtype=torch.long)
    for times in (LOADED, LOADED_OF_MANY_CLASSES):
        more = order[len(found) : times * num_samples]
        part = _labels_after_loading(loader, index_of(more), seed, target_fn)
        found = torch.cat([found, part])
        classes = class_choice.among(found)
        if classes is None:
            break
    return order[order_by_class(found, classes)[:num_samples]], torch.unique(found)


def _labels_after_loading(loader: DataLoader[Any], indices: Tensor, seed: int, target_fn: TargetFunction) -> Tensor:
    """The class labels of some samples; zeros if they have none."""
    labels = labels_of([target_fn(batch) for batch in load_batches(loader, _split(indices, loader), seed)])
    if labels is None or len(labels) != len(indices):  # two views of each sample, labels per token
        return torch.zeros(len(indices), dtype=torch.long)
    return labels


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
