"""Linear observers of a layer as a torchmetrics metric."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.checks import ArrayLike, as_activations, as_labels, require
from lightning_neuro.layer_result import ResultMetric
from lightning_neuro.observers.attributes import as_attributes, check_names
from lightning_neuro.observers.options import ObserverOptions, ObserverSettings
from lightning_neuro.observers.reading import read_attributes
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATES = ("activations", "attributes", "labels", "groups")
_MISSING = -1
_ALONE = torch.iinfo(torch.int64).min


class LinearObserver(ResultMetric):
    """Measures how well linear observers predict attributes from a layer's activations, and what single units denote.

    Scores are those of held-out samples (cross-validation). They are exact, so the samples are stored: N x (units x
    bytes per unit + A + 16) bytes, 1 MiB for 512 samples of 512 float32 units. The fit itself needs only sums: one
    factorisation for all attributes, and leaving a fold out is a subtraction. Samples are sorted by content first, so
    the result does not depend on how they are split into batches or over ranks. The options of torchmetrics are
    attributes: `metric.sync_on_compute = False`.

    Args:
        names: Names of the attributes; default: their numbers, or `class_<k>`.
        options: See `ObserverOptions`.

    Raises:
        ArgumentError: If an option is invalid; the message names it.

    Source:
        After Allen, arXiv 2103.08315 (2021), of which only the abstract was available; see `reading.py`.

    Example:
        >>> import torch
        >>> from lightning_neuro.observers import LinearObserver
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> metric = LinearObserver(names=["sum of two units"])
        >>> for part in x.split(50):
        ...     metric.update(part, (part[:, :1] + part[:, 1:2] > 0).float())
        >>> metric.compute().balanced_accuracy.item() > 0.9
        True
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    activations: list[Tensor]
    attributes: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(self, *, names: Sequence[str] | None = None, **options: Unpack[ObserverOptions]) -> None:
        settings = ObserverSettings(**options)
        super().__init__()
        self.names = check_names(names)
        self.settings = settings
        for state in _STATES:
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(
        self,
        activations: ArrayLike,
        attributes: ArrayLike,
        labels: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> None:
        """Add a batch; the first one sets the number of units and attributes.

        Args:
            activations: (N, units) of any real dtype.
            attributes: (N, A) of 0, 1 and NaN (missing), or integer class labels (N,): then one attribute per class.
            labels: Integer class labels (N,), for controls and sets of classes; negative if unlabelled.
            groups: Integers (N,); samples of one group are held out together. Default: each sample is its own group.

        Raises:
            ArgumentError: If a shape, dtype or value is wrong, or sizes differ from those of earlier batches.
        """
        before = len(self.activations) > 0
        x = as_activations(activations, num_units=self.activations[0].shape[1] if before else None)
        values = as_attributes(attributes, len(x))
        classes, grouping = as_labels(labels, len(x), name="labels"), as_labels(groups, len(x), name="groups")
        if values.ndim == 1:
            classes = values if classes is None else classes
            values = values[:, None][:, :0]
        if before:
            expected = self.attributes[0].shape[1]
            must = f"have {expected} columns as in earlier batches (class labels count as 0)"
            require(values.shape[1] == expected, "attributes", must, attributes)
        elif self.names is not None and values.shape[1] > 0:
            expected = len(self.names)
            require(values.shape[1] == expected, "attributes", f"have a column for each of {expected} names", values)
        # Stored tensors must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            parts = {
                "activations": x.clone(),
                "attributes": _compact(values),
                "labels": torch.full((len(x),), -1) if classes is None else classes.clone(),
                "groups": torch.full((len(x),), _ALONE) if grouping is None else grouping.clone(),
            }
            for state, part in parts.items():
                getattr(self, state).append(part.to(x.device))

    def compute(self) -> ObserverResult:
        """The result for all samples since the last reset; undefined values are NaN."""
        if not len(self.activations):
            nothing = torch.zeros(0, len(self.names or ()))
            return self._read(torch.zeros(0, 1), nothing, torch.zeros(0).long(), None)
        activations, attributes, labels, groups = (dim_zero_cat(getattr(self, state)) for state in _STATES)
        grouping = groups if (groups != _ALONE).any() else None
        if attributes.shape[1] == 0:
            return self._read(activations, labels, None, grouping)
        return self._read(activations, _expanded(attributes), labels, grouping)

    def _read(
        self, activations: Tensor, attributes: Tensor, labels: Tensor | None, groups: Tensor | None
    ) -> ObserverResult:
        return read_attributes(
            activations, attributes, labels, groups=groups, names=self.names, **asdict(self.settings)
        )

    def plot(self, result: ObserverResult | None = None, *, layer: str = "") -> "Figure":
        """Draw the balanced accuracy of the attributes; see `plot_attributes`.

        Args:
            result: The result to draw; default: that of `compute()`.
            layer: Name of the layer.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        found = self.compute() if result is None else result
        return found.plot(layer=layer)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # A rank without samples does not know the sizes, but must participate.
        empty = {"activations": torch.zeros(0, 0), "attributes": torch.zeros(0, 0, dtype=torch.int8)}
        for state in _STATES:
            if not getattr(self, state):
                setattr(self, state, [empty.get(state, torch.zeros(0, dtype=torch.int64)).to(self.device)])

        def gather(state: Tensor, group: Any | None = None) -> list[Tensor]:
            parts = dist_sync_fn(state, group=group)
            return [part for part in parts if len(part)] or list(parts[:1])

        super()._sync_dist(gather, process_group)


def _compact(attributes: Tensor) -> Tensor:
    """0, 1 and NaN as one byte each, NaN as -1."""
    if not attributes.is_floating_point():
        return attributes.to(torch.int8)
    return attributes.nan_to_num(nan=_MISSING).to(torch.int8)


def _expanded(attributes: Tensor) -> Tensor:
    return torch.where(attributes == _MISSING, torch.nan, attributes.double())
