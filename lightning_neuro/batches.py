"""The contents of a batch: input, target, number of samples, and the dimension of the samples in its tensors."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_neuro.checks import ArgumentError, describe, require
from lightning_neuro.import_paths import imported, is_import_path

INPUT_KEYS = ("input", "inputs", "x", "image", "images", "pixel_values", "img", "data", "features", "input_ids")
TARGET_KEYS = ("target", "targets", "y", "label", "labels", "future_target")

BatchField = str | int | Callable[[Any], Any]
"""A field of a batch: a key, an index, a function of the batch, or its import path, `"package.module:function"`."""


def default_input(batch: Any) -> Any:
    """The model's input in a batch: the batch itself, its first element, or a dict entry of a usual name.

    Raises:
        ArgumentError: If the input cannot be identified.
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
    """The target in a batch: its second element, or a field of a usual name; None if there is none."""
    if isinstance(batch, Mapping):
        named = next((batch[key] for key in TARGET_KEYS if key in batch), None)
        return _target_without_name(batch) if named is None else named
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _plain_target(batch[1]) if len(batch) > 1 else None
    if isinstance(batch, Tensor):
        return None
    with suppress(Exception):  # objects, such as batches of graphs, whose properties may raise any error
        return next((found for key in TARGET_KEYS if isinstance(found := getattr(batch, key, None), Tensor)), None)
    return None


def _target_without_name(batch: Mapping[Any, Any]) -> Any:
    """The only integers in a mapping, or the target in the first of several combined batches that has one."""
    parts = [part for part in batch.values() if isinstance(part, (list, tuple, Mapping))]
    if parts and len(parts) == len(batch):
        return next((found for part in parts if (found := default_target(part)) is not None), None)
    return _only_integers(batch)


def _only_integers(batch: Mapping[Any, Any]) -> Any:
    """The only field with one integer per sample; None if there is none, or more than one."""
    found = [
        part
        for key, part in batch.items()
        if isinstance(part, Tensor) and part.ndim == 1 and not part.is_floating_point() and key not in INPUT_KEYS
    ]
    return found[0] if len(found) == 1 else None


def _plain_target(target: Any) -> Any:
    """A target as a tensor, if possible.

    Weights beside it are left out. A list of dicts with `labels` becomes the labels of the objects in each image, of
    shape (N, objects), padded with -100.
    """
    if isinstance(target, tuple) and target and isinstance(target[0], Tensor):
        return target[0]  # with weights, as in forecasting
    listed = isinstance(target, (list, tuple)) and len(target) > 0
    if not listed or not all(isinstance(part, Mapping) and isinstance(part.get("labels"), Tensor) for part in target):
        return target
    labels = [part["labels"].flatten() for part in target]
    return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


