"""Linear observers of a layer as a torchmetrics.Metric: update batch by batch, merge, synchronise, compute."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.metric import ResultMetric
from lightning_neuro.observers.functional import read_attributes
from lightning_neuro.observers.inputs import check_batch, check_options
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATES = ("activations", "attributes", "labels", "groups")
_MISSING = -1
_ALONE = torch.iinfo(torch.int64).min


class LinearObserver(ResultMetric):
    """How well linear observers of a layer's state tell each attribute of the samples, and single units do.

    Scores are of samples that an observer did not see (cross-fitted over folds). They are exact, so the samples are
    kept: N x (units x their bytes + A + 16) bytes, 1 MiB for 512 samples of 512 float32 units. The fit itself needs
    only sums: one factorisation for all attributes, and leaving a fold out is a subtraction. Samples are put into an
    order of their own before anything is computed, so shards and ranks give exactly what a single process gives.

    Args:
        names: The attributes' names; default: their numbers, or `label==k`.
        observer: `"ridge"`, in closed form, or `"logistic"`, the slow reference.
        controls: Random sets of classes against which the selectivity is told, for each size of an attribute.
        folds: At least 2; `"logistic"` needs 3.
        denotation: Whether to search for single units that denote something.
        **kwargs: Options of torchmetrics.Metric, such as `sync_on_compute`.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Source:
        After Allen, arXiv 2103.08315 (2021), whose abstract alone was at hand; see `functional.py`.

    Example:
        >>> import torch
        >>> from lightning_neuro import LinearObserver
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> metric = LinearObserver(names=["sum of two units"])
        >>> for part in x.split(50):
        ...     metric.update(part, (part[:, :1] + part[:, 1:2] > 0).float())
        >>> metric.compute().balanced_accuracy.item() > 0.9
        True
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    activations: list[Tensor]
    attributes: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(
        self,
        *,
        names: Sequence[str] | None = None,
        observer: str = "ridge",
        controls: int = 20,
        folds: int = 5,
        denotation: bool = True,
        **kwargs: Any,
    ) -> None:
        check_options(observer, controls, folds, denotation, names)
        super().__init__(**kwargs)
        self.names = None if names is None else tuple(names)
        self.observer = observer
        self.controls = controls
        self.folds = folds
        self.denotation = denotation
        for state in _STATES:
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(
        self, activations: Tensor, attributes: Tensor, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        """Add a batch; the first one sets the number of units and attributes.

        Args:
            activations: (N, units), any floating dtype.
            attributes: (N, A) of 0, 1 and NaN (missing), or integer class labels (N,): then one attribute per class.
            labels: Integer class labels (N,), for controls and sets of classes; negative where there is none.
            groups: Integers (N,); samples of one group are held out together. Default: each sample by itself.

        Raises:
            ValueError: For a wrong shape, dtype or value, or other sizes than before.
        """
        check_batch(activations, attributes, labels, groups)
        if attributes.ndim == 1:
            labels = attributes if labels is None else labels
            attributes = attributes[:, None][:, :0]
        self._check_sizes(activations, attributes)
        # What is kept must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            device = activations.device
            count = len(activations)
            self.activations.append(activations.detach().clone())
            self.attributes.append(_compact(attributes).to(device))
            self.labels.append(torch.full((count,), -1) if labels is None else labels.long().clone())
            self.groups.append(torch.full((count,), _ALONE) if groups is None else groups.long().clone())
            self.labels[-1], self.groups[-1] = self.labels[-1].to(device), self.groups[-1].to(device)

    def _check_sizes(self, activations: Tensor, attributes: Tensor) -> None:
        if len(self.activations):
            sizes = self.activations[0].shape[1], self.attributes[0].shape[1]
            if sizes != (given := (activations.shape[1], attributes.shape[1])):
                raise ValueError(
                    f"activations and attributes must have {sizes[0]} units and {sizes[1]} attributes as before, got"
                    f" {given[0]} and {given[1]} (class labels count as 0 attributes)."
                )
        if self.names is not None and attributes.shape[1] not in (0, len(self.names)):
            raise ValueError(f"attributes must have the {len(self.names)} columns of names, got {attributes.shape[1]}.")

    def compute(self) -> ObserverResult:
        """What the observers of all samples since the last reset tell; undefined values are NaN."""
        if not len(self.activations):
            nothing = torch.zeros(0, 1)
            return self._read(nothing, torch.zeros(0, len(self.names or ())), torch.zeros(0).long(), None)
        activations, attributes, labels, groups = (dim_zero_cat(getattr(self, state)) for state in _STATES)
        given = groups if (groups != _ALONE).any() else None
        if attributes.shape[1] == 0:
            return self._read(activations, labels, None, given)
        return self._read(activations, _expanded(attributes), labels, given)

    def _read(
        self, activations: Tensor, attributes: Tensor, labels: Tensor | None, groups: Tensor | None
    ) -> ObserverResult:
        return read_attributes(
            activations,
            attributes,
            labels,
            groups=groups,
            names=self.names,
            observer=self.observer,
            controls=self.controls,
            folds=self.folds,
            denotation=self.denotation,
        )

    def plot(self, result: ObserverResult | None = None) -> "Figure":
        """Draw what can be read; see `plot_attributes`.

        Args:
            result: What to draw, by default `compute()`.
        """
        from lightning_neuro.observers.plot import plot_attributes

        return plot_attributes({"layer": self.compute() if result is None else result})

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # A rank without samples does not know the sizes, but must take part.
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
