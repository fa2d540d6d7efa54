"""Checks of what the user hands to an observer: what is wrong, what was seen, what is allowed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OBSERVERS = ("ridge", "logistic")


def check_options(observer: Any, controls: Any, folds: Any, denotation: Any, names: Sequence[str] | None) -> None:
    """Raise ValueError for a wrong option."""
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be 'ridge' or 'logistic', got {observer!r}.")
    if not isinstance(controls, int) or isinstance(controls, bool) or controls < 0:
        raise ValueError(f"controls must be a whole number of at least 0, got {controls!r}.")
    least = 3 if observer == "logistic" else 2
    if not isinstance(folds, int) or isinstance(folds, bool) or folds < least:
        raise ValueError(f"folds must be a whole number of at least {least} for observer {observer!r}, got {folds!r}.")
    if not isinstance(denotation, bool):
        raise ValueError(f"denotation must be True or False, got {denotation!r}.")
    if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"names must be a sequence of strings or None, got {names!r}.")


def check_batch(activations: Any, attributes: Any, labels: Any = None, groups: Any = None) -> None:
    """Raise ValueError unless the shapes, dtypes and values of a batch are those of an observer."""
    if not isinstance(activations, Tensor) or activations.ndim != 2 or not activations.is_floating_point():
        raise ValueError(f"activations must be floating of shape (samples, units), got {describe(activations)}.")
    samples = len(activations)
    if not isinstance(attributes, Tensor) or attributes.ndim not in (1, 2) or len(attributes) != samples:
        raise ValueError(
            f"attributes must be a tensor of shape ({samples}, A), a row for each sample, or integer class labels"
            f" of shape ({samples},), got {describe(attributes)}."
        )
    if attributes.ndim == 2:
        check_values("attributes", attributes)
    elif not _is_integer(attributes):
        raise ValueError(f"attributes of shape (N,) must be integer class labels, got {describe(attributes)}.")
    for name, value in (("labels", labels), ("groups", groups)):
        if value is not None and (not isinstance(value, Tensor) or not _is_integer(value) or value.shape != (samples,)):
            raise ValueError(f"{name} must be an integer tensor of shape ({samples},) or None, got {describe(value)}.")


def check_values(name: str, values: Tensor) -> None:
    """Raise ValueError unless all values are 0, 1 or NaN."""
    wrong = (values != 0) & (values != 1) & (values == values)  # NaN alone differs from itself
    if wrong.any():
        seen = ", ".join(str(value) for value in torch.unique(values[wrong])[:3].tolist())
        raise ValueError(f"{name} must hold 0, 1 and NaN (missing) only, got {seen}.")


def _is_integer(values: Tensor) -> bool:
    return not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool


def describe(value: Any) -> str:
    """A tensor or other value in a few words."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
