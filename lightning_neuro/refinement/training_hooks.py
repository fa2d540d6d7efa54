"""Follows the training steps of a fit: the part of `RepresentationRefinement` that uses Lightning's training hooks."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_neuro.callback import MetricCallback
from lightning_neuro.checks import ArgumentError
from lightning_neuro.isolation import why_no_replay, why_off
from lightning_neuro.model_calls import is_compiled_anywhere
from lightning_neuro.probe import interval_passed
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.refinement.attachment import Attachment, attach
from lightning_neuro.refinement.followed_classes import FollowedClasses, choose_classes
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.options import RunOptions
from lightning_neuro.refinement.refinement_run import RefinementRun
from lightning_neuro.refinement.sample_dims import SampleDims
from lightning_neuro.refinement.sample_ids import SampleIds
from lightning_neuro.refinement.sample_tracking import SampleTracking
from lightning_neuro.refinement.traced_layers import find_layers
from lightning_neuro.session import session_of

R = TypeVar("R")


def _is_off(trainer: "pl.Trainer") -> bool:
    """Whether nothing can be traced: with sharded weights, no rank holds the gradient of a layer."""
    return bool(why_off(trainer) or why_no_replay(trainer))


class TrainingHooksCallback(MetricCallback[R]):
    """Places the hooks before the first forward pass, opens a run at the initial weights, and follows it step by step.

    Attributes:
        options: What to trace.
        attachment: Hooks and sample ids of the running fit.
        hooks: Hooks on the layers, in a fit or in a `trainer.validate` after it.
        run: The latest run, with its ledgers and tables; None before training.
        saved_run: The state of the run that is continued.
        off: Whether the run cannot be traced, so that nothing is logged.
    """

    options: RunOptions
    run_state = ("last_influence_step",)

    def start_run(self) -> None:
        """Reset the state of an earlier run."""
        super().start_run()
        self.last_influence_step = 0
        self.attachment: Attachment | None = None
        self.hooks: GradientHooks | None = None
        self.run: RefinementRun | None = None
        self.saved_run: dict[str, Any] = {}
        self._ids: SampleIds | None = None
        self.off = False

    def show(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass, unless the run cannot be traced."""
        if not self.off:
            super().show(batch)

    @property
    def tracking(self) -> SampleTracking | None:
        """The tables of samples of the run, if samples are tracked."""
        return None if self.run is None else self.run.tracking

    # Training: hooks before the first forward pass, ledgers at the initial weights, then step by step

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Listen to the data loader, before any iterator over it exists."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.options.needs_sample_ids and not _is_off(trainer):
            self._stop_listening()
            self._ids = SampleIds(trainer, self.options.sample_id_fn)

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers and hook them, before the first run of a compiled model."""
        super().on_fit_start(trainer, pl_module)
        if not _is_off(trainer):
            if not self.saved_run and self.run is not None:
                # Without a checkpoint, each rank continues with its own state.
                self.saved_run = self.run.state_dict() | {"of_this_rank": True}
            self.run = None
            self.off = False
            # Compiled modules must be hooked before they run; for others, it is better to see first what is called.
            if self.options.layers is not None or is_compiled_anywhere(pl_module):
                self._attach(pl_module)

    def _attach(self, pl_module: "pl.LightningModule") -> None:
        """Hook the layers: those that are named, else the last linear one that is called."""
        with self._off_if_impossible():
            self.attachment = attach(pl_module, self.options, self._ids, order=self.probe_pass.call_order())
            self.hooks = self.attachment.hooks

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Open the ledgers at the weights from which training starts."""
        if not _is_off(trainer):
            self.attempt(trainer, "the probe set", lambda: self.open_run(trainer, pl_module))
        super().on_train_start(trainer, pl_module)

    def open_run(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Open the ledgers and tables of this fit, unless they are open."""
        if self.run is None and self.attachment is None and not self.off and trainer.state.fn == "fit":
            with suppress(Exception):  # the evaluation will report what is wrong with the pass
                self.probe_pass.see_calls(trainer, pl_module)
            self._attach(pl_module)
        if self.run is None and self.attachment is not None:
            with self._off_if_impossible():
                self._open_run(trainer, pl_module, self.attachment)

    @contextmanager
    def _off_if_impossible(self) -> Iterator[None]:
        """Turn the callback off, with a warning, if a run cannot be traced although nothing special was asked for."""
        try:
            yield
        except ArgumentError as error:
            if not self.options.are_defaults or self.probe.target_fn is not None or self.on_error == "raise":
                raise
            self.off = True
            self._detach()
            self.warn_once("off", f"{self.name}: nothing is logged in this run. {error}")

    def _open_run(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", attachment: Attachment) -> None:
        if not self.options.num_sources:
            self.probe_pass.count_classes(trainer, pl_module)
        unlabelled = not self.probe_pass.has_class_labels and self.probe.target_fn is None
        if unlabelled and not self.options.num_sources:
            # Then all training samples are one source, "other".
            rank_zero_info(f"{self.name}: no class labels are known, so the refinement is not divided among classes.")
            self.needs_labels = False
            classes = FollowedClasses(1)
        elif (saved := self.saved_run.get("classes")) and self.options.num_sources in (None, saved["num"]):
            classes = FollowedClasses(**saved)
        else:
            weights = [attachment.hooks.layers[layer][0].parameters() for layer in attachment.traced]
            num_weights = sum(weight.numel() for layer in weights for weight in layer)
            classes = choose_classes(trainer, self.probe_pass, self.options, num_weights)
        sample_dims = SampleDims()
        with suppress(Exception):  # the evaluation will report what is wrong with the pass
            sample_dims.probe(trainer, pl_module, self.probe_pass, attachment.hooks)
        self.run = RefinementRun(
            trainer,
            attachment,
            self.options,
            name=self.name,
            classes=classes.to(pl_module.device),
            class_names=self.probe_pass.class_names(trainer),
            saved=self.saved_run,
            sample_dims=sample_dims,
            report=lambda layer, error: self.report(f"layer '{layer}' in a training step", error),
            cost=self.cost,
        )
        self.saved_run = {}

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Set the sources of the samples for the coming backward passes."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.run is None or _is_off(trainer):
            return
        try:
            targets = self.probe_pass.class_labels(batch)
            if targets is None and self.needs_labels:
                message = f"{self.name}: a training batch has no class labels, so it is credited to 'other'."
                self.warn_once("unlabelled", message)
            self.run.begin_batch(batch, targets, pl_module.device)
        except Exception as error:
            self.report("a training batch", error)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a phase, update the influence and evaluate, each if it is due."""
        if self.run is not None:
            self.run.end_batch(trainer.global_step)
            every, step = self.options.influence_every_n_steps, self.run.num_steps
            if every is not None and interval_passed(every, step, self.last_influence_step):
                self.last_influence_step = step
                self._update_influence(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write the table of the samples."""
        super().on_train_end(trainer, pl_module)
        run = self.run
        if run is not None and not _is_off(trainer):
            what = "the training samples"
            self.attempt(trainer, what, lambda: run.finish(trainer, pl_module.device, self.class_names))

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hook the layers for a `trainer.validate` after the fit."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "validate" and self.run is not None and not _is_off(trainer):
            with self._off_if_impossible():
                self.hooks = GradientHooks(find_layers(pl_module, list(self.run.ledgers)))

    def _join(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super()._join(trainer, pl_module)
        # First in each batch, because others may run the model when they process it, and the hooks would record that.
        callbacks = session_of(trainer).callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    def release(self) -> None:
        """Release hooks, data loaders and files; the ledgers and tables stay."""
        super().release()
        if self.run is not None:
            self.run.close()
        self._detach()

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.close()
        if self.hooks is not None:
            self.hooks.remove()
        self.attachment = None
        self.hooks = None
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._ids is not None:
            self._ids.close()
        self._ids = None

    def _update_influence(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """From now on, score against the current layer inputs of the first samples of the probe set."""
        run, hooks, tracking = self.run, self.hooks, self.tracking
        if run is not None and hooks is not None and tracking is not None:
            what = "the influence of training samples"
            compute = partial(tracking.find_inputs, trainer, pl_module, self.probe_pass, hooks, run.sample_dims)
            if (found := self.attempt(trainer, what, compute)) is not None:
                tracking.refresh(trainer, found)

    # State

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Save the tables of all ranks. Lightning calls this on every rank, after `state_dict`."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.world_size > 1 and saved and self.run is not None:
            saved["run"] = self.run.state_dict(trainer)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the model of the running fit, and a copy of the callback is not part of it.
        return vars(self) | {"attachment": None, "hooks": None, "_ids": None}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the state of the base class, the ledgers, and the tables of samples."""
        return super().state_dict() | {"run": dict(self.saved_run) if self.run is None else self.run.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the ledgers are opened when training starts."""
        super().load_state_dict(state_dict)
        self.saved_run = state_dict["run"]
