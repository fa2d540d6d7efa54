"""`ObserverProbes`: what each layer encodes, as training curves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite, nan
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import loggers
from lightning_neuro.batches import BatchField, check_field
from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.checks import check_bool, check_int
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.keys import Entry, key_of
from lightning_neuro.observers.attributes import (
    check_attributes,
    class_attribute_names,
    read_attribute_values,
    read_groups,
)
from lightning_neuro.observers.depth import DepthCurve, depth_curve
from lightning_neuro.observers.folds import fold_groups
from lightning_neuro.observers.gain import references
from lightning_neuro.observers.metric import LinearObserver
from lightning_neuro.observers.options import ObserverOptions
from lightning_neuro.observers.plot import plot_attributes, plot_proportion
from lightning_neuro.observers.plot_units import plot_explanation, plot_maps
from lightning_neuro.observers.raw_input import RawInput
from lightning_neuro.observers.result import EXTREMES, MAIN_MEASURE, MEASURES, ObserverResult
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.ranks import on_any_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_OF_ATTRIBUTES = (MAIN_MEASURE, *(name for name in MEASURES if name.startswith("gain")))


class ObserverProbes(MetricCallback[ObserverResult]):
    """Logs how well linear classifiers ("observers") predict attributes of the samples from each layer's activations.

    At each evaluation an observer of every attribute is fitted to each layer's activations, in closed form and without
    any effect on training, and scored on held-out samples. Compare a score with three others: its value before training
    (much can be predicted from random layers), that of the raw input (`balanced_accuracy_input`), and the controls of
    the selectivity (in a network of ten classes nearly every set of classes can be predicted). That an attribute can be
    predicted does not mean that the network uses it.

    Args:
        probe: Selects the samples, the layers and the schedule; see `Probe`. The default is validation data, to which
            the network was not fitted.
        attributes: Name -> where its values are found in a batch: a function of the batch, or the key or index of a
            field. The values must be 0, 1 or NaN (missing), one per sample. Default: one attribute per class, named
            after it, or `class_<k>`.
        group_fn: Where the group of each sample, an integer, is found in a batch: a function of the batch, or the key
            or index of a field. Samples of one group are held out together. Default: each sample is its own group.
        heatmap: Whether to draw the three maps of attributes by units, and the contributions to single scores.
        max_attributes: Maximum number of attributes with curves of their own. If more have a score, the curves are the
            means of the three lowest and of the three highest scores and those that are asked for (see `log_scalars`),
            and all are logged as a table (on TensorBoard's Text page).
        name: First part of the keys; default: `observers`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.
        options: See `ObserverOptions`.

    Keys:
        Except for `balanced_accuracy_input` and the last three, which are of the whole network, measures are logged as
        `observers/<measure>/<layer>` (the mean over attributes) and `observers/<measure>` (also over layers).

        The main measure is also logged for each attribute, as `observers/balanced_accuracy/<attribute>/<layer>` and
        `observers/balanced_accuracy/<attribute>/whole_network`. With more than `max_attributes` attributes these are
        `lowest_3` and `highest_3`, the means of the three lowest and highest scores of the moment: their keys exist
        from the first evaluation, and do not depend on which attributes they are. All other measures of single
        attributes are in `result`. The gains of single attributes have such keys, too, for EarlyStopping and
        `log_scalars`. By default, `mcc`, `auroc`, `information_bits`, `gain_over_input`, `gain_over_class` and
        `label_proportion` are not logged; they are in `scalars`.

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `balanced_accuracy` | mean of sensitivity and specificity | 0 .. 1 | > .5, control, input, initial |
        | `mcc` | Matthews correlation of prediction and truth | -1 .. 1 | > 0 |
        | `auroc` | probability that a sample with the attribute scores above one without | 0 .. 1 | > .5 |
        | `information_bits` | usable information about the attribute, in bits | .. 1 | > 0 |
        | `selectivity` | balanced accuracy minus that of random sets of classes | -1 .. 1 | > 0 |
        | `unseen_classes` | balanced accuracy on classes to which the observer was not fitted | 0 .. 1 | > .5 |
        | `gain_over_initial`, `gain_over_initial_low` | minus that before training; lower 95 % bound | -1 .. 1 | > 0 |
        | `gain_over_input`, `gain_over_input_low` | minus that of the raw input; lower 95 % bound | -1 .. 1 | > 0 |
        | `gain_over_class`, `gain_over_class_low` | minus that of the class label alone; lower bound | -1 .. 1 | > 0 |
        | `num_captured` | attributes captured decisively, see `ObserverResult.captured` | 0 .. | high |
        | `balanced_accuracy_initial` | before training | 0 .. 1 | (reference) |
        | `balanced_accuracy_input` | from the raw input; the mean over attributes | 0 .. 1 | (reference) |
        | `num_denoting_units` | single units that denote an attribute | 0 .. | neither |
        | `label_proportion` | fraction of samples with the denoted attribute, folded | 0 .. .5 | neither |
        | `proportion_depth_rho` | rank correlation of depth and this fraction | -1 .. 1 | neither |
        | `proportion_depth_rho_null` | its mean with labels shuffled within each unit | -1 .. 1 | (reference) |
        | `proportion_depth_rho_p` | its p-value under that null | 0 .. 1 | < .05: significant |

        Also logged: figures (`observers/attributes`: attributes by layers; `weights`, `patterns`, `effects`: attributes
        by units; `proportion`: label proportion over depth; `explanation`: contributions of units to scores of single
        samples) and a histogram of the attributes' balanced accuracies (`observers/attribute_scores/<layer>`).

    Attributes:
        from_input: Attribute -> balanced accuracy of an observer of the raw input.
        before: Layer -> attribute -> balanced accuracy before training.
        depth: The label proportion over depth, at the latest evaluation.

    Raises:
        ArgumentError: If an argument is invalid, at construction. If an attribute is not in the batch or has a wrong
            length or value, before the first training step.

    Source:
        E. E. Allen, *Neural Networks and Denotation*, arXiv 2103.08315 (2021). Only the abstract was available: the
        formulas are this project's, see `lightning_neuro/observers/reading.py`.

    Example:
        >>> corner = ObserverProbes(attributes={"mark": lambda batch: batch[0][:, 0, 0, 0] > 0.5})
        >>> from pytorch_lightning.callbacks import EarlyStopping
        >>> key = "observers/gain_over_initial_low/mark/whole_network"
        >>> stop = EarlyStopping(key, mode="max", patience=100, stopping_threshold=0.05)
    """

    family = "observers"
    curves = (
        *("balanced_accuracy", "balanced_accuracy_input", "selectivity", "unseen_classes", "num_captured"),
        *("gain_over_initial", "gain_over_initial_low", "num_denoting_units"),
        *("proportion_depth_rho", "proportion_depth_rho_null", "proportion_depth_rho_p"),
    )
    charts = {  # noqa: RUF012
        "balanced accuracy, before training": ("balanced_accuracy", "balanced_accuracy_initial"),
        "gain in balanced accuracy since before training, lower bound": ("gain_over_initial", "gain_over_initial_low"),
        "units that denote an attribute": ("num_denoting_units",),
    }
    histogram_name = "attribute_scores"
    baselines = ("balanced_accuracy",)
    meanings = {  # noqa: RUF012
        "balanced_accuracy": "how well a linear classifier predicts each attribute (default: each class); .5: chance",
        "gain_over_initial_low": "what training has added to it: the lower 95 % bound",
        "information_bits": "usable information about each attribute, in bits",
        "num_denoting_units": "single units that denote an attribute or a set of classes",
    }
    run_state: ClassVar[tuple[str, ...]] = ("_input", "_before")

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        attributes: Mapping[str, BatchField] | None = None,
        group_fn: BatchField | None = None,
        heatmap: bool = True,
        max_attributes: int = 12,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: Literal["warn", "raise"] = "warn",
        **options: Unpack[ObserverOptions],
    ) -> None:
        self.attributes = check_attributes(attributes)
        check_field("group_fn", group_fn)
        check_bool("heatmap", heatmap)
        check_int("max_attributes", max_attributes, minimum=0)
        self.metric: LinearObserver
        metric = LinearObserver(names=None if self.attributes is None else list(self.attributes), **options)
        super().__init__(
            metric,
            probe,
            name=name,
            prog_bar=prog_bar,
            log_scalars=log_scalars,
            figures=figures,
            on_error=on_error,
        )
        self.group_fn = group_fn
        self.heatmap = heatmap
        self.max_attributes = max_attributes
        self.needs_labels = self.attributes is None

    def start_run(self) -> None:
        """Reset the state of an earlier run."""
        super().start_run()
        # Of each attribute: its name, and its balanced accuracy with the lower and upper bound.
        self._input: dict[str, list[float]] = {}
        self._before: dict[str, dict[str, list[float]]] = {}
        self.depth: DepthCurve | None = None
        self._raw_input: RawInput | None = None
        self._facts: tuple[Any, Tensor, Tensor] | None = None
        self._num_read = 0

    def release(self) -> None:
        """Release the samples."""
        super().release()
        self._raw_input = self._facts = None

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Prepare for a pass; the raw input, which does not change, is read in the first pass only."""
        self._num_read, self._raw_input = 0, None
        if not self._input:
            settings = asdict(self.metric.settings) | {"num_controls": 0, "denotation": False}
            self._raw_input = RawInput(LinearObserver(names=self.metric.names, **settings))

    def observe(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass, and of the raw input in the first pass."""
        super().observe(batch)
        # The input has no rows for labels of single positions.
        known = self.attributes is not None or batch.targets is not None or batch.labels.attributes is not None
        if self._raw_input is not None and known:
            self._raw_input.add(batch, lambda metric, rows: self.update(metric, rows, batch))

    def update(self, metric: Metric, activations: Tensor, batch: ProbeBatch) -> None:
        """Update the layer's observers with its activations in one batch."""
        given, groups = self._facts_of(batch)
        index = torch.arange(len(groups)) if batch.sample_index is None else batch.sample_index.cpu()
        labels = batch.numbered_targets
        values = given[index] if self.attributes is not None else self._values(batch, labels, index)
        if values is None:
            raise ValueError("its output has no label for each of its rows")
        rows = torch.arange(len(activations))
        if values is labels and labels is not None and bool((labels < 0).any()):  # ignored
            rows = (labels >= 0).nonzero().flatten().cpu()
        on = rows.to(activations.device)
        values = values[rows.to(values.device)]
        labels = None if labels is None else labels[rows.to(labels.device)]
        metric.update(activations[on], values, labels, groups[index[rows]])

    def _values(self, batch: ProbeBatch, labels: Tensor | None, index: Tensor) -> Tensor | None:
        """What to predict by default: the classes, else the attributes that the targets say of each sample."""
        if labels is not None or batch.labels.attributes is None:
            return labels
        return batch.labels.attributes.cpu()[index]

    def finds_targets(self, batch: ProbeBatch) -> bool:
        """Whether the batch holds what the observers are to predict."""
        return super().finds_targets(batch) or batch.labels.attributes is not None

    def _facts_of(self, batch: ProbeBatch) -> tuple[Tensor, Tensor]:
        """Attributes, (N, A), and groups, (N,), read once per batch for all layers."""
        if self._facts is None or self._facts[0] is not batch.batch:
            count = batch.num_samples
            attributes = read_attribute_values(self.attributes or {}, batch.batch, count)
            groups = None if self.group_fn is None else read_groups(self.group_fn, batch.batch, count)
            self._facts = batch.batch, attributes, fold_groups(groups, batch.inputs, count, num_before=self._num_read)
            self._num_read += count
        return self._facts[1:]

    def finalize(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", results: dict[str, ObserverResult]
    ) -> dict[str, ObserverResult]:
        """Name the classes, score the raw input, and correlate the label proportion with depth."""
        raw_input, self._raw_input, self._facts = self._raw_input, None, None
        if self.attributes is None:
            results = {
                layer: replace(result, names=self._names(len(result.names))) for layer, result in results.items()
            }
        if results and raw_input is not None:
            names = next(iter(results.values())).names
            scores = self._scores_of(trainer, raw_input)
            self._input = {} if scores is None else dict(zip(names, scores.tolist(), strict=True))
        if self.event is not None and self.event.kind == "start" and self.event.step == 0:
            self._before = {
                layer: dict(zip(result.names, result.score.tolist(), strict=True)) for layer, result in results.items()
            }
        results = {
            layer: replace(
                result,
                initial=references(result.names, self._before.get(layer, {})),
                raw_input=references(result.names, self._input),
            )
            for layer, result in results.items()
        }
        layers = [result.denotation for result in results.values() if result.denotation is not None]
        self.depth = depth_curve(layers) if layers else None
        return results

    def _names(self, number: int) -> tuple[str, ...]:
        """Names of the attributes that the targets say of a sample, or of the classes of which measures speak."""
        named = self.probe_pass.attribute_names
        if len(named) == number:
            return named
        chosen = self.probe_pass.classes[:number]
        labels = chosen if len(chosen) == number else range(number)
        names = class_attribute_names(max(labels, default=-1) + 1, self.class_names)
        return tuple(names[label] for label in labels)

    @property
    def from_input(self) -> dict[str, float]:
        """Attribute -> balanced accuracy of an observer of the raw input, where defined."""
        return {name: value for name, (value, *_) in self._input.items() if isfinite(value)}

    @property
    def before(self) -> dict[str, dict[str, float]]:
        """Layer -> attribute -> balanced accuracy before training, where defined."""
        return {
            layer: {name: value for name, (value, *_) in found.items() if isfinite(value)}
            for layer, found in self._before.items()
        }

    def _scores_of(self, trainer: "pl.Trainer", raw_input: RawInput) -> Tensor | None:
        usable = self.attempt(trainer, "the raw input", raw_input.check)
        # If the inputs of one rank are not floating-point, the others would wait for it in `compute`.
        if on_any_rank(trainer, not usable):
            return None
        return self.attempt(trainer, "the raw input", raw_input.scores)

    def attribute_measures(self, result: ObserverResult, memory: Memory | None) -> Mapping[str, Mapping[str, float]]:
        """The main measure and the gains of single attributes; if these are too many, also the lowest and highest."""
        found = {measure: values for measure, values in result.by_attribute().items() if measure in _OF_ATTRIBUTES}
        return found | {MAIN_MEASURE: found[MAIN_MEASURE] | (result.extremes() if self._too_many() else {})}

    def _too_many(self) -> bool:
        return max(len(result.histogram()) for result in self.result.values()) > self.max_attributes

    def shown(self, trainer: "pl.Trainer") -> dict[str, float]:
        """The known values that are logged: of single attributes only the main measure, if they are not too many."""
        values = super().shown(trainer)
        asked = [*self.prog_bar, *(self.log_scalars or ()), *loggers.monitored(trainer)]
        too_many = key_of(self.name, Entry(MAIN_MEASURE, attribute=EXTREMES[0])) in self.scalars

        def has_curve(measure: str, attribute: str | None) -> bool:
            return attribute is None or attribute in EXTREMES or (measure == MAIN_MEASURE and not too_many)

        return {
            key: value
            for key, value in values.items()
            if loggers.matches(key, asked) or has_curve(*_measure_and_attribute(key))
        }

    def network_measures(self, results: Mapping[str, ObserverResult]) -> Mapping[str, float | Mapping[str, float]]:
        """Label proportion over depth, and the balanced accuracy of the raw input."""
        if not results:
            return {}
        found: dict[str, float | Mapping[str, float]] = {}
        if self.depth is not None:
            found |= self.depth.scalars()
        if raw := self.from_input:
            found["balanced_accuracy_input"] = sum(raw.values()) / len(raw)
        return found

    def draw(self, results: Mapping[str, ObserverResult]) -> dict[str, "Figure"]:
        """Draw which attributes can be predicted from which layers and units."""
        figures = {"attributes": plot_attributes(results)}
        if self.heatmap:
            figures |= plot_maps(results) | {"explanation": plot_explanation(results)}
        if self.depth is not None:
            figures["proportion"] = plot_proportion(self.depth, list(results))
        return figures

    def log_extra(self, trainer: "pl.Trainer", results: Mapping[str, ObserverResult]) -> None:
        """Log the attributes as a table, if there are too many for scalars."""
        if results and self._too_many():
            loggers.log_text(trainer, f"{self.name}/balanced_accuracy", self.table())

    def table(self) -> str:
        """The balanced accuracy of every attribute at every layer, as a Markdown table."""
        layers = list(self.result)
        names = self.result[layers[0]].names
        columns = [self.result[layer].balanced_accuracy.tolist() for layer in layers]
        columns.append([self.from_input.get(name, nan) for name in names])
        return loggers.markdown_table(["attribute", *layers, "raw input"], zip(names, *columns, strict=True))


def _measure_and_attribute(key: str) -> tuple[str, str | None]:
    # Not by `parse_key`, which refuses the names of layers that contain a slash.
    _, measure, *rest = key.split("/")
    return measure, rest[0] if len(rest) > 1 else None
