"""Common parts of all metrics: `compute()` returns a frozen result with named scalars."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torchmetrics import Metric


@runtime_checkable
class LayerResult(Protocol):
    """The result of a metric of this package for one layer."""

    def scalars(self) -> Mapping[str, float]:
        """Measure -> value, undefined ones left out."""

    def notes(self) -> Mapping[str, str]:
        """Kind -> a warning for the user: what was left out of the data, or why a number is undefined."""

    def histogram(self) -> Tensor:
        """The values whose distribution is logged."""


def short_repr(result: LayerResult) -> str:
    """The type of a result and its scalars, for `__repr__`: its tensors would fill pages."""
    values = ", ".join(f"{name}={value:.4g}" for name, value in result.scalars().items())
    return f"{type(result).__name__}({values})"


def nonfinite_note(num_nonfinite: int, num_samples: int) -> str:
    """The note on samples that were left out.

    Args:
        num_nonfinite: Number of samples left out.
        num_samples: Number of samples used.

    Returns:
        A sentence.
    """
    total = num_samples + num_nonfinite
    return f"{num_nonfinite} of {total} samples are left out, because they have NaN or infinite activations."


class ResultMetric(Metric):
    """A metric whose `compute()` returns a frozen dataclass.

    torchmetrics searches the result of a metric for tensors, to clone them and to move them between devices, and cannot
    do so in a frozen dataclass. So the result passes through torchmetrics inside an object that it does not search.
    """

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def sealed(*args: Any, **kwargs: Any) -> _Envelope:
            return _Envelope(compute(*args, **kwargs))

        wrapped = super()._wrap_compute(sealed)

        @functools.wraps(compute)
        def opened(*args: Any, **kwargs: Any) -> Any:
            return wrapped(*args, **kwargs).result

        return opened

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return the result of this batch alone."""
        result = super().forward(*args, **kwargs)
        self._forward_cache = None  # `.to(device)` would search it for tensors
        return result


class _Envelope:
    def __init__(self, result: Any) -> None:
        self.result = result
