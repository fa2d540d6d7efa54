"""What the package's metrics share: their `compute()` returns a frozen result, not a tensor."""

import functools
from collections.abc import Callable
from typing import Any

from torchmetrics import Metric


class ResultMetric(Metric):
    """A metric whose `compute()` returns a frozen dataclass.

    torchmetrics looks for tensors inside whatever a metric returns, to clone them and to move them between devices, and
    gives up on a frozen dataclass. So the result passes through it in an envelope that it does not look into.
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
        self._forward_cache = None  # `.to(device)` would look into it
        return result


class _Envelope:
    def __init__(self, result: Any) -> None:
        self.result = result
