"""Activation entropy as training curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack, get_args

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro.callback import MetricCallback
from lightning_neuro.checks import check_choice
from lightning_neuro.entropy.calibration import merge_calibrations
from lightning_neuro.entropy.metric import NeuronEntropy
from lightning_neuro.entropy.options import Calibrate, EntropyOptions
from lightning_neuro.entropy.plot import plot_entropy
from lightning_neuro.entropy.result import EntropyResult
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.figures import by_layer
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.ranks import agreed, gather
from lightning_neuro.scheduled_callback import OnError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ActivationEntropy(MetricCallback[EntropyResult]):
    """Logs the entropy of the state of each unit, in bits, while the network trains.

    A unit's state is "inactive" or one of ten equal bins up to its 99.9 percentile. The entropy measures how much a
    unit's state varies over the samples, and the class information how much of this variation distinguishes the
    classes. Neither predicts accuracy: during training, all of them follow the number of epochs. Do not compare layers
    with each other, because their bins differ.

    The bins are set in a separate pass, so each evaluation runs the network twice over the probe set.

    Args:
        probe: Selects the samples, the layers and the schedule; see `Probe`.
        calibrate: When the bins are set: at `"each"` evaluation, or at the `"first"` one and then fixed. Activations
            can grow a hundredfold in the first epochs of training. With fixed bins nearly all of them then fall into
            the last bin, and the entropy goes to 0 whatever the network does. So use fixed bins only for networks whose
            activations hardly change, as in fine-tuning, where they reveal a change of scale.
        name: First part of the keys; default: `entropy`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.
        **options: Options of `NeuronEntropy`; see `EntropyOptions`.

    Keys:
        Each as `entropy/<measure>/<layer>`, and as `entropy/<measure>` for the mean over layers. Entropies are means
        over live units, in bits.

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `total` | entropy of the state: `on_off` + P(active) x `amplitude` | 0 .. log2 11 | neither |
        | `total_initial` | `total` before the first training step | 0 .. log2 11 | (reference) |
        | `on_off` | entropy of "active or not" | 0 .. 1 | neither |
        | `amplitude` | entropy of the bin, given that the unit is active | 0 .. log2 10 | neither |
        | `class_information` | mutual information of state and class; needs class labels | 0 .. log2 K | higher |
        | `dead_share` | fraction of units that were never active | 0 .. 1 | low |
        | `bits_sum` | mode `"mostafa2021"`: sum over units (over layers: the sum) | 0 .. | neither |
        | `bits_per_unit` | mode `"mostafa2021"`: mean over all units | 0 .. log2 10 | neither |

        With few samples per unit and class the correction can make `class_information` slightly negative, which means
        that none was found. Also logged: a figure (`entropy/units`: every unit's entropy and its parts) and a histogram
        of the units' entropies (`entropy/unit_entropy/<layer>`).

    Raises:
        ArgumentError: If an option is invalid, at construction.

    Source:
        S. Mostafa, D. Mondal, arXiv 2106.04693 (2021), for the mode of that name; Miller (1955) for the correction.

    Example:
        >>> callback = ActivationEntropy(Probe(layers="fc*"), prog_bar="entropy/total")
    """

    family = "entropy"
    baselines = ("total",)
    charts = {  # noqa: RUF012
        "entropy, its parts, its initial value": ("total", "on_off", "amplitude", "total_initial"),
        "class information": ("class_information",),
    }
    meanings = {  # noqa: RUF012
        "total": "entropy of a unit's state in bits, the mean over live units",
        "on_off": "the part of it that is due to being active or not",
        "class_information": "information of a unit's state about the class, in bits",
        "dead_share": "fraction of units that were never active",
    }
    histogram_name = "unit_entropy"

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        calibrate: Calibrate = "each",
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: OnError = "warn",
        **options: Unpack[EntropyOptions],
    ) -> None:
        check_choice("calibrate", calibrate, get_args(Calibrate))
        self.calibrate = calibrate
        self.metric: NeuronEntropy
        metric = NeuronEntropy(**options)
        super().__init__(
            metric,
            probe,
            name=name,
            prog_bar=prog_bar,
            log_scalars=log_scalars,
            figures=figures,
            on_error=on_error,
        )
        if metric.mode == "mostafa2021":
            self.baselines = ("bits_per_unit",)
            self.charts = {"bits per unit, initial value": ("bits_per_unit", "bits_per_unit_initial")}

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Set the bins from all samples of all ranks, because counts can only be added up over the same bins."""
        metrics = self._entropies()
        fixed = self.calibrate == "first" and metrics and all(metric.calibrated for metric in metrics.values())
        if self.metric.mode == "mostafa2021" or fixed:
            return
        forgotten: set[str] = set()

        def calibrate(batch: ProbeBatch) -> None:
            for layer, activations in batch.activations.items():
                metric = self.metric_at(layer, activations.device)
                assert isinstance(metric, NeuronEntropy)
                if self.calibrate == "each" and layer not in forgotten:
                    forgotten.add(layer)
                    metric.forget_range()
                if not metric.calibrated:
                    metric.calibrate(activations)

        agreed(trainer, lambda: self.probe_pass.run(trainer, pl_module, calibrate))
        if trainer.world_size > 1:
            for metric in self._entropies().values():
                if not metric.calibrated:
                    parts = [gather(trainer, part) for part in metric.calibration]
                    metric.set_calibration(*merge_calibrations(zip(*parts, strict=True)))

    def update(self, metric: Metric, activations: Tensor, batch: ProbeBatch) -> None:
        """Update one layer's metric; classes are numbered without gaps, because it keeps counts of each."""
        metric.update(activations, batch.numbered_targets)

    def _entropies(self) -> dict[str, NeuronEntropy]:
        return {layer: metric for layer, metric in self.layer_metrics.items() if isinstance(metric, NeuronEntropy)}

    def over_layers(self, measure: str, values: Sequence[float]) -> float:
        """The mean over layers; for the paper's `bits_sum`, the sum."""
        return sum(values) if measure == "bits_sum" else super().over_layers(measure, values)

    def draw(self, results: Mapping[str, EntropyResult]) -> dict[str, "Figure"]:
        """Draw every unit's entropy and its parts."""
        return by_layer("units", results, plot_entropy)
