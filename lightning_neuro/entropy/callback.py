"""Activation entropy as training curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightning_neuro.callback import MetricCallback
from lightning_neuro.entropy.calibration import merge_calibrations
from lightning_neuro.entropy.metric import NeuronEntropy
from lightning_neuro.entropy.plot import plot_entropy
from lightning_neuro.entropy.result import EntropyResult
from lightning_neuro.probe import Probe, ProbeBatch
from lightning_neuro.ranks import on_any_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ActivationEntropy(MetricCallback):
    """Shows how predictable the units of each layer are while the network trains, in bits.

    The bins are set in a pass of their own, so each evaluation runs the network twice over the probe's samples.

    A unit's state is "inactive" or one of ten equal bins up to its 99.9 percentile. The entropy says how varied a
    unit's answers are, the class information how much of this variety tells the class. Neither predicts accuracy: in
    training all of them follow the number of epochs. Do not compare layers with each other: their bins differ.

    Args:
        probe: Which samples, which layers, when; see `Probe`.
        mode: `"correlation"` (the name that the package's callbacks share for the project's own statistics), or
            `"mostafa2021"` for the entropy of the paper.
        bins: Equal-width bins of the active range, at least 2.
        calibrate: When the bins are set: `"each"` evaluation, or at the `"first"` and frozen. Activations can grow a
            hundredfold in the first epochs of training; in frozen bins nearly all of them then fall into the last one,
            and the entropy goes to 0 whatever the network does. So frozen bins are for networks that have settled, as
            in fine-tuning, where they show a change of scale.
        miller_madow: Whether to correct for the bias of few samples (mode `"correlation"`).
        name: First part of the keys, instead of `entropy`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        on_error: `"warn"` or `"raise"`.

    Keys:
        Each as `entropy/<measure>/<layer>`, and as `entropy/<measure>` for the mean over layers.

        ======================= ============================================================ ============ ============
        measure                 meaning (mean over live units, in bits)                      range        better when
        ======================= ============================================================ ============ ============
        `total`                 entropy of the state: `on_off` + P(active) x `amplitude`     0 .. log2 11 neither
        `total_initial`         `total` before the first training step                       0 .. log2 11 (reference)
        `on_off`                entropy of "active or not"                                   0 .. 1       neither
        `amplitude`             entropy of the bin, given that the unit is active            0 .. log2 10 neither
        `class_information`     mutual information of state and class; needs class labels    0 .. log2 K  higher
        `dead_share`            share of units that were never active                        0 .. 1       low
        `bits_sum`              mode `"mostafa2021"`: sum over units (over layers: the sum)  0 ..         neither
        `bits_per_unit`         mode `"mostafa2021"`: mean over all units                    0 .. log2 10 neither
        ======================= ============================================================ ============ ============

    With few samples per unit and class the correction can leave `class_information` a little below 0: none was found.

    Also a figure (`entropy/units`: every unit's entropy and its parts) and a histogram of the units' entropies
    (`entropy/unit_entropy/<layer>`).

    Raises:
        ValueError: For a wrong option, at construction.

    Source:
        S. Mostafa, D. Mondal, arXiv 2106.04693 (2021), for the mode of that name; Miller (1955) for the correction.

    Example:
        >>> callback = ActivationEntropy(Probe(layers="fc*"), prog_bar="entropy/total")
    """

    family = "entropy"
    baselines = ("total",)
    charts = {  # noqa: RUF012
        "entropy, its parts, its start": ("total", "on_off", "amplitude", "total_initial"),
        "class information": ("class_information",),
    }
    histogram_name = "unit_entropy"
    meanings = {  # noqa: RUF012
        "total": "bits in a unit's state, the mean over live units: how varied its answers are",
        "on_off": "the part of it that is being active or not",
        "class_information": "bits that a unit's state tells about the class",
        "dead_share": "share of units that were never active",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        mode: str = "correlation",
        bins: int = 10,
        calibrate: str = "each",
        miller_madow: bool = True,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        if calibrate not in ("each", "first"):
            raise MisconfigurationException(f"`calibrate` must be 'each' or 'first'; got {calibrate!r}.")
        self.calibrate = calibrate
        self.metric: NeuronEntropy
        metric = NeuronEntropy(mode=mode, bins=bins, miller_madow=miller_madow)
        super().__init__(metric, probe, name=name, prog_bar=prog_bar, on_error=on_error)
        if mode == "mostafa2021":
            self.baselines = ("bits_per_unit",)
            self.charts = {"bits per unit and their start": ("bits_per_unit", "bits_per_unit_initial")}

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Set the bins, from all samples of all ranks: counts can only be added up over the same bins."""
        if self.calibrate == "each":
            self._saved_metrics = {}
            for metric in self._entropies():
                metric.forget_range()
        entropies = self._entropies()
        if self.metric.mode == "mostafa2021" or (entropies and all(metric.calibrated for metric in entropies)):
            return

        def calibrate(batch: ProbeBatch) -> None:
            for layer, activations in batch.activations.items():
                metric = self.metric_at(layer, activations.device)
                if isinstance(metric, NeuronEntropy) and not metric.calibrated:
                    metric.calibrate(activations)

        error: Exception | None = None
        try:
            self.probe.run(trainer, pl_module, calibrate)
        except Exception as failure:
            error = failure
        if on_any_rank(trainer, error is not None):
            raise error or RuntimeError("it failed on another rank")
        if trainer.world_size > 1:
            for metric in self._entropies():
                if not metric.calibrated:
                    tops, counts = pl_module.all_gather(metric.calibration)
                    metric.set_calibration(*merge_calibrations(zip(tops, counts, strict=True)))

    def _entropies(self) -> list[NeuronEntropy]:
        return [metric for metric in self._metrics.values() if isinstance(metric, NeuronEntropy)]

    def over_layers(self, measure: str, values: Sequence[float]) -> float:
        """The mean over layers; the paper's entropy of the network is the sum."""
        return sum(values) if measure == "bits_sum" else super().over_layers(measure, values)

    def draw(self, results: Mapping[str, EntropyResult]) -> dict[str, "Figure"]:
        """Every unit's entropy and its parts."""
        return {"units": plot_entropy(results)}
