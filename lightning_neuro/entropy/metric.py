"""The entropy of a layer's units as a torchmetrics.Metric: update batch by batch, merge, synchronise, compute."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.checks import (
    ArgumentError,
    ArrayLike,
    as_activations,
    as_labels,
    check_bool,
    check_choice,
    check_int,
    finite_rows,
    require,
)
from lightning_neuro.entropy.calibration import as_range, calibration_of, merge_calibrations, range_from_calibration
from lightning_neuro.entropy.options import Mode
from lightning_neuro.entropy.result import MAX_CLASSES, EntropyResult
from lightning_neuro.entropy.state_counts import count_states, entropy_from_states, mostafa_entropy
from lightning_neuro.layer_result import ResultMetric
from lightning_neuro.ranks import stack_padded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_CALIBRATION = merge_calibrations([])


class NeuronEntropy(ResultMetric):
    """Computes the entropy of the state of each unit of a layer, in bits, over any number of batches.

    The bins are fixed once, at the first update, so that all later evaluations can be compared: call `calibrate` with
    any number of batches before the first `update`; otherwise the bins are set from the batch of the first update. The
    range is kept by `reset()`, `clone()`, pickling and `state_dict()`. Shards and ranks can only be merged if they have
    the same range: pass the same `upper`, or merge their calibrations (`calibration`, `merge_calibrations`,
    `set_calibration`) before the first update. Results are on the CPU.

    In mode "states" the state is a table of counts, so memory does not grow with the number of samples. Mode
    "mostafa2021" needs the largest activation of all samples before it can bin any, so it keeps the activations.

    Args:
        mode: See `EntropyOptions`, as for `num_bins` and `miller_madow`.
        num_bins: Number of bins.
        miller_madow: Whether to correct for the bias of few samples.
        num_classes: Number of classes; labels >= `num_classes` raise an error. By default it grows with the labels
            seen. Once a label of 256 or more is seen, counts are no longer kept by class, and there is no class
            information.
        upper: Upper end of each unit's range, a positive floating-point tensor (units,); by default it is calibrated.
        **kwargs: Options of torchmetrics.Metric, such as `sync_on_compute`.

    Raises:
        ArgumentError: If an argument has a wrong type or value.

    Source:
        Mostafa and Mondal, arXiv 2106.04693 (2021); Miller (1955) for the correction.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import NeuronEntropy
        >>> metric = NeuronEntropy(miller_madow=False)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([1, 0]))
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([1, 0]))
        >>> metric.compute().scalars()
        {'dead_share': 0.5, 'total': 1.0, 'on_off': 1.0, 'amplitude': 0.0, 'class_information': 1.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    counts: Tensor
    largest_label: Tensor
    activations: list[Tensor]
    num_nonfinite: Tensor

    def __init__(
        self,
        *,
        mode: Mode = "states",
        num_bins: int = 10,
        miller_madow: bool = True,
        num_classes: int | None = None,
        upper: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        check_int("num_bins", num_bins, minimum=2)
        check_bool("miller_madow", miller_madow)
        if num_classes is not None:
            check_int("num_classes", num_classes, minimum=1)
        given_range = as_range(upper, mode)
        super().__init__(**kwargs)
        self.mode = mode
        self.num_bins = num_bins
        self.miller_madow = miller_madow
        self.num_classes = num_classes
        self.upper = given_range
        if mode == "mostafa2021":
            self.add_state("activations", [], dist_reduce_fx="cat")
        else:
            rows = 1 + (num_classes if num_classes and num_classes <= MAX_CLASSES else 0)
            self.add_state("counts", torch.zeros(rows, 0, num_bins + 1, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state("largest_label", torch.tensor(-1), dist_reduce_fx="max")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")
        self._calibration = _NO_CALIBRATION

    # The range

    @property
    def calibrated(self) -> bool:
        """Whether the range is fixed; always True in mode "mostafa2021", which has no range."""
        return self.upper is not None or self.mode == "mostafa2021"

    @property
    def calibration(self) -> tuple[Tensor, Tensor]:
        """Each unit's 64 largest activations, float64 (64, units), and the number of samples, int64 ().

        Both are on the CPU; with fewer than 64 samples the tensor is padded with -inf. Before the first `calibrate`,
        and after the range is fixed, they are (64, 0) and 0.
        """
        return self._calibration

    def calibrate(self, activations: ArrayLike) -> None:
        """Add a batch to the sample from which the range is estimated; any number of batches before the first update.

        The range is the exact 99.9 percentile for up to 63,000 samples in total. In mode "mostafa2021" this does
        nothing.

        Args:
            activations: (N, units), of any real dtype; samples with NaN or infinite values are left out.

        Raises:
            ArgumentError: If the range is already fixed, or the shape or dtype is wrong.
        """
        values = as_activations(activations, num_units=self._num_units())
        if self.mode == "mostafa2021":
            return
        self._require_no_range()
        with torch.inference_mode(False), torch.no_grad():
            finite = values[finite_rows(values)]
            self._calibration = merge_calibrations([self._calibration, calibration_of(finite)])

    def set_calibration(self, top: Tensor, count: Tensor | int) -> None:
        """Replace the calibration, for instance by one merged over ranks with `merge_calibrations`.

        Args:
            top: The largest activations of each unit, (k, units).
            count: How many samples they come from.

        Raises:
            ArgumentError: If the range is already fixed, or `top` has a wrong shape.
        """
        self._require_no_range()
        self._calibration = merge_calibrations([(top, count)])

    def forget_range(self) -> None:
        """Reset, and estimate a new range at the next calibration or update, if activations have outgrown the old."""
        self.reset()
        self.upper = None
        self._calibration = _NO_CALIBRATION

    def _require_no_range(self) -> None:
        if self.upper is not None:
            raise ArgumentError(
                "The range cannot be calibrated, because it has been fixed since the first update (or by `upper`). Call"
                " `forget_range` first."
            )

    def _range(self, activations: Tensor) -> Tensor:
        """The range; it is estimated and fixed if there are any samples."""
        if self.upper is None:
            if not self._calibration[1]:
                if not len(activations):
                    return torch.ones(activations.shape[1], dtype=torch.float64)
                self.calibrate(activations)
            self.upper = range_from_calibration(*self._calibration)
            self._calibration = _NO_CALIBRATION
        return self.upper

    def _num_units(self) -> int | None:
        """The number of units, once anything determines it."""
        if self.mode == "mostafa2021":
            return self.activations[0].shape[1] if len(self.activations) else None
        if self.upper is not None:
            return len(self.upper)
        return self.counts.shape[1] or self._calibration[0].shape[1] or None

    # The metric

    def update(self, activations: ArrayLike, targets: ArrayLike | None = None) -> None:
        """Add a batch.

        Args:
            activations: (N, units), of any real dtype. Samples with a NaN or infinite value are left out and counted.
            targets: Integer class labels, (N,); a negative one means "no label". Not used in mode "mostafa2021".

        Raises:
            ArgumentError: If a shape or dtype is wrong, the number of units differs from that of earlier batches, or a
                label is >= `num_classes`.
        """
        values = as_activations(activations, num_units=self._num_units())
        labels = as_labels(targets, len(values))
        # State tensors must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            finite = finite_rows(values)
            self.num_nonfinite = self.num_nonfinite + int((~finite).sum())
            values = values[finite]
            if self.mode == "mostafa2021":
                self.activations.append(values)  # a copy: the rows were selected
                return
            labels = None if labels is None else labels[finite.to(labels.device)]
            if not self._note_labels(labels):
                labels = None
                self.counts = self.counts.sum(0, keepdim=True)
            batch = count_states(values, self._range(values), num_bins=self.num_bins, targets=labels)
            self.counts = stack_padded([self.counts, batch.to(self.counts.device)]).sum(0)

    def _note_labels(self, labels: Tensor | None) -> bool:
        """Keep track of the largest label; returns whether there are few enough classes to count them separately."""
        label = -1 if labels is None or not len(labels) else int(labels.max())
        if self.num_classes is not None:
            require(
                label < self.num_classes, "targets", f"be below `num_classes`, {self.num_classes}", f"label {label}"
            )
        self.largest_label = self.largest_label.clamp(min=label)
        return int(self.largest_label) < MAX_CLASSES

    def compute(self) -> EntropyResult:
        """The entropies of all samples since the last reset; undefined ones are None or left out of `scalars()`."""
        num_nonfinite = int(self.num_nonfinite)
        if self.mode == "mostafa2021":
            activations = dim_zero_cat(self.activations) if len(self.activations) else torch.empty(0, 0)
            return mostafa_entropy(activations, num_bins=self.num_bins, num_nonfinite=num_nonfinite)
        return entropy_from_states(
            self.counts,
            miller_madow=self.miller_madow,
            num_nonfinite=num_nonfinite,
            largest_label=int(self.largest_label),
        )

    def plot(self, result: EntropyResult | None = None, *, layer: str = "") -> "Figure":
        """Draw the entropy of the units; see `plot_entropy`.

        Args:
            result: The result to draw; default: that of `compute()`.
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        found = self.compute() if result is None else result
        return found.plot(layer=layer)

    # Merging, ranks and checkpoints

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the samples of another metric (or of its state), which must have the same range.

        Args:
            incoming_state: A NeuronEntropy, or a dictionary of its states.

        Raises:
            ArgumentError: If the ranges, the bins or the numbers of units differ.
        """
        if isinstance(incoming_state, NeuronEntropy):
            if (self.mode, self.num_bins) != (incoming_state.mode, incoming_state.num_bins):
                raise ArgumentError(
                    f"`incoming_state` must have mode {self.mode!r} and {self.num_bins} bins;"
                    f" got {incoming_state.mode!r} and {incoming_state.num_bins}."
                )
            ranges = [metric.upper for metric in (self, incoming_state) if metric.upper is not None]
            _require_one_range(ranges)
            self.upper = ranges[0] if ranges else None
        super().merge_state(incoming_state)
        self._update_count = max(1, self._update_count)
        self._computed = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        if self.mode == "states":
            self.counts, counts = _padded([self.counts, incoming_state["counts"].to(self.counts.device)])
            incoming_state = incoming_state | {"counts": counts}
        super()._reduce_states(incoming_state)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        def gather(state: Tensor, group: Any | None = None) -> list[Tensor]:
            states = dist_sync_fn(state, group=group)
            if self.mode == "mostafa2021" and state.ndim == 2:
                # A rank without samples does not know the number of units.
                return [part for part in states if len(part)] or list(states[:1])
            return _padded(states)

        if self.mode == "mostafa2021":
            self.activations = self.activations or [torch.empty(0, 0, device=self.device)]
        else:
            own = torch.empty(0, dtype=torch.float64) if self.upper is None else self.upper
            ranges = dist_sync_fn(own.to(self.device), group=process_group or self.process_group)
            _require_one_range([upper.cpu() for upper in ranges if len(upper)])
        super()._sync_dist(gather, process_group)

    def get_extra_state(self) -> dict[str, Any]:
        """What is saved in addition to the states: the range, or the calibration so far."""
        top, count = self._calibration
        return {"upper": self.upper, "top": top, "count": int(count)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the range, for any number of units.

        Args:
            state: What `get_extra_state` returned.
        """
        self.upper = None if state["upper"] is None else state["upper"].cpu()
        self._calibration = merge_calibrations([(state["top"], state["count"])])


def _padded(states: Sequence[Tensor]) -> list[Tensor]:
    """States of several metrics, padded with zeros for missing classes and units."""
    units = {state.shape[1] for state in states if state.ndim == 3} - {0}
    if len(units) > 1:
        raise ArgumentError(f"`counts` must have the same number of units in all metrics; got {sorted(units)}.")
    return list(stack_padded(states))


def _require_one_range(ranges: Sequence[Tensor]) -> None:
    if any(not torch.equal(upper, ranges[0]) for upper in ranges[1:]):
        raise ArgumentError(
            "Counts cannot be merged, because the metrics have different ranges. Pass the same `upper` to all of them,"
            " or merge their calibrations before the first update."
        )
