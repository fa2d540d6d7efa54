"""Argument checks: one exception, one form of message, and the conversion of inputs of metrics and functions."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro.compat import MisconfigurationException

ArrayLike = Tensor | npt.NDArray[Any]

_NAME = re.compile(r"\w[\w.-]*")


class ArgumentError(MisconfigurationException, ValueError):
    """Raised for an invalid argument.

    The message gives the name of the argument, what it must be, and what was passed. It is a `ValueError` and the
    `MisconfigurationException` of both Lightning packages, so any of them can be caught.
    """


class NothingToDoError(ArgumentError):
    """Raised where a default finds nothing to work on, such as labels or logits.

    It disables the callback for the run, with a warning, unless the user asked for what cannot be done.
    """


def require(condition: bool, name: str, must: str, seen: object) -> None:
    """Raise an `ArgumentError` of the form "`name` must ...; got ...." unless the condition holds.

    Args:
        condition: The condition that must be true.
        name: Name of the argument.
        must: What the argument must be, such as `"be an integer >= 1"`.
        seen: What was passed; `describe` formats it for the message.

    Raises:
        ArgumentError: If the condition is false.
    """
    if not condition:
        raise ArgumentError(f"`{name}` must {must}; got {describe(seen)}.")


def check_int(name: str, value: Any, *, minimum: int | None = None) -> None:
    """Require an integer, at least `minimum` if one is given."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    at_least = "" if minimum is None else f" >= {minimum}"
    require(integer and (minimum is None or value >= minimum), name, f"be an integer{at_least}", value)


def check_number(name: str, value: Any, must: str, allowed: Callable[[float], bool]) -> None:
    """Require a finite real number for which `allowed` is true; `must` describes the allowed numbers."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    require(bool(number and allowed(value)), name, must, value)


def check_bool(name: str, value: Any) -> None:
    """Require True or False."""
    require(isinstance(value, bool), name, "be True or False", value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Require one of some strings."""
    choices = tuple(choices)
    require(isinstance(value, str) and value in choices, name, f"be one of {', '.join(map(repr, choices))}", value)


def check_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """Require None, a name or glob, or a non-empty sequence of them; returns a tuple."""
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else value
    strings = isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
    require(strings and len(patterns) > 0, name, "be a name or glob, or a non-empty sequence of them", value)
    return tuple(patterns)


def check_name(value: Any) -> None:
    """Require a `name` that is a single segment of a key and stays inside the log directory."""
    valid = isinstance(value, str) and _NAME.fullmatch(value) is not None
    require(valid, "name", "consist of letters, digits, '_', '-' and '.', and not start with '-' or '.'", value)


def check_metric(metric: Any) -> None:
    """Require a `torchmetrics.Metric` whose `update` takes activations and targets."""
    require(isinstance(metric, Metric), "metric", "be a torchmetrics.Metric", metric)
    try:
        inspect.signature(metric.update).bind(None, None)
    except TypeError as error:
        raise ArgumentError(
            "`metric` must have a method `update(self, activations, targets=None)`; got"
            f" {type(metric).__name__}.update, which cannot be called with two arguments: {error}."
        ) from None


def as_activations(value: Any, *, num_units: int | None = None, name: str = "activations") -> Tensor:
    """Activations as a detached (N, units) tensor of float32 or float64, on its own device.

    Args:
        value: A tensor or NumPy array, (N, units), of any real dtype. Integers and half precision become float32.
        num_units: Number of units of earlier batches; None or 0 if there were none.
        name: Name of the argument, for the message.

    Returns:
        (N, units), float32 or float64.

    Raises:
        ArgumentError: If it is not a real matrix with at least one unit, or has another number of units than before.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
    matrix = isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] > 0 and not tensor.is_complex()
    require(matrix, name, "be a real tensor or array of shape (N, units) with at least one unit", value)
    if num_units:
        require(tensor.shape[1] == num_units, name, f"have {num_units} units as in earlier batches", value)
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_labels(value: Any, num_samples: int, *, name: str = "targets") -> Tensor | None:
    """Class labels as an int64 (N,) tensor on their own device; None stays None.

    Args:
        value: A tensor or NumPy array of integers, (N,). Negative labels mean "no label".
        num_samples: N.
        name: Name of the argument, for the message.

    Returns:
        int64 (N,), or None.

    Raises:
        ArgumentError: If they are not one integer per sample.
    """
    if value is None:
        return None
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
    integer = isinstance(tensor, Tensor) and not tensor.is_floating_point() and not tensor.is_complex()
    integer = integer and tensor.dtype != torch.bool and tensor.shape == (num_samples,)
    require(integer, name, f"be integers of shape ({num_samples},), one per sample", value)
    return tensor.detach().long()


def finite_rows(activations: Tensor) -> Tensor:
    """Which samples can be used: bool (N,), False if any activation is NaN or infinite in float32.

    Everywhere in the package such samples are left out and counted (`num_nonfinite`).
    """
    values = activations.float()
    if values.sum().isfinite():  # then all values are finite, and the rows need not be checked
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    return values.isfinite().all(dim=1)


def describe(value: Any) -> str:
    """Describe a value for a message: shape and dtype of tensors, keys of mappings, otherwise its repr or type."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value)) or '(none)'}"
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, (tuple, list)):
        if all(isinstance(part, (str, int, float, bool, type(None))) for part in value) and len(value) <= 8:
            return repr(value)
        return f"a {type(value).__name__} of {len(value)} ({', '.join(describe(part) for part in value[:4])})"
    return f"a {type(value).__name__}"


def as_globs(name: str, patterns: Any) -> tuple[str, ...]:
    """A key or glob, or a sequence of them, as a tuple; raises `ArgumentError` for anything else."""
    found = (patterns,) if isinstance(patterns, str) else patterns
    strings = isinstance(found, Sequence) and all(isinstance(pattern, str) for pattern in found)
    require(strings, name, "be a key or glob, or a sequence of them", patterns)
    return tuple(found)
