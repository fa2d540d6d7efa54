"""The tracing of one fit: ledgers, tables and files, filled through the hooks on the layers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_neuro import loggers
from lightning_neuro.checks import ArgumentError
from lightning_neuro.cost import Cost
from lightning_neuro.ranks import reduced
from lightning_neuro.refinement.attachment import Attachment
from lightning_neuro.refinement.drawn_indices import training_loaders
from lightning_neuro.refinement.followed_classes import FollowedClasses
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.layer_calls import call_layers
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.options import Direction, RunOptions, check_memory, parse_bytes
from lightning_neuro.refinement.pfahler2021 import StepScores
from lightning_neuro.refinement.result import RefinementExplanation
from lightning_neuro.refinement.sample_dims import SampleDims
from lightning_neuro.refinement.sample_tracking import SampleTracking, is_recorded
from lightning_neuro.refinement.sources import Sources, check_num_sources, source_rows
from lightning_neuro.refinement.traced_layers import require_linear
from lightning_neuro.refinement.training_steps import StepListener, TrainBatch, TrainingSteps
from lightning_neuro.refinement.update_log import UpdateLogWriter, load_update_log


def changes_elements(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
    """Whether a gradient may be changed other than by one common factor before the optimizer uses it."""
    if not pl_module.automatic_optimization:
        return True
    hook = type(pl_module).configure_gradient_clipping.__qualname__
    overridden = hook != "LightningModule.configure_gradient_clipping"
    return overridden or (bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value")


def plan_phases(trainer: "pl.Trainer", phases: int | Sequence[int]) -> tuple[int, list[int]]:
    """The number of phases, and the optimizer steps after which each but the last one ends.

    Args:
        trainer: The trainer, once it has its optimizers.
        phases: Number of equal phases of the planned training, or the steps after which a phase ends.
    """
    if not isinstance(phases, int):
        return len(phases) + 1, list(phases)
    planned = float(trainer.estimated_stepping_batches)
    if planned == float("inf"):
        rank_zero_info("The number of training steps is not known, so there is a single phase of training.")
        return 1, []
    if not trainer.lightning_module.automatic_optimization:
        planned *= max(1, len(trainer.optimizers))  # the trainer counts the steps of each optimizer
    return phases, [round(planned * k / phases) for k in range(1, phases)]


class RefinementRun:
    """Holds the ledgers of one fit, and everything else that is recorded about its training steps.

    Args:
        trainer: The trainer, in `on_train_start`.
        attachment: Hooks and sample ids.
        options: What to trace.
        name: First part of the keys of the callback, and name of its folder.
        classes: The sources, if they are classes; else their number.
        class_names: Names of the classes, if known.
        saved: The state of an earlier part of the run; empty at its beginning.
        sample_dims: In which dimension of the layers' inputs the samples lie.
        report: Called with the layer and the error if something fails in a training step.
        cost: Where the time of the training steps is added.

    Attributes:
        ledgers: Layer -> ledger.
        num_steps: Number of optimizer steps so far, those of an earlier part of the run included.
        sample_dims: In which dimension of the layers' inputs the samples lie.
        tracking: The tables of samples; None if samples are not tracked.
        step_scores: Layer -> scores of the steps, in mode "pfahler2021".

    Raises:
        ArgumentError: If the ledgers or tables would take too much memory, the saved state does not fit the arguments,
            two optimizers move a layer, or an option cannot be used in this run.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        attachment: Attachment,
        options: RunOptions,
        *,
        name: str,
        classes: FollowedClasses,
        class_names: Sequence[str] | None,
        saved: Mapping[str, Any],
        sample_dims: SampleDims,
        report: Callable[[str, Exception], None],
        cost: Cost | None = None,
    ) -> None:
        check_num_sources(classes.num)
        self.name = name
        self.classes = classes
        self.source_fn = options.source_fn
        self._sample_every = options.sample_every_n_steps
        self._ids = attachment.ids
        self.sample_dims = sample_dims
        layers = {layer: attachment.hooks.layers[layer][0] for layer in attachment.traced}
        num_phases, self._phase_ends = plan_phases(trainer, options.phases)
        names = None if options.source_fn is not None else classes.names(class_names)
        self.ledgers = {
            layer: RefinementLedger(module, num_sources=classes.num, names=names, num_phases=num_phases)
            for layer, module in layers.items()
        }
        sizes = {layer: ledger.num_bytes for layer, ledger in self.ledgers.items()}
        rank_zero_info(f"{name}: ledgers of {check_memory(sizes, options.memory_bytes)}{classes.in_words()}.")
        self.num_steps = self._first_step = max(trainer.global_step, saved.get("num_steps", 0))
        self._continue(saved)
        self.tracking = self._open_tracking(trainer, attachment, layers, options, saved)
        self._log = self._open_log(trainer, layers, options, saved)
        self.log_folder = None if self._log is None else self._log.folder
        self.step_scores = self._open_step_scores(trainer, layers, options, saved)
        listeners: list[StepListener | None] = [self.tracking, self._log, *self.step_scores.values()]
        self._steps: TrainingSteps | None = TrainingSteps(
            attachment.hooks,
            self.ledgers,
            [listener for listener in listeners if listener is not None],
            trainer.optimizers,
            report,
            elementwise=changes_elements(trainer, trainer.lightning_module),
            world_size=trainer.world_size,
            mean_over_ranks=partial(reduced, trainer, reduce_op="mean") if trainer.world_size > 1 else None,
            sample_dims=sample_dims,
            cost=cost,
        )

    # Opening, in the order of the constructor

    def _continue(self, saved: Mapping[str, Any]) -> None:
        """Continue the ledgers of an earlier part of the run."""
        num_ended = 0
        for layer, state in saved.get("ledgers", {}).items():
            if layer in self.ledgers:
                try:
                    self.ledgers[layer].load_state_dict(state)
                except ValueError as error:
                    raise ArgumentError(
                        "`source_fn`, `num_sources` and `phases` must be those of the checkpoint, whose ledger of layer"
                        f" '{layer}' does not fit: {error}"
                    ) from error
                num_ended = max(num_ended, len(state["snapshots"]))
        if saved.get("ledgers"):
            # Phases that have ended stay as they were; of those planned now, only the future ones count.
            ahead = [end for end in self._phase_ends if end > self.num_steps]
            self._phase_ends = ahead[: max(0, len(self._phase_ends) - num_ended)]

    def _open_tracking(
        self,
        trainer: "pl.Trainer",
        attachment: Attachment,
        layers: Mapping[str, nn.Module],
        options: RunOptions,
        saved: Mapping[str, Any],
    ) -> SampleTracking | None:
        if not (attachment.tracked or options.tracks_influence) or attachment.ids is None:
            return None
        # From the dataset and not from the first batch, so that it is the same on all ranks, which sum their tables.
        num_samples = attachment.ids.num_samples
        if num_samples == 0:
            attachment.ids.warn_disabled()
            return None
        last = attachment.traced[-1]
        head = (
            (last, require_linear(last, layers[last], "influence_every_n_steps")) if options.tracks_influence else None
        )
        return SampleTracking(
            attachment.tracked,
            num_samples,
            classifier=attachment.classifier,
            head=head,
            is_classifier=attachment.classifier == last,
            dataset=training_loaders(trainer)[0].dataset,
            memory_limit=options.memory_bytes,
            saved=saved.get("tracking"),
            # The tables in a checkpoint are sums over all ranks, so only one rank continues them.
            continues_sums=saved.get("of_this_rank", False) or trainer.global_rank == 0,
        )

    def _open_log(
        self, trainer: "pl.Trainer", layers: Mapping[str, nn.Module], options: RunOptions, saved: Mapping[str, Any]
    ) -> UpdateLogWriter | None:
        if not options.update_log:
            return None
        folder: Path | None
        if isinstance(options.update_log, (str, Path)):
            folder = Path(options.update_log)
        elif (folder := loggers.artefact_folder(trainer, self.name)) is None:
            raise ArgumentError("`update_log` must be a folder if no logger has one; got True.")
        limit = parse_bytes("update_log_limit", options.update_log_limit)
        log = UpdateLogWriter(folder / "updates", layers, size_limit=limit, rank=trainer.global_rank)
        if saved.get("update_log"):
            log.load_state_dict(saved["update_log"])
        return log

    def _open_step_scores(
        self, trainer: "pl.Trainer", layers: Mapping[str, nn.Module], options: RunOptions, saved: Mapping[str, Any]
    ) -> dict[str, StepScores]:
        if options.mode != "pfahler2021":
            return {}
        planned = float(trainer.estimated_stepping_batches)
        if planned == float("inf"):
            raise ArgumentError(
                "`mode` must be 'exact' if the number of training steps is not known, because 'pfahler2021' keeps the"
                " change of the weights in each step; got 'pfahler2021'. Give the trainer `max_epochs` or `max_steps`."
            )
        limit = options.memory_bytes // len(layers)
        scores = {
            layer: StepScores(module, int(planned), layer=layer, memory_limit=limit) for layer, module in layers.items()
        }
        for layer, state in saved.get("step_scores", {}).items():
            if layer in scores:
                scores[layer].load_state_dict(state)
        return scores

    # Training steps

    @property
    def broken(self) -> Mapping[str, Exception]:
        """Layer -> error, for ledgers that missed a step."""
        return {} if self._steps is None else self._steps.broken

    def rows(self, batch: Any, targets: Tensor | None) -> Tensor:
        """The ledger row of each sample in a batch."""
        return source_rows(batch, targets, self.source_fn, self.classes.num, self.classes.labels)

    def begin_batch(self, batch: Any, targets: Tensor | None, device: torch.device) -> None:
        """Start a training micro-batch, which is about to run on this device."""
        if self._steps is None:
            return
        rows = self.rows(batch, targets).to(device)
        ids = None if self._ids is None else self._ids.of_batch(batch)
        ids = None if ids is None else ids.to(device, non_blocking=True)
        targets = None if targets is None else targets.to(device, non_blocking=True)
        recorded = is_recorded(self.num_steps, self._sample_every)
        self._steps.begin(TrainBatch(ids, targets, recorded), Sources(rows, self.classes.num + 1))

    def end_batch(self, global_step: int) -> None:
        """Finish the training micro-batch, and end the phase if this was its last step.

        Args:
            global_step: Number of steps that the trainer has counted. It does not count those of an optimizer that a
                manual optimization calls without the trainer.
        """
        if self._steps is not None:
            self._steps.end()
            self.num_steps = max(global_step, self._first_step + self._steps.num_steps)
        while self._phase_ends and self.num_steps >= self._phase_ends[0]:
            self._phase_ends.pop(0)
            for ledger in self.ledgers.values():
                ledger.end_phase()

    # Afterwards

    def explain(
        self,
        pl_module: "pl.LightningModule",
        inputs: Any,
        layer: str | None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
    ) -> RefinementExplanation:
        """Divide the output of a layer (default: the last one) on inputs of the model."""
        layer = next(reversed(self.ledgers)) if layer is None else layer
        if layer not in self.ledgers:
            raise ArgumentError(f"`layer` must be one of {', '.join(self.ledgers)}; got {layer!r}.")
        calls = call_layers(pl_module, {layer: self.ledgers[layer].module}, inputs, forward_fn)
        return self.ledgers[layer].explain(calls.inputs[layer])

    def influence(
        self,
        pl_module: "pl.LightningModule",
        inputs: Any,
        top_k: int,
        direction: Direction | Tensor | None,
        *,
        targets: Tensor | None,
        forward_fn: Callable[[Any, Any], Any] | None,
    ) -> Influence:
        """The training samples that pushed the outputs for inputs of the model most, from the update log."""
        if self.log_folder is None:
            raise ArgumentError(
                "`update_log` must be given for the influence on any input, for example True; got False. Without it,"
                " `probe_influence` knows the first samples of the probe set, if `influence_every_n_steps` is given."
            )
        if self._log is not None:
            self._log.flush()
        log = load_update_log(self.log_folder)
        return log.influence(pl_module, inputs, top_k, direction, targets=targets, forward_fn=forward_fn)

    def finish(self, trainer: "pl.Trainer", device: torch.device, class_names: Sequence[str] | None) -> None:
        """Write the tables and the log, because training ended as planned. Call it on every rank."""
        # Collective operations come first, because the disk may fail on one of the ranks.
        if self.tracking is not None:
            self.tracking.write_samples(trainer, self.name, device, class_names)
        if self._log is not None:
            self._log.close()

    def close(self) -> None:
        """Remove the hooks from layers and optimizers. Ledgers, tables and scores stay."""
        if self._steps is not None:
            self._steps.remove()
        if self._log is not None:
            self._log.close()
        self._steps = None
        self._log = None
        self._ids = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds the ledgers and tables, but does not follow the training of the original.
        return vars(self) | {"_steps": None, "_log": None, "_ids": None}

    def state_dict(self, trainer: "pl.Trainer | None" = None) -> dict[str, Any]:
        """What a resumed run needs; with a trainer, the tables of all ranks, and it must be called on every rank."""
        if self._log is not None:
            self._log.flush()
        return {
            "num_steps": self.num_steps,
            "classes": self.classes.state_dict(),
            "ledgers": {layer: ledger.state_dict() for layer, ledger in self.ledgers.items()},
            "tracking": {} if self.tracking is None else self.tracking.state_dict(trainer),
            "step_scores": {layer: scores.state_dict() for layer, scores in self.step_scores.items()},
            "update_log": {} if self._log is None else self._log.state_dict(),
        }
