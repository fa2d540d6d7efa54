"""Checks of arguments: what is wrong, what was seen, what is allowed, before the first step."""

import inspect
import re
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric

_NAME = re.compile(r"\w[\w.-]*")


def check_count(name: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MisconfigurationException(f"`{name}` must be a whole number of at least 1; got {value!r}.")


def check_name(name: Any) -> None:
    """Refuse a first part of keys that would not stay one part, or would leave the log directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MisconfigurationException(
            f"`name` may hold letters, digits, '_', '-' and '.', and begins with neither '-' nor '.'; got {name!r}."
        )


def check_metric(metric: Any) -> None:
    """Refuse what is not a metric over activations and targets."""
    if not isinstance(metric, Metric):
        raise MisconfigurationException(f"`metric` must be a torchmetrics.Metric; got {type(metric).__name__}.")
    try:
        inspect.signature(metric.update).bind(None, None)
    except TypeError as error:
        raise MisconfigurationException(
            f"`metric` must have `update(self, activations, targets=None)`; {type(metric).__name__}.update cannot be"
            f" called so: {error}."
        ) from None
