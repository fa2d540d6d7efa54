"""What the user wants to be read: attributes of a batch's samples, named, as numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_neuro.observers.inputs import check_values, describe

Attribute = str | Callable[[Any], Any]


def check_attributes(attributes: Any) -> dict[str, Attribute] | None:
    """Refuse what is not a mapping of names to keys or functions of a batch."""
    if attributes is None:
        return None
    if not isinstance(attributes, Mapping) or not attributes:
        raise MisconfigurationException(
            "`attributes` must be a mapping from names to keys of a dict batch or functions of the batch, or None for"
            f" one attribute per class; got {attributes!r}."
        )
    for name, source in attributes.items():
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise MisconfigurationException(f"`attributes` needs names that are strings without '/'; got {name!r}.")
        if not isinstance(source, str) and not callable(source):
            raise MisconfigurationException(
                f"`attributes` must map {name!r} to a key or to a function of the batch; got {source!r}."
            )
    return dict(attributes)


def check_source(name: str, source: Any) -> None:
    """Refuse what is neither None, nor a key, nor a function."""
    if source is not None and not isinstance(source, str) and not callable(source):
        raise MisconfigurationException(f"`{name}` must be a key, a function of the batch or None; got {source!r}.")


def read_batch(attributes: Mapping[str, Attribute], batch: Any, samples: int) -> Tensor:
    """The attributes of a batch.

    Args:
        attributes: Name -> key or function.
        batch: As the data loader gives it, on the model's device.
        samples: Its number of samples.

    Returns:
        float64 (samples, A) of 0, 1 and NaN, on the CPU.

    Raises:
        MisconfigurationException: Naming the attribute, if it cannot be found, has another length or other values.
    """
    return torch.stack([_column(name, source, batch, samples) for name, source in attributes.items()], 1)


def read_numbers(name: str, source: Attribute, batch: Any, samples: int) -> Tensor:
    """Whole numbers, int64 (samples,), such as groups; raises as `read_batch` does."""
    value = _value(f"`{name}`", source, batch)
    try:
        values = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(f"`{name}` must give numbers, got {describe(value)}: {error}.") from None
    if values.shape != (samples,) or values.is_floating_point():
        raise MisconfigurationException(
            f"`{name}` must give a whole number for each of the {samples} samples; got {describe(values)}."
        )
    return values.long()


def _column(name: str, source: Attribute, batch: Any, samples: int) -> Tensor:
    label = f"`attributes`: {name!r}"
    value = _value(label, source, batch)
    try:
        values = torch.as_tensor(value).detach().cpu().to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(f"{label} must give numbers, got {describe(value)}: {error}.") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape != (samples,):
        raise MisconfigurationException(
            f"{label} must give a value for each of the {samples} samples of a batch; got {describe(values)}."
        )
    try:
        check_values(label, values)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from None
    return values


def _value(label: str, source: Attribute, batch: Any) -> Any:
    if callable(source):
        try:
            return source(batch)
        except Exception as error:
            raise MisconfigurationException(
                f"{label}: the function fails on a batch: {type(error).__name__}: {error}."
            ) from error
    if not isinstance(batch, Mapping) or source not in batch:
        keys = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else f"no keys: it is a {type(batch).__name__}"
        raise MisconfigurationException(f"{label} stands for the key {source!r}, but the batch has {keys}.")
    return batch[source]
