"""What a dataset tells without loading its samples: labels and names of classes."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_neuro.batches import class_labels


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
        labels = class_labels(found if isinstance(found, Tensor) else torch.as_tensor(list(found)))
    except Exception:  # a property of the user's may do anything
        return None
    return labels.cpu() if labels is not None and len(labels) == len(dataset) else None
