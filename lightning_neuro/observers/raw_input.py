"""The same observers on the raw input: the reference with which layers are compared."""

from collections.abc import Callable

from torch import Tensor

from lightning_neuro.observers.metric import LinearObserver
from lightning_neuro.probe_batch import ProbeBatch

MAX_INPUTS = 8192


class RawInput:
    """Fits observers to the raw input, in the first pass only, because it does not change during a run.

    Args:
        metric: An observer without controls and denotation.
    """

    def __init__(self, metric: LinearObserver) -> None:
        self.metric = metric
        self.error: Exception | None = None
        self._widths: set[int] = set()

    def add(self, batch: ProbeBatch, update: Callable[[LinearObserver, Tensor], None]) -> None:
        """Call `update` with the metric and the batch's input as rows, if it is floating-point with a row per sample.

        Errors are kept for `check`.
        """
        values = batch.inputs
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim == 0:
            return
        if len(values) != batch.num_samples:
            return
        rows = values.reshape(len(values), -1)
        self._widths.add(rows.shape[1])
        if len(self._widths) > 1:  # sequences of different lengths have no common features
            self.error = None
            return
        # Evenly spread elements of a large image carry nearly the same information as all of them.
        step = -(-rows.shape[1] // MAX_INPUTS)
        try:
            update(self.metric, rows[:, ::step].float())
        except Exception as error:
            self.error = self.error or error

    def check(self) -> bool:
        """Whether anything was added; raises the first error of `add`."""
        if self.error is not None:
            raise self.error
        return self.metric.update_called and len(self._widths) == 1

    def scores(self) -> Tensor:
        """(A, 3), balanced accuracy with its lower and upper bound; NaN where undefined."""
        return self.metric.compute().score