def class_labels(targets: Any) -> Tensor | None:
    """Targets as (N,) int64 class labels; None if they are not class labels (a regression target, a mask)."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return None
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    return targets.long() if targets.ndim == 1 else None


def check_field(name: str, value: Any) -> None:
    """Require None or something that `read_field` can read; an import path is imported."""
    allowed = value is None or isinstance(value, str) or callable(value)
    allowed = allowed or (isinstance(value, int) and not isinstance(value, bool))
    require(allowed, name, "be a function of the batch, or the key or index of a field in it", value)
    if is_import_path(value):
        imported(name, value)


def read_field(name: str, field: BatchField, batch: Any) -> Any:
    """Read a field of a batch.

    Args:
        name: Name of the argument that holds the field, for the message.
        field: A key, an index, a function of the batch or its import path.
        batch: The batch.

    Returns:
        The value of the field.

    Raises:
        ArgumentError: If the function fails on the batch, or the batch has no such field.
    """
    if isinstance(field, str) and is_import_path(field):
        field = imported(name, field)
    if callable(field):
        try:
            return field(batch)
        except Exception as error:
            raise ArgumentError(
                f"`{name}` must be a function that accepts a batch; it failed on {describe(batch)}:"
                f" {type(error).__name__}: {error}."
            ) from error
    # Objects such as dataclasses have fields as attributes; a tensor has no named fields.
    if isinstance(field, str) and not isinstance(batch, Mapping) and not isinstance(batch, Tensor):
        with suppress(AttributeError):
            return getattr(batch, field)
    try:
        if isinstance(field, str) and isinstance(batch, Tensor):
            raise KeyError(field)
        return batch[field]
    except (KeyError, IndexError, TypeError) as error:
        raise ArgumentError(
            f"`{name}` must be a field of the batch, which is {describe(batch)}; got {field!r}."
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
    """The number of samples in a batch, from the first tensor in the values; None if there is none.

    A list of images of which each is a tensor counts as one sample per tensor, and a batch of graphs has one sample per
    graph.
    """
    for value in values:
        if (length := _listed_samples(value)) is not None:
            return length
        for tensor in tensors_in(value):
            if tensor.ndim > 0:
                return tensor.shape[0]
        for name in ("num_graphs", "num_nodes"):
            if type(length := getattr(value, name, None)) is int:
                return length
    return None


def _listed_samples(value: Any) -> int | None:
    """The number of samples if they are listed one by one; None if the value, or its first field, is no such list."""
    fields = list(value.values()) if isinstance(value, Mapping) else value
    first = fields[0] if isinstance(fields, (list, tuple)) and fields else None
    if not isinstance(first, (list, tuple)) or not first or not all(isinstance(part, Tensor) for part in first):
        return None
    if any(part.ndim == 0 or part.ndim > 3 for part in first):
        return None  # several views of a batch of images
    described = any(
        field is not first and isinstance(field, (list, tuple)) and len(field) == len(first) for field in fields
    )
    sizes_differ = len({part.shape for part in first}) > 1
    is_image = first[0].ndim == 3 and first[0].shape[0] in (1, 3)
    return len(first) if described or sizes_differ or is_image else None


def sample_dim(tensor: Tensor, num_samples: int) -> int | None:
    """The dimension of a tensor along which the samples lie: 0, or 1 if the time comes first; None if neither.

    Recurrent and attention layers put the time first by default. If both dimensions have the size of the batch, the
    first one is returned.
    """
    return min(_fitting_dims(tensor, num_samples), default=None)


def _fitting_dims(tensor: Tensor, num_samples: int) -> set[int]:
    return {dim for dim in (0, 1) if dim < tensor.ndim and tensor.shape[dim] == num_samples}


def samples_first(tensor: Tensor, num_samples: int) -> Tensor | None:
    """The tensor with its samples in dimension 0; None if they are not found."""
    dim = sample_dim(tensor, num_samples)
    return None if dim is None else tensor.transpose(0, dim)


def select_samples(values: Any, rows: Tensor, num_samples: int) -> Any:
    """Select some samples in nested values; tensors that do not hold the samples of the batch are left unchanged.

    Args:
        values: Tensors, or nested collections of them.
        rows: int64, indices of the samples.
        num_samples: Number of samples in the batch.

    Returns:
        Values of the same structure.
    """

    def select(tensor: Tensor) -> Tensor:
        dim = sample_dim(tensor, num_samples)
        return tensor if dim is None else tensor.index_select(dim, rows.to(tensor.device))

    def selected(value: Any, is_batch: bool = False) -> Any:
        if isinstance(value, list) and len(value) == num_samples and not is_batch and not tensors_in(value):
            return [value[row] for row in rows.tolist()]  # names or texts of the samples
        if type(value) in (list, tuple):
            return type(value)(selected(part) for part in value)
        if type(value) is dict:
            return {key: selected(part) for key, part in value.items()}
        return apply_to_collection(value, Tensor, select, allow_frozen=True)

    return selected(values, is_batch=True)


def can_select_samples(values: Any, num_samples: int | None) -> bool:
    """Whether each tensor in nested values holds the samples of the batch, so that some of them can be selected.

    In a batch of graphs or of detections, tensors have other lengths, so such a batch can only be used as a whole.
    """
    if num_samples is None or _opaque(values):
        return False
    found = [tensor for tensor in tensors_in(values) if tensor.ndim > 0]
    return bool(found) and all(sample_dim(tensor, num_samples) is not None for tensor in found)


def holds_samples(values: Any, num_samples: int) -> bool:
    """Whether samples can be selected in nested values, beside which there may be tensors that all samples share."""
    return not _opaque(values) and any(sample_dim(tensor, num_samples) is not None for tensor in tensors_in(values))


def _opaque(values: Any) -> bool:
    """Whether nested values hold an object whose tensors are out of sight."""
    if isinstance(values, Mapping):
        return any(_opaque(part) for part in values.values())
    if isinstance(values, (list, tuple)):
        return any(_opaque(part) for part in values)
    return hasattr(values, "to") and not isinstance(values, Tensor) and not tensors_in(values)


def concatenate_samples(batches: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Concatenate nested values of several batches along their samples.

    Args:
        batches: Values of the same structure.
        lengths: Number of samples in each.

    Returns:
        Values of the same structure, as those of one batch.
    """
    columns = zip(*(tensors_in(batch) for batch in batches), strict=True)

    def join(parts: Sequence[Tensor]) -> Tensor:
        # The dimension must fit in all batches, because a batch with as many samples as time steps is ambiguous.
        dims = [_fitting_dims(part, length) for part, length in zip(parts, lengths, strict=True)]
        common = sorted(set.intersection(*dims))
        return torch.cat(tuple(parts), common[0]) if common else parts[0]

    joined = iter([join(parts) for parts in columns])
    return apply_to_collection(batches[0], Tensor, lambda _: next(joined), allow_frozen=True)


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a layer's output, which may be a tensor, a tuple (recurrent layers) or a mapping.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    found = tensors_in(output)
    if not found:
        raise TypeError(f"the output holds no tensor: it is {describe(output)}")
    return found[0]
