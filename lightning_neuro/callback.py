"""The base class of all callbacks: one metric per layer is updated with the activations, and its results are logged.

The public methods of `MetricCallback` are all that a new method needs; see `examples/own_method.py`. The schedule of
evaluations is implemented in `scheduled_callback.py` and `session.py`.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from math import isfinite
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import loggers
from lightning_neuro.checks import ArgumentError, NothingToDoError, check_metric, require
from lightning_neuro.drawing_callback import DrawingCallback, R
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.keys import Entry, Table, key_of, require_segments, with_keys
from lightning_neuro.layer_result import LayerResult
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch, why_no_labels
from lightning_neuro.ranks import names_on_all_ranks
from lightning_neuro.scheduled_callback import OnError
from lightning_neuro.session import Event, session_of
from lightning_neuro.summary import measure_table
from lightning_neuro.threads import threads_for

Memory = dict[str, Any]


class MetricCallback(DrawingCallback[R]):
    """Logs any `torchmetrics.Metric` over activations, layer by layer, while the network trains.

    Before the first step, and then on the schedule of the probe, the network runs over the probe set. One copy of the
    metric per layer is updated with `metric.update(activations, targets)`, where the activations are (N, units), and
    the result of `compute()` is logged. The type parameter `R` is the type of this result.

    To write your own method, derive from this class and override the hooks under "What a method may override", which
    are in the order of an evaluation.

    Args:
        metric: The metric to copy for each layer. Its result may be a scalar (logged as the measure `value`), a mapping
            measure -> scalar, or a `LayerResult`.
        probe: Selects the samples, the layers and the schedule. Callbacks without a probe, or with equal ones, share
            its passes.
        name: First part of every key. Default: the callback's `family`, else the metric's class name in lower case.
        prog_bar: Keys or globs of keys to show in the progress bar, such as `"communities/modularity"`.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.

    Keys:
        | key | value |
        |---|---|
        | `<name>/<measure>/<layer>` | the measure at the layer |
        | `<name>/<measure>` | its mean over the layers at which it is defined, or a value for the whole network |
        | `<name>/<measure>/<attribute>/<layer>` | the measure for one attribute of the data at the layer |
        | `<name>/<measure>/<attribute>/whole_network` | its mean over layers, or a value for the whole network |
        | `<name>/<measure>_initial/...` | for the measures in `baselines`: the value before the first step |

        Undefined values (NaN, infinite) are not logged: they would stop EarlyStopping.

    Attributes:
        result: Layer -> result of the latest evaluation, exactly as the metric returned it; empty if the evaluation
            failed. Its tensors are not copied: do not change them.
        scalars: Key -> latest known value, also of what is not logged.
        initial: Key -> value at the first evaluation, before training.
        cost: Seconds that the callback has taken in the current or last fit, by part.

    Raises:
        ArgumentError: If an argument is invalid, at construction.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> class MeanActivation(MeanMetric):
        ...     def update(self, activations, targets=None):
        ...         super().update(activations)
        >>> callback = MetricCallback(MeanActivation(), Probe(num_samples=256), name="mean_activation")
    """

    family: ClassVar[str] = ""
    """First part of the keys, unless `name` is given."""
    meanings: ClassVar[Mapping[str, str]] = {}
    """Measure -> its meaning, for the demo's table."""
    baselines: tuple[str, ...] = ()
    """Measures whose value before training is logged as `<measure>_initial`."""
    histogram_name: ClassVar[str] = "histogram"
    """Name of the histogram of a `LayerResult`."""
    needs_labels: bool = False
    """Whether the method requires class labels."""
    requested: bool = False
    """Whether the user's arguments ask for what needs labels or logits: without them, the fit ends with an error.
    Otherwise the callback is disabled."""

    def __init__(
        self,
        metric: Metric,
        probe: Probe | None = None,
        *,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: OnError = "warn",
    ) -> None:
        check_metric(metric)
        self.metric = metric
        self.class_names: tuple[str, ...] | None = None
        self._failed: dict[str, Exception] = {}
        self._broken: Exception | None = None
        self._prepared = False
        name = self.family or type(metric).__name__.lower() if name is None else name
        super().__init__(
            probe, name=name, prog_bar=prog_bar, log_scalars=log_scalars, figures=figures, on_error=on_error
        )

    # What a method may override, in the order of an evaluation

    def start_run(self) -> None:
        """Called at construction and before a fit from step 0: reset the state of an earlier run."""
        super().start_run()
        self.result: dict[str, R] = {}
        self.layer_metrics: dict[str, Metric] = {}
        self._saved_metrics: dict[str, Any] = {}
        self._memory: dict[str, Memory] = {}
        self._baselines: Table = {}
        self._disabled = False

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Called before every pass, for statistics of the activations that the method needs beforehand."""

    def observe(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass. Default: update each layer's metric with the layer's activations."""
        for layer, activations in batch.activations.items():
            self.update_layer(layer, activations, batch)

    def update(self, metric: Metric, activations: Tensor, batch: ProbeBatch) -> None:
        """Update one layer's metric with its activations in one batch, whose targets belong to the rows."""
        metric.update(activations, batch.targets)

    def finds_targets(self, batch: ProbeBatch) -> bool:
        """Whether a batch holds the labels that the method requires: of samples or, for single positions, of these."""
        per_position = self.probe.reduction in ("tokens", "random") and batch.labels.positions is not None
        return batch.targets is not None or per_position

    def finalize(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", results: dict[str, R]) -> dict[str, R]:
        """Called on all ranks after the metrics have computed, for collective operations; returns the results."""
        return results

    def layer_measures(self, result: R, memory: Memory | None) -> Mapping[str, float]:
        """Measure -> value of one layer; `memory` is what `remember` kept at the previous evaluation."""
        if isinstance(result, LayerResult):
            return dict(result.scalars())
        return dict(result) if isinstance(result, Mapping) else {"value": result}  # type: ignore[dict-item]

    def attribute_measures(self, result: R, memory: Memory | None) -> Mapping[str, Mapping[str, float]]:
        """Measure -> attribute -> value of one layer, for methods with a value per attribute of the data."""
        return {}

    def network_measures(self, results: Mapping[str, R]) -> Mapping[str, float | Mapping[str, float]]:
        """Values for the whole network, which replace the means over layers.

        Args:
            results: Layer -> result.

        Returns:
            Measure -> value, or measure -> attribute -> value. The latter is logged for each attribute, and its mean as
            the value of the measure.
        """
        return {}

    def over_layers(self, measure: str, values: Sequence[float]) -> float:
        """Aggregate a measure's values at all layers to one value for the whole network. Default: the mean."""
        return sum(values) / len(values)

    def remember(self, result: R, memory: Memory | None) -> Memory:
        """What to keep of one layer for the next evaluation, also in checkpoints: tensors and plain Python objects."""
        return {}

    def log_extra(self, trainer: "pl.Trainer", results: Mapping[str, R]) -> None:
        """Called on all ranks after the scalars are logged: for tables, embeddings or files."""

    def release(self) -> None:
        """Called at the end of a run and after an exception: release the model, the samples and metric states."""
        super().release()
        for metric in self.layer_metrics.values():
            metric.reset()

    # What a method may use

    def metric_at(self, layer: str, device: torch.device) -> Metric:
        """The metric of one layer, on the device; created on first use, with the state that was saved for it."""
        if layer not in self.layer_metrics:
            self.layer_metrics[layer] = metric = self.metric.clone()
            if layer in self._saved_metrics:
                metric.load_state_dict(self._saved_metrics[layer])
        return self.layer_metrics[layer].to(device)

    def update_layer(self, layer: str, activations: Tensor, batch: ProbeBatch) -> None:
        """Call `update` with the layer's metric; a layer that fails is left out of this evaluation."""
        if self.needs_labels and not batch.is_aligned(layer):
            self.warn_once(
                f"{layer}/samples",
                f"{self.name}: layer '{layer}' is left out, because its output does not have the {batch.num_samples}"
                " samples of the batch in its first dimension.",
            )
            return
        try:
            self.update(self.metric_at(layer, activations.device), activations, batch.at(layer))
        except Exception as error:
            self.note_failure(layer, error)

    def note_failure(self, layer: str, error: Exception) -> None:
        """Leave a layer out of this evaluation, on all ranks, and report it once."""
        self._failed.setdefault(layer, error)

    def report(self, what: str, error: Exception) -> None:
        """As the base class, but disable the callback for this run if a default finds nothing to work on."""
        if not isinstance(error, NothingToDoError) or self.requested or self.on_error == "raise":
            super().report(what, error)
        else:
            self._disabled = True
            self.warn_once("disabled", f"{self.name} is disabled in this run. {error}")

    def summary(self, layer: str | None = None) -> str:
        """A table of the main measures: before training, now, and what they mean.

        Args:
            layer: Name of a layer of `result`; default: the last one.

        Returns:
            Text with one line per measure, empty before the first evaluation.
        """
        if not self.result:
            return ""
        layer = list(self.result)[-1] if layer is None else layer
        require(layer in self.result, "layer", f"be one of {', '.join(self.result)}", layer)
        return measure_table(self.name, layer, self.meanings, self.initial, self.scalars)

    # One evaluation, as the session calls it

    def is_due(self, event: Event) -> bool:
        """Whether this callback evaluates at this event."""
        return not self._disabled and super().is_due(event)

    def begin_evaluation(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> None:
        """Prepare for a pass over the probe set."""
        super().begin_evaluation(trainer, pl_module, event)
        self._failed = {}
        self._broken = None
        for metric in self.layer_metrics.values():
            metric.reset()

        def prepare() -> bool:
            self.prepare(trainer, pl_module)
            return True

        self._prepared = self.attempt(trainer, "the preparation of the pass", prepare) or False

    def skip_evaluation(self, event: Event) -> None:
        """Leave out an evaluation, because the pass over the probe set failed: there are no results."""
        super().skip_evaluation(event)
        self.result = {}

    def show(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass, as long as nothing has failed in this callback."""
        if not self._prepared or self._broken is not None:
            return
        try:
            if self.needs_labels and not self.finds_targets(batch):
                kind = NothingToDoError if self.probe.target_fn is None else ArgumentError
                raise kind(why_no_labels(type(self).__name__, batch, takes_positions=self.rides))
            self.observe(batch)
        except Exception as error:
            # The pass continues for the other callbacks; the ranks agree on the error at its end.
            self._broken = error

    def end_evaluation(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *, complete: bool) -> None:
        """Compute, log and draw; there are no results if the pass was not complete."""
        self.class_names = self.attempt(trainer, "the class names", lambda: self.probe_pass.class_names(trainer))
        complete = (
            complete and self._prepared and self.attempt(trainer, "the probe set", self._check_batches) is not None
        )
        if self._disabled:
            self.result = {}
            return
        size = self.probe_pass.source.largest_layer
        with threads_for(size), self.cost.timing("compute"):
            results = self._compute(trainer) if complete else {}
        with self.cost.timing("compute"):  # on the threads of the training, because it may run the model
            self.result = self.attempt(trainer, "all layers", lambda: self.finalize(trainer, pl_module, results)) or {}
        with threads_for(size), self.cost.timing("compute"):
            scalars = self._log(trainer, pl_module, self._table(trainer, self.result))
            if self.result:
                self.attempt(trainer, "the histograms", lambda: self._log_histograms(trainer))
                self.attempt(trainer, "the additional logs", lambda: self.log_extra(trainer, self.result))
        if self.result:
            with threads_for(size), self.cost.timing("save"):
                session_of(trainer).results.save(trainer, pl_module, self, scalars)
            with threads_for(size):
                self.draw_if_due(trainer)

    def _check_batches(self) -> bool:
        if self._broken is not None:
            raise self._broken
        return True

    def _compute(self, trainer: "pl.Trainer") -> dict[str, R]:
        """One result per layer; a layer that fails is left out on all ranks, because otherwise ranks would deadlock."""
        updated = [layer for layer, metric in self.layer_metrics.items() if metric.update_called]
        everywhere, elsewhere = names_on_all_ranks(trainer, list(dict.fromkeys([*updated, *self._failed])))
        for layer in elsewhere:
            self.report(f"layer '{layer}'", RuntimeError("it was called on some ranks only"))
        results: dict[str, R] = {}
        for layer in everywhere:
            what = f"layer '{layer}'"
            # Agreed on beforehand, because a metric computes with the other ranks.
            if self.attempt(trainer, what, partial(self._check_layer, layer)):
                result = self.attempt(trainer, what, self.layer_metrics[layer].compute)
                results |= {} if result is None else {layer: result}
        for metric in self.layer_metrics.values():
            # A `compute` that failed leaves the states of all ranks joined, in which a reset would raise.
            metric.unsync(should_unsync=metric._is_synced)
            metric.reset()
        return results

    def _check_layer(self, layer: str) -> bool:
        if layer in self._failed:
            raise self._failed[layer]
        return True

    def _table(self, trainer: "pl.Trainer", results: Mapping[str, R]) -> Table:
        """All defined values of an evaluation: of each layer, their means, and of the whole network."""
        table: Table = {}
        for layer, result in results.items():
            found = self.attempt(trainer, f"layer '{layer}'", partial(self._layer_table, layer, result))
            table |= found or {}
        network = self.attempt(trainer, "the whole network", lambda: self._network_table(results, table))
        return (network or {}) | table

    def _layer_table(self, layer: str, result: R) -> Table:
        memory = self._memory.get(layer)
        table: Table = {Entry(measure, layer): value for measure, value in self.layer_measures(result, memory).items()}
        for measure, attributes in self.attribute_measures(result, memory).items():
            table |= {Entry(measure, layer, name): value for name, value in attributes.items()}
        self._memory[layer] = self.remember(result, memory)
        for kind, note in result.notes().items() if isinstance(result, LayerResult) else ():
            # A problem with the samples is much the same at all layers, so there is one warning for all.
            self.warn_once(f"note/{kind}", f"{self.name}: {note} (First at layer '{layer}'.)")
        return self._defined(table)

    def _network_table(self, results: Mapping[str, R], layers: Table) -> Table:
        groups: dict[Entry, list[float]] = {}
        for entry, value in layers.items():
            groups.setdefault(entry._replace(layer=None), []).append(value)
        table: Table = {entry: self.over_layers(entry.measure, values) for entry, values in groups.items()}
        for measure, found in self.network_measures(results).items():
            if isinstance(found, Mapping):
                table |= {Entry(measure, attribute=name): value for name, value in found.items()}
                found = sum(found.values()) / len(found)
            table[Entry(measure)] = found
        return self._defined(table)

    def _defined(self, table: Table) -> Table:
        """The finite values of a table, as floats; the others are named in a warning, once."""
        defined: Table = {}
        for entry, given in table.items():
            require_segments(entry)
            value, key = float(given), key_of(self.name, entry)
            if isfinite(value):
                defined[entry] = value
            else:
                self.warn_once(key, f"{key} is {value}, so it is not logged.")
        return defined

    def _log(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", table: Table) -> dict[str, float]:
        """Log the values of an evaluation; returns all of them, with those before training."""
        assert self.event is not None
        if self.event.kind == "start" and self.event.step == 0:
            self.initial = with_keys(self.name, table)
            self._baselines = {
                Entry(f"{entry.measure}_initial", entry.layer): value
                for entry, value in table.items()
                if entry.measure in self.baselines and entry.attribute is None
            }
        now = {entry.layer for entry in table}
        initial = {entry: value for entry, value in self._baselines.items() if entry.layer in now}
        scalars = with_keys(self.name, table | initial)
        self.scalars = self.scalars | scalars
        moment: loggers.Moment = "now" if self.event.kind in ("start", "step") else "epoch"
        self.keep_history(trainer, table | initial)
        shown = self.shown(trainer)
        logged = {key: value for key, value in scalars.items() if key in shown}
        loggers.log_scalars(trainer, pl_module, logged, prog_bar=self.prog_bar, moment=moment)
        return scalars

    def _log_histograms(self, trainer: "pl.Trainer") -> None:
        for layer, result in self.result.items():
            if isinstance(result, LayerResult):
                loggers.log_histogram(trainer, f"{self.name}/{self.histogram_name}/{layer}", result.histogram())

    # State

    def layers_of(self, measure: str) -> list[str]:
        """The layers at which the measure is defined."""
        return [layer for layer in self._memory if key_of(self.name, Entry(measure, layer)) in self.scalars]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue as if it had not been interrupted."""
        metrics = {layer: metric.state_dict() for layer, metric in self.layer_metrics.items()}
        saved = {layer: dict(state) for layer, state in (self._saved_metrics | metrics).items() if state}
        baselines = [(*entry, value) for entry, value in self._baselines.items()]
        own = {"metrics": saved, "memory": self._memory, "baselines": baselines, "layers": self.probe.layers}
        return deepcopy(super().state_dict() | own)  # the next evaluations must not change what was handed out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state."""
        super().load_state_dict(state_dict)
        self.layer_metrics = {}  # created anew, from the saved states
        self._saved_metrics = deepcopy(state_dict["metrics"])
        self._memory = deepcopy(state_dict["memory"])
        self._baselines = {Entry(*entry): value for *entry, value in state_dict["baselines"]}
        if state_dict.get("layers", self.probe.layers) != self.probe.layers:
            # Without values the run begins with an evaluation, so that every key exists and none is of another layer.
            self.scalars = {}
