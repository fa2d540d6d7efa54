"""What is in a batch: its input, its target, its number of samples, and where the samples lie in its tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_neuro.checks import ArgumentError, describe

INPUT_KEYS = ("input", "inputs", "x", "image", "images", "pixel_values", "img", "data", "features", "input_ids")
TARGET_KEYS = ("target", "targets", "y", "label", "labels")

BatchField = str | int | Callable[[Any], Any]
"""Where something is found in a batch: a key, an index, or a function of the batch."""


def default_input(batch: Any) -> Any:
    """The model's input in a batch: a tensor itself, the first of a sequence, or a dict's entry of a usual name.

    Raises:
        ArgumentError: If it cannot be told which part of the batch it is.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        for key in INPUT_KEYS:
            if key in batch:
                return batch[key]
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
        return batch[0]
    raise ArgumentError(
        f"The model's input was not found in the batch, which is {describe(batch)}. Pass `Probe(input_fn=...)`, a"
        " function of the batch or the key of a field in it."
    )


def default_target(batch: Any) -> Any:
    """The target in a batch: the second of a sequence, or a dict's entry of a usual name; None where there is none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in TARGET_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        return batch[1]
    return None


def class_labels(targets: Any) -> Tensor | None:
    """Targets as (N,) int64 class labels, or None where they are something else (a regression target, a mask)."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return None
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    return targets.long() if targets.ndim == 1 else None


def read_field(name: str, field: BatchField, batch: Any) -> Any:
    """Read a field of a batch.

    Args:
        name: The argument that holds the field, for the message.
        field: A key, an index or a function of the batch.
        batch: The batch.

    Raises:
        ArgumentError: If the function fails on the batch, or the batch has no such field.
    """
    if callable(field):
        try:
            return field(batch)
        except Exception as error:
            raise ArgumentError(
                f"`{name}` is a function that fails on a batch, which is {describe(batch)}:"
                f" {type(error).__name__}: {error}."
            ) from error
    try:
        return batch[field]
    except (KeyError, IndexError, TypeError) as error:
        raise ArgumentError(
            f"`{name}` is {field!r}, which the batch does not have: it is {describe(batch)}."
        ) from error


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in nested values (sequences, mappings, dataclasses), in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(values, Tensor, note, allow_frozen=True)
    return found


def batch_length(*values: Any) -> int | None:
    """The number of samples in a batch, by the first tensor found in the values; None where there is none."""
    return next((tensor.shape[0] for tensor in tensors_in(*values) if tensor.ndim > 0), None)


def sample_dim(tensor: Tensor, num_samples: int) -> int | None:
    """The dimension of a tensor along which the samples lie: 0, or 1 where the time comes first; None if neither.

    Recurrent and attention layers put the time first unless told otherwise. Where both dimensions have the size of the
    batch, the first one is taken.
    """
    return min(_fitting_dims(tensor, num_samples), default=None)


def _fitting_dims(tensor: Tensor, num_samples: int) -> set[int]:
    return {dim for dim in (0, 1) if dim < tensor.ndim and tensor.shape[dim] == num_samples}


def samples_first(tensor: Tensor, num_samples: int) -> Tensor | None:
    """The tensor with its samples in dimension 0; None where they are not found."""
    dim = sample_dim(tensor, num_samples)
    return None if dim is None else tensor.transpose(0, dim)


def select_samples(values: Any, rows: Tensor, num_samples: int) -> Any:
    """Nested values with only some of their samples; what does not hold the samples of the batch is left as it is.

    Args:
        values: Tensors, or nested collections of them.
        rows: int64, which samples.
        num_samples: Number of samples in the batch.
    """

    def select(tensor: Tensor) -> Tensor:
        dim = sample_dim(tensor, num_samples)
        return tensor if dim is None else tensor.index_select(dim, rows.to(tensor.device))

    return apply_to_collection(values, Tensor, select, allow_frozen=True)


def concatenate_samples(batches: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Nested values of several batches as those of one batch.

    Args:
        batches: Values of the same structure.
        lengths: Number of samples in each.
    """
    columns = zip(*(tensors_in(batch) for batch in batches), strict=True)

    def join(parts: Sequence[Tensor]) -> Tensor:
        # In all batches: with as many samples as time steps, one batch alone does not tell.
        dims = [_fitting_dims(part, length) for part, length in zip(parts, lengths, strict=True)]
        common = sorted(set.intersection(*dims))
        return torch.cat(tuple(parts), common[0]) if common else parts[0]

    joined = iter([join(parts) for parts in columns])
    return apply_to_collection(batches[0], Tensor, lambda _: next(joined), allow_frozen=True)


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a layer's output: recurrent and attention layers return a tuple, transformers a mapping.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    found = tensors_in(output)
    if not found:
        raise TypeError(f"the output holds no tensor: it is {describe(output)}")
    return found[0]
