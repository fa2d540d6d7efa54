"""Which classes are sources: all or, if they are many, those that are explained; the rest is the source "other"."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.dataset_facts import dataset_labels
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.ranks import gather
from lightning_neuro.refinement.drawn_indices import training_loaders
from lightning_neuro.refinement.ledger import bytes_of_ledger
from lightning_neuro.refinement.options import RunOptions

# Each source is one more copy of the weights that every step moves. A figure shows 20.
DEFAULT_SOURCES = 32
# All copies of the default layer together: on one core of a CPU a step moves so many numbers in 40 ms, which is 2 % of
# the step of a ResNet-18 on 64 small images.
DEFAULT_NUMBERS = 2**22


@dataclass(frozen=True, eq=False)
class FollowedClasses:
    """The sources of a ledger, if they are classes.

    Attributes:
        num: Number of sources, without "other".
        labels: (num,) int64, the label of each source, in increasing order; None: the sources are the labels.
        num_classes: Number of classes in the data.
    """

    num: int
    labels: Tensor | None = None
    num_classes: int = 0

    @property
    def are_some(self) -> bool:
        """Whether there are further classes, which count as "other"."""
        return self.labels is not None and self.num_classes > self.num

    def to(self, device: torch.device) -> "FollowedClasses":
        """The same with the labels on a device, so that no step has to copy them."""
        return self if self.labels is None else replace(self, labels=self.labels.to(device))

    def state_dict(self) -> dict[str, Any]:
        """The choice, which a resumed run keeps."""
        labels = None if self.labels is None else self.labels.cpu()
        return {"num": self.num, "labels": labels, "num_classes": self.num_classes}

    def names(self, class_names: Sequence[str] | None) -> list[str] | None:
        """Names of the sources; None if they are their numbers."""
        if self.labels is None:
            return list(class_names[: self.num]) if class_names is not None and len(class_names) >= self.num else None
        named = class_names or ()
        return [named[label] if label < len(named) else str(label) for label in self.labels.tolist()]

    def in_words(self) -> str:
        """The choice, to be added to a sentence; empty if all classes are followed."""
        if not self.are_some:
            return ""
        return f", for {self.num} of {self.num_classes:,} classes, the rest being 'other'"


def follow(labels: Tensor, most: int, first: Sequence[int] = ()) -> FollowedClasses:
    """Choose the classes to follow.

    Args:
        labels: (N,) class labels of the training samples, or of those that are known; negative ones are no classes.
        most: Number of classes that can be followed.
        first: Classes that come before all others.

    Returns:
        All classes if there are at most that many, else the most frequent ones.

    Example:
        >>> follow(torch.tensor([0, 7, 7, 3, 3, 9]), 2).labels
        tensor([3, 7])
        >>> follow(torch.tensor([0, 7, 7, 3, 3, 9]), 2, first=[9]).labels
        tensor([3, 9])
        >>> follow(torch.tensor([0, 2, 2]), 3)
        FollowedClasses(num=3, labels=None, num_classes=3)
    """
    classes, counts = torch.unique(labels[labels >= 0], return_counts=True)
    if not len(classes):
        return FollowedClasses(0)
    largest = int(classes[-1]) + 1
    if largest <= most:
        return FollowedClasses(largest, num_classes=largest)
    counts += (counts.max() + 1) * torch.isin(classes, torch.tensor(first, dtype=classes.dtype))
    chosen = classes[counts.argsort(descending=True, stable=True)[:most]].sort().values
    return FollowedClasses(len(chosen), chosen, len(classes))


def training_labels(trainer: "pl.Trainer") -> Tensor | None:
    """The class labels of all training samples; None if they are not known without loading the samples."""
    loaders = training_loaders(trainer)
    dataset = getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None
    if dataset is None or getattr(dataset, "target_transform", None) is not None:
        return None
    return dataset_labels(dataset)


def explained_labels(trainer: "pl.Trainer", probe_pass: ProbePass) -> Tensor:
    """The class labels of the probe set, of all ranks. Call it on every rank."""
    labels = [torch.zeros(0, dtype=torch.long)]
    if (samples := probe_pass.samples) is not None:
        found = [samples.targets.read(kept.target).classes for kept in samples.batches]
        labels += [part.long().cpu() for part in found if part is not None]
    return torch.cat(gather(trainer, torch.cat(labels)))


def affordable_sources(num_weights: int, options: RunOptions) -> int:
    """How many classes are followed if nobody says: at most 32, fewer if they cost too much memory or time."""
    most = DEFAULT_SOURCES
    if options.layers is None:
        most = min(most, max(2, DEFAULT_NUMBERS // num_weights - 2))
    numbers = range(most, 1, -1)
    fits = (num for num in numbers if bytes_of_ledger(num_weights, num, options.num_phases) <= options.memory_bytes)
    return next(fits, 1)


def choose_classes(
    trainer: "pl.Trainer", probe_pass: ProbePass, options: RunOptions, num_weights: int
) -> FollowedClasses:
    """Choose the classes to follow in this run, once the probe set is known. Call it on every rank.

    Args:
        trainer: The trainer, once it has its training loader.
        probe_pass: The samples that are explained.
        options: Number of sources, if it was given, and the memory limit.
        num_weights: Number of weights of all layers with a ledger.
    """
    known = training_labels(trainer) if probe_pass.probe.target_fn is None else None
    if options.num_sources is not None:
        num = options.num_sources
        found = FollowedClasses(0)
        if options.source_fn is None and known is not None:
            found = follow(known, num, probe_pass.classes)
        return found if found.are_some else FollowedClasses(num)
    explained = explained_labels(trainer, probe_pass)
    labels = explained if known is None else torch.cat([known, explained])
    return follow(labels, affordable_sources(num_weights, options), probe_pass.classes)
