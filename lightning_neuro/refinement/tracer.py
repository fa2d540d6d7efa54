"""One fit's tracing: hooks, ledgers, phases and the watch over single samples, opened and closed together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_neuro import logging
from lightning_neuro.capture import uncompiled
from lightning_neuro.isolation import evaluation_mode
from lightning_neuro.refinement.explanation import RefinementExplanation
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.operators import Sources
from lightning_neuro.refinement.pfahler2021 import StepScores, StepWatch
from lightning_neuro.refinement.plan import check_memory, may_change_elements, plan_phases
from lightning_neuro.refinement.recorder import StepRecorder, find_layers
from lightning_neuro.refinement.trace import TraceWriter
from lightning_neuro.refinement.watch import SampleWatch

# More sources would make as many copies of each layer's weights.
MAX_SOURCES = 100


@dataclass(frozen=True)
class Options:
    """What to trace; see `RepresentationRefinement`."""

    layers: str | tuple[str, ...] | None
    phases: int | Sequence[int]
    samples: bool | str | tuple[str, ...]
    sample_id: str | int | None
    step_scores: bool
    influence: bool
    trace: bool | str | Path
    trace_limit: float
    memory_limit: float


class Tracer:
    """Follows the training steps of some layers.

    Args:
        options: What to trace.
        name: First part of the callback's keys, and its folder for files.
        report: Is given the layer and the error where something fails in a training step.
    """

    def __init__(self, options: Options, name: str, report: Callable[[str, Exception], None]) -> None:
        self.options = options
        self.name = name
        self.report = report
        self.ledgers: dict[str, RefinementLedger] = {}
        self.recorder: StepRecorder | None = None
        self.watch: SampleWatch | None = None
        self.writer: TraceWriter | None = None
        self.step_scores: dict[str, StepScores] = {}
        self.boundaries: list[int] = []
        self.saved: Mapping[str, Any] = {}
        self.opened = False

    def look_only(self, pl_module: "pl.LightningModule") -> None:
        """Hook the layers again after the fit, to see what they are given."""
        self.close()
        self.recorder = StepRecorder(find_layers(pl_module, self.options.layers, "layers"), {}, [], self.report)

    def attach(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers and hook them, before a compiled model's first run."""
        # Without a checkpoint, each rank goes on with what it has itself.
        self.saved, self.ledgers = self.saved or self.state_dict() | {"own": True}, {}
        self.opened = False
        self.close()
        layers = find_layers(pl_module, self.options.layers, "layers")
        watched = dict(layers)
        if isinstance(self.options.samples, (str, tuple)):
            watched |= find_layers(pl_module, self.options.samples, "samples")
        self._traced = list(layers)
        if self.options.samples or self.options.influence or self.options.trace or self.options.step_scores:
            head = self._linear(layers, "influence_every_n_steps") if self.options.influence else None
            samples = list(watched) if self.options.samples else self._traced
            limit = self.options.memory_limit
            self.watch = SampleWatch(samples, field=self.options.sample_id, head=head, memory_limit=limit)
            self.watch.ids.attach(trainer)
        self.recorder = StepRecorder(watched, {}, [self.watch] if self.watch else [], self.report)

    def open(self, trainer: "pl.Trainer", num_sources: int) -> None:
        """Open the ledgers at the weights that training starts from, and follow the optimisers."""
        self.opened = True
        recorder = self.recorder
        assert recorder is not None
        if num_sources > MAX_SOURCES:
            raise MisconfigurationException(
                f"There are {num_sources} sources, and the ledgers hold a copy of each layer's weights for each: at"
                f" most {MAX_SOURCES}. Group them, for example `sources=lambda batch: batch[1] // 10, num_sources=...`."
            )
        kept = self.saved
        num_phases, self.boundaries = plan_phases(trainer, self.options.phases)
        self.ledgers = {
            layer: RefinementLedger(recorder.layers[layer][0], num_sources=num_sources, num_phases=num_phases)
            for layer in self._traced
        }
        told = check_memory({layer: ledger.bytes for layer, ledger in self.ledgers.items()}, self.options.memory_limit)
        rank_zero_info(f"{self.name}: ledgers of {told}.")
        self._take_up(kept, trainer)
        recorder.ledgers = dict(self.ledgers)
        self.saved = {}
        recorder.elementwise = may_change_elements(trainer, trainer.lightning_module)
        recorder.world_size = trainer.world_size
        if trainer.world_size > 1:
            recorder.mean_over_ranks = lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")
        recorder.attach(trainer.optimizers)
        self._open_trace(trainer, recorder, kept)
        if self.options.step_scores:
            self._open_step_scores(trainer, recorder, kept)

    def _take_up(self, kept: Mapping[str, Any], trainer: "pl.Trainer") -> None:
        if not kept["ledgers"]:
            return
        phases = 0
        for layer, ledger in self.ledgers.items():
            if layer in kept["ledgers"]:
                try:
                    ledger.load_state_dict(kept["ledgers"][layer])
                except ValueError as error:
                    raise MisconfigurationException(
                        f"The checkpoint's ledger of layer '{layer}' does not fit `sources`, `num_sources` or `phases`:"
                        f" {error} Give the callback the arguments that it was saved with."
                    ) from error
                phases = max(phases, len(kept["ledgers"][layer]["snapshots"]))
        # What is planned now, after where training is; the phases that are over stay as they were.
        ahead = [boundary for boundary in self.boundaries if boundary > trainer.global_step]
        self.boundaries = ahead[: max(0, len(self.boundaries) - phases)]
        # A checkpoint's table is of all ranks: one of them goes on with it, or it would count more than once.
        if self.watch is not None and (kept.get("own") or trainer.global_rank == 0):
            self.watch.load_state_dict(kept["watch"])

    def _open_trace(self, trainer: "pl.Trainer", recorder: StepRecorder, kept: Mapping[str, Any]) -> None:
        if not self.options.trace:
            return
        folder: Path | None
        if isinstance(self.options.trace, (str, Path)):
            folder = Path(self.options.trace)
        elif (folder := logging.artefact_folder(trainer, self.name)) is None:
            raise MisconfigurationException(
                "`trace=True` writes beside the logs, and no logger has a folder. Say where: `trace='my/folder'`."
            )
        layers: dict[str, nn.Module] = {layer: recorder.layers[layer][0] for layer in self._traced}
        self._linear(recorder.layers, "trace")
        self.writer = TraceWriter(
            folder / "trace", layers, size_limit=int(self.options.trace_limit), rank=trainer.global_rank
        )
        if kept["trace"]:
            self.writer.load_state_dict(kept["trace"])
        recorder.observers.append(self.writer)

    def _open_step_scores(self, trainer: "pl.Trainer", recorder: StepRecorder, kept: Mapping[str, Any]) -> None:
        steps = float(trainer.estimated_stepping_batches)
        if steps == float("inf"):
            raise MisconfigurationException(
                "`mode='pfahler2021'` keeps every step's change of the weights, so it must be known how many there will"
                " be: give the trainer `max_epochs` or `max_steps`."
            )
        limit = int(self.options.memory_limit / len(self._traced))
        try:
            self.step_scores = {
                layer: StepScores(recorder.layers[layer][0], int(steps), memory_limit=limit) for layer in self._traced
            }
        except ValueError as error:
            raise MisconfigurationException(f"`mode='pfahler2021'`: {error}") from error
        for layer, scores in self.step_scores.items():
            if layer in kept["step_scores"]:
                scores.load_state_dict(kept["step_scores"][layer])
        recorder.observers.append(StepWatch(self.step_scores))

    def _linear(self, layers: Mapping[str, Sequence[nn.Module]], argument: str) -> tuple[str, nn.Module]:
        """The last traced layer; all must be linear."""
        for name in self._traced:
            if not isinstance(layers[name][0], nn.Linear):
                raise MisconfigurationException(
                    f"`{argument}` is for linear layers, and '{name}' is a {type(layers[name][0]).__name__}. Name"
                    " linear `layers`, such as the classifier head."
                )
        return self._traced[-1], layers[self._traced[-1]][0]

    # Training steps

    @property
    def num_sources(self) -> int:
        """Sources that the ledgers tell apart, without "other"."""
        return next(iter(self.ledgers.values())).num_sources

    def begin(self, trainer: "pl.Trainer", batch: Any, targets: Tensor | None, rows: Tensor) -> None:
        """A training micro-batch is about to run."""
        if self.recorder is not None and self.watch is not None:
            self.recorder.begin(self.watch.batch(trainer, batch, targets), Sources(rows, self.num_sources + 1))
        elif self.recorder is not None:
            self.recorder.begin(None, Sources(rows, self.num_sources + 1))

    def end(self, global_step: int) -> None:
        """The micro-batch is over; after so many steps, a phase may be."""
        if self.recorder is not None:
            self.recorder.end()
        while self.boundaries and global_step >= self.boundaries[0]:
            self.boundaries.pop(0)
            for ledger in self.ledgers.values():
                ledger.end_phase()

    # The end

    def explain(self, pl_module: "pl.LightningModule", inputs: Any, layer: str | None) -> RefinementExplanation:
        """Divide a layer's output on the model's own inputs; None: the last layer's."""
        layer = next(reversed(self.ledgers), "") if layer is None else layer
        if layer not in self.ledgers:
            raise ValueError(f"There is no ledger of layer {layer!r}; there are {list(self.ledgers) or 'none yet'}.")
        seen: list[Tensor] = []
        hook = self.ledgers[layer].module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            with uncompiled(), evaluation_mode(pl_module), torch.no_grad():
                pl_module(inputs)
        finally:
            hook.remove()
        if not seen:
            raise ValueError(f"Layer {layer!r} did not run on these inputs.")
        return self.ledgers[layer].explain(seen[0])

    def finish(self, trainer: "pl.Trainer", device: torch.device) -> None:
        """Training ended as planned: write what is to be kept; every rank must ask."""
        # What the ranks do together comes first: the disk may fail on one of them.
        if self.watch is not None and self.options.samples:
            self.watch.finish(trainer, self.name, device)
        if self.writer is not None:
            self.writer.close()

    def close(self) -> None:
        """Take all hooks off and leave the data loader as it was; the ledgers stay."""
        if self.recorder is not None:
            self.recorder.remove()
        if self.watch is not None:
            self.watch.close()
        if self.writer is not None:
            self.writer.close()
        self.recorder = self.writer = None

    def state_dict(self, trainer: "pl.Trainer | None" = None) -> dict[str, Any]:
        """What a resumed run needs; with a trainer, of all ranks, and every rank must ask."""
        if not self.ledgers:
            return dict(self.saved) or {"ledgers": {}, "boundaries": [], "watch": {}, "trace": {}, "step_scores": {}}
        if self.writer is not None:
            self.writer.flush()
        return {
            "ledgers": {layer: ledger.state_dict() for layer, ledger in self.ledgers.items()},
            "boundaries": list(self.boundaries),
            "watch": {} if self.watch is None else self.watch.state_dict(trainer),
            "step_scores": {layer: scores.state_dict() for layer, scores in self.step_scores.items()},
            "trace": {} if self.writer is None else self.writer.state_dict(),
        }
