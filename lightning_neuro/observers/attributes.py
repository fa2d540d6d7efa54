"""Attributes of the samples: argument checks, their values in a batch, and their names."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.batches import BatchField, check_field, read_field
from lightning_neuro.checks import ArgumentError, ArrayLike, as_labels, describe, require


def check_attributes(attributes: Any) -> dict[str, BatchField] | None:
    """Require None, or a mapping from names without "/" to fields of a batch; returns a dictionary."""
    if attributes is None:
        return None
    mapping = isinstance(attributes, Mapping) and len(attributes) > 0
    require(mapping, "attributes", "be None, or a non-empty mapping from names to fields of a batch", attributes)
    for name, field in attributes.items():
        valid = isinstance(name, str) and name.strip() != "" and "/" not in name
        require(valid, "attributes", "have names that are non-empty strings without '/'", name)
        require(field is not None, "attributes", f"map {name!r} to a function of the batch, a key or an index", field)
        check_field(f"attributes[{name!r}]", field)
    return dict(attributes)


def read_attribute_values(attributes: Mapping[str, BatchField], batch: Any, num_samples: int) -> Tensor:
    """The attributes of a batch.

    Args:
        attributes: Name -> field of the batch: a function of the batch, a key or an index.
        batch: As the data loader returns it, on the model's device.
        num_samples: Number of samples in it.

    Returns:
        float64 (num_samples, A) of 0, 1 and NaN, on the CPU.

    Raises:
        ArgumentError: If an attribute is not found or has a wrong length or wrong values; the message names it.
    """
    columns = []
    for name, field in attributes.items():
        argument = f"attributes[{name!r}]"
        values = _as_tensor(argument, read_field(argument, field, batch)).to(torch.float64)
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        require(values.shape == (num_samples,), argument, f"have a value for each of the {num_samples} samples", values)
        columns.append(values)
    if not columns:
        return torch.zeros(num_samples, 0, dtype=torch.float64)
    table = torch.stack(columns, 1)
    wrong = _not_binary(table).any(0)
    if wrong.any():
        first = int(wrong.int().argmax())
        _check_binary(f"attributes[{list(attributes)[first]!r}]", table[:, first])
    return table


def read_groups(field: BatchField, batch: Any, num_samples: int) -> Tensor:
    """The groups of a batch's samples as int64 (num_samples,), on the CPU; errors as in `read_attribute_values`."""
    groups = as_labels(_as_tensor("group_fn", read_field("group_fn", field, batch)), num_samples, name="group_fn")
    assert groups is not None
    return groups


def _as_tensor(argument: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"`{argument}` must be numbers; got {describe(value)}: {error}.") from None


def as_attributes(value: ArrayLike, num_samples: int) -> Tensor:
    """Attributes as a tensor: (N, A) of 0, 1 and NaN, or (N,) int64 class labels.

    Raises:
        ArgumentError: If the shape, dtype or values are wrong.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
    matrix = isinstance(tensor, Tensor) and tensor.ndim == 2 and len(tensor) == num_samples and not tensor.is_complex()
    if not matrix:
        must = f"be a tensor or array of shape ({num_samples}, A), or integer class labels of shape ({num_samples},)"
        require(isinstance(tensor, Tensor) and tensor.ndim == 1, "attributes", must, value)
        labels = as_labels(tensor, num_samples, name="attributes")
        assert labels is not None
        return labels
    _check_binary("attributes", tensor)
    return tensor.detach()


def _not_binary(values: Tensor) -> Tensor:
    return (values != 0) & (values != 1) & ~values.isnan()


def _check_binary(argument: str, values: Tensor) -> None:
    wrong = _not_binary(values)
    if wrong.any():
        seen = ", ".join(str(value) for value in torch.unique(values[wrong])[:3].tolist())
        require(False, argument, "be 0, 1 or NaN (missing)", seen)


def check_names(names: Any) -> tuple[str, ...] | None:
    """Require None or a sequence of strings; returns a tuple."""
    if names is None:
        return None
    strings = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
    require(strings, "names", "be None or a sequence of strings", names)
    return tuple(names)


def class_attribute_names(number: int, class_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the attributes "is of class k": the class's name where it is known, else `class_<k>`.

    They are segments of keys: "/" becomes "_", and the number of the class is appended to names that occur twice.

    Example:
        >>> class_attribute_names(4, ["cat", "n/a", "cat"])
        ('cat_0', 'n_a', 'cat_2', 'class_3')
    """
    known = [name.replace("/", "_").strip() for name in (class_names or ())[:number]]
    names = [name or f"class_{k}" for k, name in enumerate(known)]
    names += [f"class_{k}" for k in range(len(names), number)]
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name}_{k}" for k, name in enumerate(names))
