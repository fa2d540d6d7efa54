"""The entropy of a layer's units as a torchmetrics.Metric: update batch by batch, merge, synchronise, compute."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.entropy.calibration import calibration_of, merge_calibrations, range_from_calibration
from lightning_neuro.entropy.functional import count_states, entropy_from_states, paper_entropy
from lightning_neuro.entropy.inputs import check_batch, check_num_classes, check_options, finite_samples
from lightning_neuro.entropy.result import MAX_CLASSES, EntropyResult
from lightning_neuro.metric import ResultMetric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_CALIBRATION = merge_calibrations([])


class NeuronEntropy(ResultMetric):
    """How predictable each unit of a layer is, in bits, over any number of batches.

    The bins are frozen once, at the first calibration, so that the numbers of all later evaluations can be compared:
    call `calibrate` with any number of batches before the first `update`, or the first update's batch does it alone.
    The frozen range outlives `reset()`, `clone()`, pickling and `state_dict()`. Shards and ranks can only be added up
    where they share one range: give them the same `upper`, or merge their calibrations (`calibration`,
    `merge_calibrations`, `set_calibration`) before the first update. Results are on the CPU.

    In mode "correlation" the state is a table of counts, so memory does not grow with samples. Mode "mostafa2021" needs
    the largest activation of all samples before it can bin any, so it keeps the activations.

    Args:
        mode: "correlation", the name that the package's callbacks share for the project's own default statistics, or
            "mostafa2021", the entropy of the paper.
        bins: Equal-width bins of the active range, at least 2.
        miller_madow: Whether to correct for the bias of few samples (mode "correlation").
        num_classes: Number of classes; larger labels are refused. By default it grows with the labels seen. Once a
            label of 256 or more is seen, the counts are kept without the classes and there is no class information.
        upper: Upper end of each unit's range, a positive floating tensor (units,); by default it is calibrated.
        **kwargs: Options of torchmetrics.Metric, such as `sync_on_compute`.

    Raises:
        ValueError: If an argument has a wrong type or value.

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
        mode: str = "correlation",
        bins: int = 10,
        miller_madow: bool = True,
        num_classes: int | None = None,
        upper: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(mode, bins, miller_madow, upper)
        check_num_classes(num_classes)
        super().__init__(**kwargs)
        self.mode = mode
        self.bins = bins
        self.miller_madow = miller_madow
        self.num_classes = num_classes
        self.upper = None if upper is None else upper.detach().cpu().to(torch.float64, copy=True)
        self._calibration = _NO_CALIBRATION
        if mode == "mostafa2021":
            self.add_state("activations", [], dist_reduce_fx="cat")
        else:
            rows = 1 + (num_classes if num_classes and num_classes <= MAX_CLASSES else 0)
            self.add_state("counts", torch.zeros(rows, 0, bins + 1, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state("largest_label", torch.tensor(-1), dist_reduce_fx="max")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    # ---- the range -------------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        """Whether the range is frozen; mode "mostafa2021" has none to freeze."""
        return self.upper is not None or self.mode == "mostafa2021"

    @property
    def calibration(self) -> tuple[Tensor, Tensor]:
        """Each unit's 64 largest activations, float64 (64, units), and the number of samples, int64 ().

        Both are on the CPU; fewer than 64 samples are filled up with -inf. Before the first `calibrate`, and again
        after the range was frozen, they are (64, 0) and 0.
        """
        return self._calibration

    def calibrate(self, activations: Tensor) -> None:
        """Widen the sample from which the range is taken; any number of batches before the first update.

        The range is the exact 99.9 percentile for up to 63,000 samples in all. Mode "mostafa2021" has nothing to
        calibrate.

        Args:
            activations: (samples, units), any floating dtype; samples with NaN or infinite values are left out.

        Raises:
            ValueError: If the range is frozen already, or for a wrong shape or dtype.
        """
        check_batch(activations, None, units=self._units())
        if self.mode == "mostafa2021":
            return
        self._refuse_if_frozen()
        with torch.inference_mode(False), torch.no_grad():
            finite, _, _ = finite_samples(activations, None)
            self._calibration = merge_calibrations([self._calibration, calibration_of(finite)])

    def set_calibration(self, top: Tensor, count: Tensor | int) -> None:
        """Replace the calibration, for instance by one merged over ranks with `merge_calibrations`.

        Args:
            top: The largest activations of each unit, (k, units).
            count: How many samples they come from.

        Raises:
            ValueError: If the range is frozen already, or `top` has a wrong shape.
        """
        self._refuse_if_frozen()
        self._calibration = merge_calibrations([(top, count)])

    def forget_range(self) -> None:
        """Reset, and take a new range from the next calibration or update: for activations that outgrew the old one."""
        self.reset()
        self.upper = None
        self._calibration = _NO_CALIBRATION

    def _refuse_if_frozen(self) -> None:
        if self.upper is not None:
            raise ValueError(
                "The range is frozen since the first update (or by upper=); calibrate a new NeuronEntropy."
            )

    def _range(self, activations: Tensor) -> Tensor:
        """The frozen range; freezes it if there is any sample to take it from."""
        if self.upper is None:
            if not self._calibration[1]:
                if not len(activations):
                    return torch.ones(activations.shape[1], dtype=torch.float64)
                self.calibrate(activations)
            self.upper = range_from_calibration(*self._calibration)
            self._calibration = _NO_CALIBRATION
        return self.upper

    def _units(self) -> int | None:
        """The number of units, once anything told it."""
        if self.mode == "mostafa2021":
            return self.activations[0].shape[1] if len(self.activations) else None
        if self.upper is not None:
            return len(self.upper)
        return self.counts.shape[1] or self._calibration[0].shape[1] or None

    # ---- the metric ------------------------------------------------------------------------------------------------

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            activations: (samples, units), any floating dtype. Samples with a NaN or infinite value are left out and
                counted.
            targets: Integer class labels, (samples,); a negative one means "no label". Not used in mode "mostafa2021".

        Raises:
            ValueError: For a wrong shape or dtype, another number of units than before, or a label >= `num_classes`.
        """
        check_batch(activations, targets, units=self._units())
        # What is kept must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            finite, targets, left_out = finite_samples(activations, targets)
            self.num_nonfinite = self.num_nonfinite + left_out
            if self.mode == "mostafa2021":
                self.activations.append(finite.clone())
                return
            if not self._note_labels(targets):
                targets = None
                self.counts = self.counts.sum(0, keepdim=True)
            batch = count_states(finite, self._range(finite), bins=self.bins, targets=targets)
            self.counts = torch.stack(_same_size([self.counts, batch.to(self.counts.device)])).sum(0)

    def _note_labels(self, targets: Tensor | None) -> bool:
        """Keep track of the largest label; whether the classes are still few enough to be counted one by one."""
        label = -1 if targets is None or not len(targets) else int(targets.max())
        if self.num_classes is not None and label >= self.num_classes:
            raise ValueError(f"targets must be below num_classes={self.num_classes}, got a label {label}.")
        self.largest_label = self.largest_label.clamp(min=label)
        return int(self.largest_label) < MAX_CLASSES

    def compute(self) -> EntropyResult:
        """The entropies of all samples since the last reset; what is undefined is None or left out of `scalars()`."""
        num_nonfinite = int(self.num_nonfinite)
        if self.mode == "mostafa2021":
            activations = dim_zero_cat(self.activations) if len(self.activations) else torch.empty(0, 0)
            return paper_entropy(activations, bins=self.bins, num_nonfinite=num_nonfinite)
        return entropy_from_states(
            self.counts,
            miller_madow=self.miller_madow,
            num_nonfinite=num_nonfinite,
            largest_label=int(self.largest_label),
        )

    def plot(self, result: EntropyResult | None = None) -> "Figure":
        """Draw the entropy of the units; see `plot_entropy`.

        Args:
            result: What to draw, by default `compute()`.

        Returns:
            A matplotlib figure with one panel.
        """
        from lightning_neuro.entropy.plot import plot_entropy

        return plot_entropy({"layer": self.compute() if result is None else result})

    # ---- merging, ranks and checkpoints ----------------------------------------------------------------------------

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the samples of another metric (or of its state), which must have the same range.

        Args:
            incoming_state: A NeuronEntropy, or a dictionary of its states.

        Raises:
            ValueError: If the ranges, the bins or the numbers of units differ.
        """
        if isinstance(incoming_state, NeuronEntropy):
            if (self.mode, self.bins) != (incoming_state.mode, incoming_state.bins):
                raise ValueError(
                    f"merge_state needs a metric of mode {self.mode!r} with {self.bins} bins, "
                    f"got {incoming_state.mode!r} with {incoming_state.bins}."
                )
            ranges = [metric.upper for metric in (self, incoming_state) if metric.upper is not None]
            _check_one_range(ranges)
            self.upper = ranges[0] if ranges else None
        super().merge_state(incoming_state)
        self._update_count = max(1, self._update_count)
        self._computed = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        if self.mode == "correlation":
            self.counts, counts = _same_size([self.counts, incoming_state["counts"].to(self.counts.device)])
            incoming_state = incoming_state | {"counts": counts}
        super()._reduce_states(incoming_state)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        def gather(state: Tensor, group: Any | None = None) -> list[Tensor]:
            return _same_size(dist_sync_fn(state, group=group))

        if self.mode == "mostafa2021":
            self.activations = self.activations or [torch.empty(0, 0, device=self.device)]
        else:
            own = torch.empty(0, dtype=torch.float64) if self.upper is None else self.upper
            ranges = dist_sync_fn(own.to(self.device), group=process_group or self.process_group)
            _check_one_range([upper.cpu() for upper in ranges if len(upper)])
        super()._sync_dist(gather, process_group)

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the states: the frozen range, or the calibration so far."""
        top, count = self._calibration
        return {"upper": self.upper, "top": top, "count": int(count)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the range, whatever its size.

        Args:
            state: What `get_extra_state` gave.
        """
        self.upper = None if state["upper"] is None else state["upper"].cpu()
        self._calibration = merge_calibrations([(state["top"], state["count"])])


def _same_size(states: Sequence[Tensor]) -> list[Tensor]:
    """States of several ranks, brought to one size: tables of counts get zeros for the classes and units they lack."""
    if states[0].ndim == 2:  # activations: a rank without samples does not know the number of units
        return [state for state in states if len(state)] or list(states[:1])
    if states[0].ndim != 3:
        return list(states)
    units = {state.shape[1] for state in states} - {0}
    if len(units) > 1:
        raise ValueError(f"Metrics of one layer must have the same number of units, got {sorted(units)}.")
    size = [max(state.shape[axis] for state in states) for axis in range(3)]
    return [pad(state, (0, 0, 0, size[1] - state.shape[1], 0, size[0] - state.shape[0])) for state in states]


def _check_one_range(ranges: Sequence[Tensor]) -> None:
    if any(not torch.equal(upper, ranges[0]) for upper in ranges[1:]):
        raise ValueError(
            "Counts can only be added up over one range, but the metrics to be merged have different ones: "
            "give all the same upper=, or merge their calibrations before the first update."
        )
