"""Representation refinement as training curves: which classes made a layer what it is, exactly, while it is trained."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import logging
from lightning_neuro.callback import MetricCallback
from lightning_neuro.isolation import why_off
from lightning_neuro.probe import Event, Probe, ProbeBatch
from lightning_neuro.ranks import on_any_rank
from lightning_neuro.refinement.explanation import RefinementExplanation
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.metric import RefinementSummary
from lightning_neuro.refinement.pfahler2021 import StepScores
from lightning_neuro.refinement.plan import check_patterns, check_phases, check_sample_options, parse_bytes
from lightning_neuro.refinement.plot import plot_refinement
from lightning_neuro.refinement.result import RefinementResult
from lightning_neuro.refinement.samples import Arrays, SampleTable
from lightning_neuro.refinement.sources import check_sources, count_classes, rows_of
from lightning_neuro.refinement.tracer import Options, Tracer
from lightning_neuro.refinement.watch import SampleWatch
from lightning_neuro.samples import class_labels, default_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("exact", "pfahler2021")


class RepresentationRefinement(MetricCallback):
    """Shows which classes made a layer what it is, exactly, while the network trains.

    A layer's output on any input is the sum of what the initial weights give and what every training step added. The
    steps are divided among the classes of the samples in their batches (among `sources` of your own, if you like) by
    running each class's part of the gradient through the optimiser's own recursion. So, for the probe's samples,

        output = initial part + sum over classes and phases of training of their contributions

    holds to rounding, with ordinary batches and constant memory. `completeness_error` is its measured error; nothing is
    copied from the weights. It proves the total; `untraced_share` tells of what gradient no sample was seen.

    How to read it: the refinement p of a sample is all that training added to the layer's output on it; the share of a
    class is sum <c, p> / sum |p|^2, c being what its samples contributed. Shares sum to 1; a class that works against
    what came out has a negative one. It says who made the output, not what would be without these samples.

    Args:
        layers: Names or globs of linear and convolution layers; default: the classifier head (the last of them). Each
            costs the weight gradient once more per step, and memory for (classes + 2) copies of its weights in double
            precision, twice with momentum or Adam.
        probe: The samples that are explained, and when; see `Probe`. Its `layers` do not matter here.
        mode: `"exact"`, or `"pfahler2021"` to keep, beside the ledgers, every step's change of the weights, for the
            scores of the paper (`step_scores`): for small runs.
        phases: Number of equal parts of the planned training, or the optimiser steps after which a phase ends.
        sources: `"class"`, or a function of the batch that returns a whole number for each sample, (N,), such as the
            id of the data set it comes from; numbers outside 0 .. num_sources - 1 count as "other".
        num_sources: How many there are; default for classes: those of the probe's samples. At most 100.
        samples: Whether to cumulate for each training sample the length of its own updates, r_i = lr x |its gradient|:
            of the traced layers (True), of these (names or globs, `"*"` for all it can be had for), or not (False).
            Large values belong to samples that keep pulling at the network: hard, rare or mislabelled ones.
        sample_id: Key or position of the batch's field that holds each sample's id; default: its place in the dataset,
            found by itself for map-style datasets, whatever the sampler and the number of workers.
        influence_every_n_steps: Score, against the probe's first 16 samples, which training samples moved their
            output at the last of the layers; so many steps go between two looks at them.
        trace: Whether to keep the factors of every sample's update on disk, beside the logs or in this folder, for
            `lightning_neuro.refinement.load_trace`.
        trace_limit: What the trace may take on disk.
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
        `sample_gini`            how unevenly the samples refine the layer (0: all alike)   0 .. 1       neither
        ======================== ========================================================== ============ ============

    The shares and `sample_gini` exist from the first evaluation after a training step on. Also a figure (`sources`),
    a histogram (`class_share/<layer>`), with live influence the probe's samples beside the training samples that moved
    them most (`influence/<layer>`), and at the end of the fit the 20 samples that refined each layer most, as images
    and as a table (`top_samples/<layer>`), and the whole table in a file `samples.csv`.

    Exact for SGD (momentum, Nesterov, dampening, decay), Adam and AdamW (amsgrad too), parameter groups, schedules,
    accumulation, clipping, mixed precision, several optimisers, frozen and shared layers, DDP. Under another optimiser
    each step is credited in proportion to the projection of the classes' gradients, and a warning says so. Who shaped
    Adam's denominator is not attributed.

    Attributes:
        ledger: Layer -> `RefinementLedger`, whose `explain(layer_inputs)` divides the layer's output on any input.
        samples: The table of the training samples.

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
        mode: str = "exact",
        phases: int | Sequence[int] = 10,
        sources: str | Callable[[Any], Any] = "class",
        num_sources: int | None = None,
        samples: bool | str | Sequence[str] = True,
        sample_id: str | int | None = None,
        influence_every_n_steps: int | None = None,
        trace: bool | str | Path = False,
        trace_limit: str = "1GB",
        memory_limit: str = "1GB",
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        if isinstance(layers, Probe):
            raise MisconfigurationException("`layers` comes before `probe` here: RepresentationRefinement(probe=...).")
        if mode not in MODES:
            raise MisconfigurationException(f"`mode` must be one of {', '.join(map(repr, MODES))}; got {mode!r}.")
        check_phases(phases)
        check_sources(sources, num_sources)
        check_sample_options(influence_every_n_steps, sample_id, trace)
        self.layers = check_patterns("layers", layers)
        self.sources = sources
        self.num_sources = num_sources
        self.influence_every_n_steps = influence_every_n_steps
        self.needs_labels = sources == "class"
        options = Options(
            layers=self.layers,
            phases=phases,
            samples=samples if isinstance(samples, bool) else check_patterns("samples", samples) or False,
            sample_id=sample_id,
            step_scores=mode == "pfahler2021",
            influence=influence_every_n_steps is not None,
            trace=trace,
            trace_limit=parse_bytes("trace_limit", trace_limit),
            memory_limit=parse_bytes("memory_limit", memory_limit),
        )
        super().__init__(RefinementSummary(), probe, name=name, prog_bar=prog_bar, on_error=on_error)
        self._tracer = Tracer(options, self.name, self._layer_failed)
        self._table: SampleTable | None = None
        self._last_influence = 0

    @property
    def ledger(self) -> dict[str, RefinementLedger]:
        """Layer -> its ledger."""
        return self._tracer.ledgers

    @property
    def samples(self) -> Arrays:
        """The table of the training samples, of all ranks at the last evaluation: 1-D arrays of one length.

        `sample_id`, `target` (-1 where unknown), `visits`, and `refinement/<layer>` for each layer; empty where the
        samples have no ids.
        """
        return {} if self._table is None else self._table.arrays()

    # Lightning's hooks

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers and hook them, before a compiled model's first run."""
        if not why_off(trainer):
            self.probe.attach(pl_module, self, needs_layers=False)
            self._tracer.attach(trainer, pl_module)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Open the ledgers at the weights that training starts from, and follow the optimisers."""
        if not why_off(trainer):
            self._open(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Say whose samples the coming backward passes are of."""
        if self.ledger and not why_off(trainer):
            try:
                targets = class_labels((self.probe.target_fn or default_target)(batch))
                if targets is None and self.sources == "class":
                    self._warn_once("unlabelled", f"{self.name}: a training batch has no class labels: 'other'.")
                rows = self._rows(batch, targets).to(pl_module.device)
                self._tracer.begin(trainer, batch, targets, rows)
            except Exception as error:
                if isinstance(error, MisconfigurationException) and trainer.global_step == 0:
                    raise
                self._report("a training batch", error)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a phase where one ends; look at the influence and evaluate where they are due."""
        self._tracer.end(trainer.global_step)
        every, step = self.influence_every_n_steps, trainer.global_step
        if every is not None and self.ledger and step // every > self._last_influence // every:
            self._last_influence = step
            self._refresh_influence(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write the table of the samples beside the logs."""
        if not why_off(trainer):
            with self._guard("the training samples"):
                self._tracer.finish(trainer, pl_module.device)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hook the layers for a `trainer.validate` after a fit."""
        if trainer.state.fn == "validate" and not why_off(trainer):
            self.probe.attach(pl_module, self, needs_layers=False)
            if self.ledger:
                self._tracer.look_only(pl_module)

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Save what all ranks hold together; Lightning asks every rank, after it asked each for its own state."""
        if trainer.world_size > 1 and (saved := checkpoint.get("callbacks", {}).get(self.state_key)):
            saved["tracer"] = self._tracer.state_dict(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The base's, with the ledgers and the table of the samples."""
        return super().state_dict() | {"tracer": self._tracer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; the ledgers when training starts."""
        super().load_state_dict(state_dict)
        self._tracer.saved = state_dict["tracer"]

    def explain(self, pl_module: "pl.LightningModule", inputs: Any, layer: str | None = None) -> RefinementExplanation:
        """Divide a layer's output on the model's own inputs among sources and phases; after the fit, too.

        Args:
            pl_module: The model that was trained.
            inputs: What it is called with.
            layer: Which layer; default: the last of those traced.

        Raises:
            ValueError: If there is no ledger of the layer, or the layer does not run.
        """
        return self._tracer.explain(pl_module, inputs, layer)

    def influence(
        self, top_k: int = 10, direction: str | Tensor = "refinement", *, targets: Tensor | None = None
    ) -> Influence | None:
        """The training samples of this rank that moved the probe's first samples most; see `LiveInfluence.top`."""
        live = None if self._tracer.watch is None else self._tracer.watch.live
        return None if live is None else live.top(top_k, direction, targets=targets)

    @property
    def step_scores(self) -> dict[str, StepScores]:
        """Layer -> the paper's scores of the steps; in mode "pfahler2021"."""
        return self._tracer.step_scores

    # One evaluation

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Get ready for a pass of the probe."""
        super().begin(trainer, pl_module)
        # Here too: another callback's `on_train_start` may ask for the first pass, before ours is called.
        self._open(trainer, pl_module)
        self._record(True)

    def _open(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "fit" and not self._tracer.opened:
            # Without the probe's samples the classes cannot be counted: then there are no ledgers.
            with self._guard("the probe's samples"):
                self._tracer.open(trainer, self.num_sources or count_classes(self.probe, trainer, pl_module))

    def observe(self, batch: ProbeBatch) -> None:
        """Take in one batch of the probe's pass, as the layers' inputs and outputs."""
        if self.needs_labels and batch.targets is None:
            super().observe(batch)
        broken = {} if self._tracer.recorder is None else self._tracer.recorder.broken
        self._failed |= {layer: error for layer, error in broken.items() if layer not in self._failed}
        recorded = {} if self._tracer.recorder is None else self._tracer.recorder.taps.recorded
        for layer in self.ledger:
            if layer not in recorded:
                self._warn_once(layer, f"{self.name}: layer '{layer}' did not run: nothing is told of it.")
            try:
                for inputs, outputs in recorded.get(layer, ()):
                    metric: Any = self.metric_at(layer, outputs.device)
                    rows = self._rows(batch.batch, batch.targets)
                    # A function for several views of a training batch does not fit the one view here.
                    metric.update(inputs, outputs, rows if len(rows) == batch.num_samples else None)
            except Exception as error:
                self._failed.setdefault(layer, error)

    def _rows(self, batch: Any, targets: Tensor | None) -> Tensor:
        return rows_of(batch, targets, self.sources, self._tracer.num_sources)

    def _record(self, on: bool) -> None:
        recorder = self._tracer.recorder
        if recorder is not None:
            recorder.taps.record(lambda: self.probe.num_looks if on else None)

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
            results = super()._results(trainer, pl_module, event)
        finally:
            self._record(False)
        if trainer.state.fn == "fit" and self._tracer.watch is not None:
            self._table = self._tracer.watch.over_ranks(trainer)
        return results

    def _measured(self, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        measured = super()._measured(results)
        if results and self._table is not None and (ginis := SampleWatch.ginis(self._table)):
            measured["sample_gini"] = ginis
            for kind, note in self._table.notes().items():
                self._warn_once(f"samples/{kind}", f"{self.name}: {note}")
        return measured

    def _log_pictures(self, trainer: "pl.Trainer") -> None:
        watch = self._tracer.watch
        # First what the ranks do together: the rest may fail on one of them.
        top = None if watch is None else watch.influence(trainer)
        super()._log_pictures(trainer)
        if watch is not None:
            figures = watch.draw_influence(trainer, top)
            logging.log_figures(trainer, lambda: {f"{self.name}/{tag}": figure for tag, figure in figures.items()})

    def _refresh_influence(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Score the coming samples against how the network sees the probe's first samples now."""
        watch, recorder = self._tracer.watch, self._tracer.recorder
        assert watch is not None and recorder is not None
        self._record(True)
        error: Exception | None = None
        try:
            watch.look(trainer, pl_module, self.probe, recorder.taps)
        except Exception as failure:
            error = failure
        finally:
            self._record(False)
        if on_any_rank(trainer, error is not None):
            self._report("the influence of training samples", error)
        else:
            watch.refresh(trainer)

    def _layer_failed(self, layer: str, error: Exception) -> None:
        self._report(f"layer '{layer}' in a training step", error)

    def _forget(self) -> None:
        super()._forget()
        self._tracer = Tracer(self._tracer.options, self.name, self._layer_failed)
        self._table, self._last_influence = None, 0

    def _release(self) -> None:
        super()._release()
        self._tracer.close()
