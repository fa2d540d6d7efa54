"""Representation refinement as training curves: which classes made a layer what it is, exactly, while it is trained."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro.arguments import check_count
from lightning_neuro.callback import MetricCallback
from lightning_neuro.capture import uncompiled
from lightning_neuro.isolation import evaluation_mode, why_off
from lightning_neuro.probe import Event, Probe, ProbeBatch
from lightning_neuro.refinement.batch import Observer, TrainBatch
from lightning_neuro.refinement.explanation import RefinementExplanation
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.metric import RefinementSummary
from lightning_neuro.refinement.operators import Sources
from lightning_neuro.refinement.plot import plot_refinement
from lightning_neuro.refinement.recorder import StepRecorder, find_layers
from lightning_neuro.refinement.result import RefinementResult
from lightning_neuro.samples import batch_length, class_labels, default_target, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
# More than this would make as many copies of each layer's weights.
MAX_SOURCES = 100


class RepresentationRefinement(MetricCallback):
    """Shows which classes made a layer what it is, exactly, while the network trains.

    A layer's output on any input is the sum of what the initial weights give and what every training step added. The
    steps are divided among the classes of the samples in their batches (among `sources` of your own, if you like) by
    running each class's part of the gradient through the optimiser's own recursion. So, for the probe's samples,

        output = initial part + sum over classes and phases of training of their contributions

    holds to rounding, with ordinary batches and constant memory. `completeness_error` is its measured error: nothing is
    copied from the weights, so a small value proves the others.

    How to read it: the refinement p of a sample is all that training added to the layer's output on it; the share of a
    class is <c, p> / |p|^2, c being what its samples contributed. The shares sum to 1; a class that works against what
    came out has a negative one, so another may have more than 1. It says who made the output, not what would be if
    these samples had been left out.

    Args:
        layers: Names or globs of linear and convolution layers; default: the classifier head (the last of them). Each
            costs the weight gradient once more per step, and memory for (classes + 2) copies of its weights in double
            precision, twice with momentum or Adam.
        probe: The samples that are explained, and when; see `Probe`. Its `layers` do not matter here.
        phases: Number of equal parts of the planned training, or the optimiser steps after which a phase ends.
        sources: `"class"`, or a function of the batch that returns a whole number for each sample, (N,), such as the
            id of the data set it comes from; numbers outside 0 .. num_sources - 1 count as "other".
        num_sources: How many there are; default for classes: those of the probe's samples. At most 100.
        memory_limit: What the ledgers may take, such as `"500MB"`; above it the fit does not start.
        name: First part of the keys, instead of `refinement`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        on_error: `"warn"` or `"raise"`.

    Keys:
        Each as `refinement/<measure>/<layer>`, and as `refinement/<measure>` for the mean over layers.

        ======================== ========================================================== ============ ============
        measure                  meaning                                                    range        better when
        ======================== ========================================================== ============ ============
        `norm`                   |p|, mean over the probe's samples                         0 ..         neither
        `completeness_error`     max |sum of all parts - output| / max |output|             0 ..         0
        `untraced_share`         part of the used gradient that came from no sample seen    0 ..         0
        `own_class_share`        share of a sample's own class in its refinement            any          higher
        `own_class_share_null`   the same for labels shuffled over the samples              any          (reference)
        `initial_share`          share of the initial weights in the output                 any          neither
        ======================== ========================================================== ============ ============

    The shares exist from the first evaluation after a training step on. Also a figure (`refinement/sources`: class by
    class and class by phase) and a histogram (`refinement/class_share/<layer>`).

    Exact for SGD (momentum, Nesterov, dampening, decay), Adam and AdamW (amsgrad too), parameter groups, schedules,
    accumulation, clipping, mixed precision, several optimisers, frozen and shared layers, DDP. Under another optimiser
    each step is credited in proportion to the projection of the classes' gradients, and a warning says so. Who shaped
    Adam's denominator is not attributed.

    Attributes:
        ledger: Layer -> `RefinementLedger`, whose `explain(layer_inputs)` divides the layer's output on any input.

    Raises:
        MisconfigurationException: For a wrong argument, at construction; for a layer that cannot be traced, no class
            labels, too many sources or too much memory, before the first step.

    Source:
        L. Pfahler, K. Morik, arXiv 2109.05880 (2021), for refinement and its parts by training step; the exact division
        by class under the optimiser in use is this project's.

    Example:
        >>> callback = RepresentationRefinement(layers="fc*", phases=5, prog_bar="refinement/own_class_share")
    """

    family = "refinement"
    charts = {  # noqa: RUF012
        "whose samples made it": ("own_class_share", "own_class_share_null"),
        "how much training made of it": ("norm",),
        "what the initial weights still hold": ("initial_share",),
        "proof: what does not add up": ("completeness_error", "untraced_share"),
    }
    histogram_name = "class_share"
    meanings = {  # noqa: RUF012
        "norm": "length of what training added to the layer's output, the mean over samples",
        "completeness_error": "what the sum of all contributions misses of the output: the proof",
        "own_class_share": "share that a sample's own class has in it",
        "own_class_share_null": "the same for shuffled labels",
        "initial_share": "share of the initial weights in the output",
    }

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        probe: Probe | None = None,
        *,
        phases: int | Sequence[int] = 10,
        sources: str | Callable[[Any], Any] = "class",
        num_sources: int | None = None,
        samples: bool | str | Sequence[str] = True,
        sample_id: str | int | None = None,
        influence_every_n_steps: int | None = None,
        influence_direction: str = "refinement",
        trace: bool | str | Path = False,
        trace_limit: str = "1GB",
        memory_limit: str = "1GB",
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        if isinstance(layers, Probe):
            raise MisconfigurationException("`layers` comes before `probe` here: RepresentationRefinement(probe=...).")
        self.layers = _patterns("layers", layers)
        check_phases(phases)
        if sources != "class" and not callable(sources):
            raise MisconfigurationException(f"`sources` must be 'class' or a function of the batch; got {sources!r}.")
        if num_sources is not None:
            check_count("num_sources", num_sources)
        elif sources != "class":
            raise MisconfigurationException("`sources` is a function, so say with `num_sources` how many there are.")
        if influence_every_n_steps is not None:
            check_count("influence_every_n_steps", influence_every_n_steps)
        if influence_direction not in DIRECTIONS:
            raise MisconfigurationException(
                f"`influence_direction` must be one of {', '.join(map(repr, DIRECTIONS))}; got {influence_direction!r}."
            )
        if not isinstance(sample_id, (str, int, type(None))) or isinstance(sample_id, bool):
            raise MisconfigurationException(f"`sample_id` must be a key or position in the batch; got {sample_id!r}.")
        self.samples_of = samples if isinstance(samples, bool) else _patterns("samples", samples)
        self.sample_id = sample_id
        self.influence_every_n_steps = influence_every_n_steps
        self.influence_direction = influence_direction
        self.trace = trace
        self.phases = phases
        self.sources = sources
        self.num_sources = num_sources
        self.memory_limit = parse_bytes("memory_limit", memory_limit)
        self.trace_limit = parse_bytes("trace_limit", trace_limit)
        self.ledger: dict[str, RefinementLedger] = {}
        self.needs_labels = sources == "class"
        self._recorder: StepRecorder | None = None
        self._seen_looks = -1
        self._boundaries: list[int] = []
        self._saved: dict[str, Any] = {}
        super().__init__(RefinementSummary(), probe, name=name, prog_bar=prog_bar, on_error=on_error)

    # Lightning's hooks

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers and hook them, before a compiled model's first run."""
        super().on_fit_start(trainer, pl_module)
        if not why_off(trainer):
            self._attach(pl_module)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Open the ledgers at the weights that training starts from, and follow the optimisers."""
        if not why_off(trainer):
            recorder = self._recorder
            assert recorder is not None
            # Without the probe's samples the classes cannot be counted: then there are no ledgers.
            with self._guard("the probe's samples"):
                self._open_ledgers(trainer, pl_module, recorder)
            recorder.elementwise = _may_change_elements(trainer, pl_module)
            if trainer.world_size > 1:
                recorder.mean_over_ranks = lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")
            recorder.attach(trainer.optimizers)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Say whose samples the coming backward passes are of."""
        if self._recorder is not None and self._recorder.ledgers:
            with self._guard("the batch"):
                targets = self._labels(batch)
                rows = self._rows(batch, targets)
                self._recorder.begin(TrainBatch(ids=None, targets=targets), Sources(rows, self._num_rows))

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a phase where one ends; evaluate where the probe is due."""
        if self._recorder is not None:
            self._recorder.end()
            while self._boundaries and trainer.global_step >= self._boundaries[0]:
                self._boundaries.pop(0)
                for ledger in self.ledger.values():
                    ledger.end_phase()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hook the layers for a `trainer.validate` after a fit."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "validate" and self.ledger and not why_off(trainer):
            self._attach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The base's, with the ledgers."""
        ledgers = {layer: ledger.state_dict() for layer, ledger in self.ledger.items()}
        return super().state_dict() | {
            "ledgers": ledgers or self._saved.get("ledgers", {}),
            "boundaries": self._boundaries,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; the ledgers when training starts."""
        super().load_state_dict(state_dict)
        self._saved = {name: state_dict[name] for name in ("ledgers", "boundaries")}

    def explain(self, pl_module: "pl.LightningModule", inputs: Any, layer: str | None = None) -> RefinementExplanation:
        """Divide a layer's output on the model's own inputs among sources and phases; after the fit, too.

        Args:
            pl_module: The model that was trained.
            inputs: What it is called with.
            layer: Which layer; default: the last of those traced.

        Raises:
            ValueError: If there is no ledger of the layer, or the layer does not run.
        """
        layer = next(reversed(self.ledger), "") if layer is None else layer
        if layer not in self.ledger:
            raise ValueError(f"There is no ledger of layer {layer!r}; there are {list(self.ledger) or 'none yet'}.")
        seen: list[Tensor] = []
        hook = self.ledger[layer].module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            with uncompiled(), evaluation_mode(pl_module), torch.no_grad():
                pl_module(inputs)
        finally:
            hook.remove()
        if not seen:
            raise ValueError(f"Layer {layer!r} did not run on these inputs.")
        return self.ledger[layer].explain(seen[0])

    # Opening

    def _attach(self, pl_module: "pl.LightningModule") -> None:
        if self._recorder is not None:
            self._recorder.remove()
        layers = find_layers(pl_module, self.layers)
        self._recorder = StepRecorder(layers, {}, self._observers(), self._layer_failed)

    def _observers(self) -> list[Observer]:
        return []

    def _open_ledgers(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", recorder: StepRecorder) -> None:
        if self.sources == "class" and self.num_sources is None:
            num_sources = self.probe.count_classes(trainer, pl_module)
        else:
            num_sources = self.num_sources or 0
        if num_sources == 0:
            raise MisconfigurationException(
                "RepresentationRefinement needs a class label (a whole number) for each sample, and the probe finds"
                " none. Say where they are with `Probe(target_fn=lambda batch: ...)`, or what else the sources of the"
                " samples are with `sources=` and `num_sources=`."
            )
        if num_sources > MAX_SOURCES:
            raise MisconfigurationException(
                f"There are {num_sources} sources, and the ledgers hold a copy of each layer's weights for each: at"
                f" most {MAX_SOURCES}. Group them, for example `sources=lambda batch: batch[1] // 10, num_sources=...`."
            )
        planned, self._boundaries = _plan(trainer, self.phases)
        kept = self._saved or {name: value for name, value in self.state_dict().items() if name in ("ledgers",)}
        self.ledger = {
            layer: RefinementLedger(owners[0], num_sources=num_sources, num_phases=planned)
            for layer, owners in recorder.layers.items()
        }
        self._check_memory()
        for layer, ledger in self.ledger.items():
            if layer in kept.get("ledgers", {}):
                ledger.load_state_dict(kept["ledgers"][layer])
        if self._saved:
            self._boundaries, self._saved = list(self._saved["boundaries"]), {}
        recorder.ledgers = dict(self.ledger)

    def _check_memory(self) -> None:
        sizes = {layer: ledger.bytes for layer, ledger in self.ledger.items()}
        total = sum(sizes.values())
        parts = ", ".join(f"{layer}: {_megabytes(size)}" for layer, size in sizes.items())
        if total > self.memory_limit:
            raise MisconfigurationException(
                f"The ledgers would take {_megabytes(total)} ({parts}), more than `memory_limit` allows"
                f" ({_megabytes(self.memory_limit)}). Name fewer or smaller `layers`, group the `sources`, take fewer"
                " `phases`, or raise the limit."
            )
        rank_zero_info(f"{self.name}: ledgers of {_megabytes(total)} ({parts}).")

    # Whose samples

    @property
    def _num_rows(self) -> int:
        return next(iter(self.ledger.values())).num_sources + 1

    def _labels(self, batch: Any) -> Tensor | None:
        return class_labels((self.probe.target_fn or default_target)(batch))

    def _rows(self, batch: Any, targets: Tensor | None) -> Tensor:
        """Each sample's row in the ledgers; the last, "other", for those with no source of their own."""
        last = self._num_rows - 1
        rows = targets if self.sources == "class" else self.sources(batch)  # type: ignore[operator]
        if rows is None:
            return torch.full((batch_length(batch) or 1,), last)
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point():
            raise ValueError(f"`sources` must return (N,) whole numbers; it returned {describe(rows)}.")
        return torch.where((rows >= 0) & (rows < last), rows, last)

    # One evaluation

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Get ready for a pass of the probe."""
        super().begin(trainer, pl_module)
        if self._recorder is not None:
            self._recorder.taps.recorded = {}

    def observe(self, batch: ProbeBatch) -> None:
        """Take in one batch of the probe's pass, as the layers' inputs and outputs."""
        if self.needs_labels and batch.targets is None:
            super().observe(batch)
        recorder = self._recorder
        if recorder is None or recorder.taps.recorded is None:
            return
        recorded, recorder.taps.recorded = recorder.taps.recorded, {}
        rows = self._rows(batch.batch, batch.targets)
        for layer, calls in recorded.items():
            for inputs, outputs in calls:
                try:
                    self.metric_at(layer, outputs.device).update(inputs, outputs, rows)
                except Exception as error:
                    self._failed.setdefault(layer, error)

    def metric_at(self, layer: str, device: torch.device) -> Metric:
        """The summary of one layer's ledger."""
        metric = self._metrics.get(layer)
        if not isinstance(metric, RefinementSummary) or metric.ledger is not self.ledger[layer]:
            self._metrics[layer] = RefinementSummary(self.ledger[layer], own=self.sources == "class")
        return self._metrics[layer].to(device)

    def draw(self, results: Mapping[str, RefinementResult]) -> dict[str, "Figure"]:
        """Which classes made the output for which classes, and when."""
        return {"sources": plot_refinement(results)}

    def _results(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> dict[str, Any]:
        try:
            return super()._results(trainer, pl_module, event)
        finally:
            if self._recorder is not None:
                self._recorder.taps.recorded = None

    def _layer_failed(self, layer: str, error: Exception) -> None:
        self._report(f"layer '{layer}' in a training step", error)

    def _forget(self) -> None:
        super()._forget()
        self.ledger, self._saved, self._boundaries = {}, {}, []

    def _release(self) -> None:
        super()._release()
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
