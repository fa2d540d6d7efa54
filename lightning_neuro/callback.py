"""The base callback: on schedule, one metric per layer sees the probe's activations, and its results become curves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import logging
from lightning_neuro.arguments import check_metric, check_name
from lightning_neuro.compat import Callback
from lightning_neuro.isolation import isolated_random_state, why_off, without_inference_mode
from lightning_neuro.metric import LayerResult
from lightning_neuro.probe import Event, Probe, ProbeBatch
from lightning_neuro.ranks import on_any_rank
from lightning_neuro.samples import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Memory = dict[str, Any]

_SAVED = ("initial", "scalars", "_previous", "_last_epoch", "_last_step")


class MetricCallback(Callback):
    """Logs any `torchmetrics.Metric` over activations, layer by layer, while the network trains.

    Before the first step, then whenever the probe is due, the network runs over the probe's samples; a copy of the
    metric per layer is updated with `metric.update(activations, targets)`, activations being (N, units), and what
    `compute()` returns becomes curves.

    Args:
        metric: The metric to copy for each layer. Its result may be a scalar (logged as the measure `value`), a mapping
            measure -> scalar, or a `LayerResult`.
        probe: Which samples, which layers, when. Callbacks given no probe, or equal ones, share its passes.
        name: The first part of every key; default: the callback's `family`, else the metric's class name in lower case.
        prog_bar: Keys or globs of keys to show in the progress bar, such as `"communities/modularity"`.
        on_error: What to do if an analysis fails: `"warn"` once and train on, or `"raise"`.

    Keys:
        ================================ =====================================================================
        `<name>/<measure>/<layer>`       the measure at the layer
        `<name>/<measure>`               its mean over the layers at which it is defined
        `<name>/<measure>_initial/...`   for the measures in `baselines`: the value before the first step
        ================================ =====================================================================

    Undefined values (NaN, infinite) are not logged: they would stop EarlyStopping.

    Attributes:
        result: Layer -> latest result, exactly as the metric returned it.
        scalars: Key -> latest known value.
        initial: Key -> value at the first evaluation, before training.

    Raises:
        MisconfigurationException: For a wrong argument, at construction.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> class MeanActivation(MeanMetric):
        ...     def update(self, activations, targets=None):
        ...         super().update(activations)
        >>> callback = MetricCallback(MeanActivation(), Probe(num_samples=256), name="mean_activation")
    """

    family: ClassVar[str] = ""
    meanings: ClassVar[Mapping[str, str]] = {}
    baselines: tuple[str, ...] = ()
    charts: Mapping[str, tuple[str, ...]] = {}
    histogram_name: ClassVar[str] = "histogram"
    needs_labels: bool = False

    def __init__(
        self,
        metric: Metric,
        probe: Probe | None = None,
        *,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        check_metric(metric)
        if not isinstance(probe, (Probe, type(None))):
            raise MisconfigurationException(f"`probe` must be a lightning_neuro.Probe; got {type(probe).__name__}.")
        if on_error not in ("warn", "raise"):
            raise MisconfigurationException(f"`on_error` must be 'warn' or 'raise'; got {on_error!r}.")
        name = self.family or type(metric).__name__.lower() if name is None else name
        check_name(name)
        prog_bar = (prog_bar,) if isinstance(prog_bar, str) else prog_bar
        if not isinstance(prog_bar, Sequence) or not all(isinstance(pattern, str) for pattern in prog_bar):
            raise MisconfigurationException(f"`prog_bar` must be a key or glob, or several; got {prog_bar!r}.")
        self.metric = metric
        self.probe = probe or Probe()
        self.name = name
        self.prog_bar = tuple(prog_bar)
        self.on_error = on_error
        self.result: dict[str, Any] = {}
        self.scalars: dict[str, float] = {}
        self.initial: dict[str, float] = {}
        self._metrics: dict[str, Metric] = {}
        self._saved_metrics: dict[str, Any] = {}
        self._previous: dict[str, Memory] = {}
        self._last_epoch = self._last_step = -1
        self._failed: dict[str, Exception] = {}
        self._warned: set[str] = set()

    # What a method changes

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Called before every pass, for what a method must know of the activations beforehand."""

    def update(self, metric: Metric, activations: Tensor, batch: ProbeBatch) -> None:
        """Show one layer's activations in one batch to the layer's metric."""
        targets = batch.targets
        if targets is not None and len(activations) != len(targets):
            targets = targets.repeat_interleave(len(activations) // len(targets))
        metric.update(activations, targets)

    def measures(self, result: Any, previous: Memory | None) -> dict[str, float]:
        """The scalars of one layer's result; `previous` is what `remember` kept of the evaluation before."""
        if isinstance(result, LayerResult):
            return dict(result.scalars())
        return dict(result) if isinstance(result, Mapping) else {"value": result}

    def over_layers(self, measure: str, values: Sequence[float]) -> float:
        """One number for the whole network."""
        return sum(values) / len(values)

    def remember(self, result: Any) -> Memory:
        """What to keep of one layer's result for the next evaluation: tensors and plain Python, for the checkpoint."""
        return {}

    def draw(self, results: Mapping[str, Any]) -> dict[str, "Figure"]:
        """Figures of all layers' results: the last part of the tag -> figure."""
        return {}

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        """Tells callbacks apart in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Share the pass with the callbacks that have an equal probe."""
        # Here, before any callback evaluates: the first one's pass at the start of training shows it to all of them.
        if stage == "fit" and trainer.global_step == 0:
            self._forget()
        for other in _ours(trainer):
            if other is self:
                break
            if other.name == self.name:
                raise MisconfigurationException(
                    f"{type(other).__name__} and {type(self).__name__} both log under the name '{self.name}'. Give one"
                    " of them another with `name=...`."
                )
            if other.probe.same_as(self.probe):
                self.probe = other.probe

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers, so that a wrong name fails before the first step."""
        if not why_off(trainer):
            self.probe.attach(pl_module, self)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Evaluate the untrained network; after a resume, put the last values back where callbacks look for them."""
        if reason := why_off(trainer):
            rank_zero_warn(f"{type(self).__name__} is off: {reason}.")
            return
        if self.scalars:
            logging.log_scalars(trainer, pl_module, self.scalars, prog_bar=self.prog_bar, loggers="never")
        else:
            self._evaluate(trainer, pl_module, "start", loggers="now")
        for pattern, near in logging.unmatched(self.prog_bar, self.scalars).items():
            sentence = f"`prog_bar` has {pattern!r}, which is no key of {type(self).__name__}. Near: {near}"
            self._warn_once(f"prog_bar/{pattern}", sentence)
        self._log_layout(trainer)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if the probe counts in steps and this is one."""
        step = trainer.global_step
        if not why_off(trainer) and self.probe.due_at_step(step, self._last_step):
            self._evaluate(trainer, pl_module, "step", loggers="now")

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers for a `trainer.validate` of its own."""
        if trainer.state.fn == "validate" and not why_off(trainer):
            self.probe.attach(pl_module, self)

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Evaluate at the last validation of an epoch, so that callbacks that act after validation see the values."""
        if why_off(trainer):
            return
        if trainer.state.fn == "validate" and self.probe.source == "train":
            self._warn_once(
                "validate", f"{self.name}: `trainer.validate` has no training data for the probe to look at."
            )
        elif trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module, "validate", loggers="epoch")
        elif not trainer.sanity_checking and trainer.is_last_batch:
            self._at_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Evaluate where the epoch ended without validation."""
        self._at_epoch_end(trainer, pl_module)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the model, the samples and the metrics' states."""
        self._release()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the model, the samples and the metrics' states."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had never stopped."""
        metrics = {layer: metric.state_dict() for layer, metric in self._metrics.items()}
        saved = {layer: dict(state) for layer, state in (self._saved_metrics | metrics).items() if state}
        return {"metrics": saved} | {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._saved_metrics = state_dict["metrics"]
        for name in _SAVED:
            setattr(self, name, state_dict[name])

    # One evaluation

    def _at_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        epoch = trainer.current_epoch
        if epoch != self._last_epoch and not why_off(trainer) and self.probe.due_at_epoch(epoch):
            self._evaluate(trainer, pl_module, "epoch", loggers="epoch")
            self._last_epoch = epoch

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Get ready for a pass of the probe."""
        for metric in self._metrics.values():
            metric.reset()
        self._failed = {}
        with self._guard("the preparation"):
            self.prepare(trainer, pl_module)

    def observe(self, batch: ProbeBatch) -> None:
        """Take in one batch of the probe's pass; a layer that fails is noted and left out of this evaluation."""
        if self.needs_labels and batch.targets is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs a class label (a whole number) for each sample, and the probe finds none."
                f" The batch is {describe(batch.batch)}. Say where they are with `Probe(target_fn=lambda batch: ...)`."
            )
        for layer, activations in batch.activations.items():
            try:
                self.update(self.metric_at(layer, activations.device), activations, batch)
            except Exception as error:
                self._failed.setdefault(layer, error)

    def metric_at(self, layer: str, device: torch.device) -> Metric:
        """The metric of one layer, on the device; made on first use, and given the state that was saved for it."""
        if layer not in self._metrics:
            self._metrics[layer] = metric = self.metric.clone()
            if layer in self._saved_metrics:
                metric.load_state_dict(self._saved_metrics[layer])
        return self._metrics[layer].to(device)

    def _evaluate(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", kind: str, *, loggers: logging.Loggers
    ) -> None:
        self._last_step = trainer.global_step
        with isolated_random_state(pl_module.device), without_inference_mode():
            self.result = self._results(trainer, pl_module, (kind, trainer.current_epoch, trainer.global_step))
            measured = self._measured(self.result)
            if trainer.global_step == 0 and kind == "start":
                self.initial = self._keyed(measured)
            scalars = self._keyed(measured | self._baselines())
            self.scalars = self.scalars | scalars
            logging.log_scalars(trainer, pl_module, scalars, prog_bar=self.prog_bar, loggers=loggers)
            with self._guard("the figures"):
                self._log_pictures(trainer)

    def _results(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> dict[str, Any]:
        """One result per layer; what fails is left out, on all ranks alike, or one would wait for another forever."""
        error: Exception | None = None
        try:
            self.probe.refresh(trainer, pl_module, event)
        except MisconfigurationException:
            raise
        except Exception as failure:
            error = failure
        if on_any_rank(trainer, error is not None):
            self._report("the probe's pass over its samples", error)
            return {}
        results: dict[str, Any] = {}
        for layer, metric in self._metrics.items():
            if on_any_rank(trainer, layer in self._failed):
                self._report(f"layer '{layer}'", self._failed.get(layer))
            elif metric.update_called:
                error = None
                try:
                    results[layer] = metric.compute()
                except MisconfigurationException:
                    raise
                except Exception as failure:
                    error = failure
                    # It broke off with the states of all ranks joined, over which a reset would stumble.
                    metric.unsync(should_unsync=metric._is_synced)
                if on_any_rank(trainer, error is not None):
                    results.pop(layer, None)
                    self._report(f"layer '{layer}'", error)
            metric.reset()
        return results

    def _measured(self, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Measure -> layer -> value, where it is defined."""
        measured: dict[str, dict[str, float]] = {}
        for layer, result in results.items():
            with self._guard(f"layer '{layer}'"):
                for measure, value in self.measures(result, self._previous.get(layer)).items():
                    if isfinite(value := float(value)):
                        measured.setdefault(measure, {})[layer] = value
                    else:
                        self._warn_once(f"{layer}/{measure}", f"{self.name}/{measure}/{layer} is {value}: not logged.")
                self._previous[layer] = self.remember(result)
                for kind, note in result.notes().items() if isinstance(result, LayerResult) else ():
                    self._warn_once(f"{layer}/{kind}", f"{self.name}, layer '{layer}': {note}")
        return measured

    def _baselines(self) -> dict[str, dict[str, float]]:
        """The values before training, as measures of their own."""
        found: dict[str, dict[str, float]] = {}
        for measure in self.baselines:
            prefix = f"{self.name}/{measure}/"
            layers = {key.removeprefix(prefix): v for key, v in self.initial.items() if key.startswith(prefix)}
            found |= {f"{measure}_initial": layers} if layers else {}
        return found

    def _keyed(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        keyed: dict[str, float] = {}
        for measure, layers in measured.items():
            keyed[f"{self.name}/{measure}"] = self.over_layers(measure, list(layers.values()))
            keyed.update({f"{self.name}/{measure}/{layer}": value for layer, value in layers.items()})
        return keyed

    def _log_pictures(self, trainer: "pl.Trainer") -> None:
        if not self.result:
            return
        logging.log_figures(trainer, lambda: {f"{self.name}/{tag}": fig for tag, fig in self.draw(self.result).items()})
        for layer, result in self.result.items():
            if isinstance(result, LayerResult):
                logging.log_histogram(trainer, f"{self.name}/{self.histogram_name}/{layer}", result.histogram())

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Keep an error of the analysis from ending the run."""
        try:
            yield
        except MisconfigurationException:
            raise
        except Exception as error:
            self._report(what, error)

    def _report(self, what: str, error: Exception | None) -> None:
        if self.on_error == "raise" and error is not None:
            raise error
        reason = "it failed on another rank" if error is None else f"{type(error).__name__}: {error}"
        message = f"{self.name}: the analysis of {what} failed and is left out; training goes on. {reason}"
        self._warn_once(f"{what}/error", message)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)

    def _forget(self) -> None:
        """Begin a new run: nothing of an earlier one must show in its curves."""
        self.result, self.scalars, self._metrics, self._saved_metrics = {}, {}, {}, {}
        self.initial, self._previous, self._warned = {}, {}, set()
        self._last_epoch = self._last_step = -1

    def _release(self) -> None:
        self.probe.detach(self)
        for metric in self._metrics.values():
            metric.reset()

    def _log_layout(self, trainer: "pl.Trainer") -> None:
        """The last of our callbacks writes the layout for all: TensorBoard keeps one per run."""
        if self is (ours := _ours(trainer))[-1]:
            charts = {our.name: logging.multiline_charts(our.name, our.charts, our.scalars) for our in ours}
            logging.log_layout(trainer, charts)


def _ours(trainer: "pl.Trainer") -> list[MetricCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, MetricCallback)]  # type: ignore[attr-defined]
