"""Samples of the probe set that are kept on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from lightning_neuro.batches import can_select_samples, concatenate_samples, select_samples, tensors_in


@dataclass(frozen=True, eq=False)
class KeptBatch:
    """Some samples of the probe set, on the CPU, as the model was given them.

    Attributes:
        batch: The batch, as the model's steps receive it.
        inputs: What the model is called with; None if it is to be found in the batch, or not known.
        target: The field with the targets.
        num_samples: N; None if it is not known.
        keys: (N,) int64, identify the samples: their position in the delivered data.
        is_loaded: Whether the samples were loaded, so that the inputs are found in the batch.
    """

    batch: Any
    inputs: Any
    target: Any
    num_samples: int | None
    keys: Tensor
    is_loaded: bool = False

    def select(self, rows: Tensor) -> "KeptBatch":
        """Some of the samples."""
        assert self.num_samples is not None
        values = (self.batch, self.inputs, self.target)
        batch, inputs, target = (select_samples(value, rows, self.num_samples) for value in values)
        return KeptBatch(batch, inputs, target, len(rows), self.keys[rows], self.is_loaded)


def merged(batches: Sequence[KeptBatch], max_size: int) -> list[KeptBatch]:
    """Join small batches of the same structure and shapes, so that a pass over them runs in fewer steps."""
    joined: list[KeptBatch] = []
    for batch in batches:
        fits = joined and (joined[-1].num_samples or max_size) + (batch.num_samples or max_size) <= max_size
        together = _joined(joined[-1], batch) if fits else None
        if together is not None:
            joined[-1] = together
        else:
            joined.append(batch)
    return joined


def _joined(one: KeptBatch, other: KeptBatch) -> KeptBatch | None:
    assert one.num_samples is not None and other.num_samples is not None
    lengths = [one.num_samples, other.num_samples]
    values = [(part.batch, part.inputs, part.target) for part in (one, other)]
    selectable = all(can_select_samples(value, length) for value, length in zip(values, lengths, strict=True))
    shapes = [[tensor.shape[1:] for tensor in tensors_in(value)] for value in values]
    if not selectable or shapes[0] != shapes[1] or _has_texts(values):
        return None
    batch, inputs, target = concatenate_samples(values, lengths)
    return KeptBatch(batch, inputs, target, sum(lengths), torch.cat([one.keys, other.keys]))


def _has_texts(value: Any) -> bool:
    """Whether nested values hold lists of texts, which are not joined."""
    if isinstance(value, dict):
        return any(_has_texts(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(isinstance(part, str) or _has_texts(part) for part in value)
    return False


def copied(batch: Any) -> Any:
    """A copy of the tensors in a batch, because hooks, steps and models may change them in place."""
    return apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)


def to_cpu(values: Any) -> Any:
    """Values on the CPU, as ordinary tensors also if they were made in inference mode."""

    def ordinary(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if tensor.is_inference() else tensor.detach()

    with torch.inference_mode(False):
        moved = move_data_to_device(values, torch.device("cpu"))
        return apply_to_collection(moved, Tensor, ordinary, allow_frozen=True)
