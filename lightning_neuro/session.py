"""The evaluations of one run: which callbacks are due, and one pass over the probe set for all that share a probe.

An evaluation reads top-down in `Session.evaluate`: every callback that is due prepares itself, the model runs once over
each probe set and every batch is passed to the callbacks of that probe, and then each callback computes and logs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import pytorch_lightning as pl

from lightning_neuro.compat import MISCONFIGURATIONS
from lightning_neuro.isolation import isolated_random_state, without_inference_mode
from lightning_neuro.probe import Probe
from lightning_neuro.probe_pass import ProbeBatch, ProbePass
from lightning_neuro.ranks import agreed, explain

if TYPE_CHECKING:
    from lightning_neuro.scheduled_callback import ScheduledCallback

EventKind = Literal["start", "step", "epoch", "validate"]


@dataclass(frozen=True)
class Event:
    """A moment at which callbacks evaluate.

    Attributes:
        kind: Before the first training step, after a step, at the end of an epoch, or in `trainer.validate`.
        epoch: The trainer's current epoch.
        step: The trainer's global step.
    """

    kind: EventKind
    epoch: int
    step: int


class Session:
    """The callbacks of one trainer that take part in evaluations, and the passes they share."""

    def __init__(self) -> None:
        self.callbacks: list[ScheduledCallback] = []
        self.passes: dict[Probe, ProbePass] = {}

    def join(self, callback: "ScheduledCallback", pl_module: "pl.LightningModule") -> ProbePass:
        """Register a callback, and find the layers if it needs any.

        Returns:
            The pass of its probe, shared by all callbacks with an equal probe.
        """
        if callback not in self.callbacks:
            self.callbacks.append(callback)
        probe_pass = self.passes.setdefault(callback.probe, ProbePass(callback.probe))
        if callback.needs_layers and not probe_pass.layers:
            probe_pass.resolve_layers(pl_module)
        return probe_pass

    def leave(self, callback: "ScheduledCallback") -> None:
        """Unregister a callback. With the last one of a probe, its samples and references to the model are released."""
        if callback in self.callbacks:
            self.callbacks.remove(callback)
        if all(other.probe != callback.probe for other in self.callbacks):
            self.passes.pop(callback.probe, None)

    def evaluate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", kind: EventKind) -> None:
        """Evaluate all callbacks that are due; the first callback whose hook runs does this for all of them."""
        event = Event(kind, trainer.current_epoch, trainer.global_step)
        due = [callback for callback in self.callbacks if callback.is_due(event)]
        with isolated_random_state(pl_module.device), without_inference_mode():
            for probe_pass in self.passes.values():
                group = [callback for callback in due if callback.probe == probe_pass.probe]
                if group:
                    _evaluate_group(trainer, pl_module, event, probe_pass, group)


def _evaluate_group(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    event: Event,
    probe_pass: ProbePass,
    group: Sequence["ScheduledCallback"],
) -> None:
    for callback in group:
        callback.begin_evaluation(trainer, pl_module, event)

    def show(batch: ProbeBatch) -> None:
        for callback in group:
            callback.show(batch)

    complete = True
    try:
        agreed(trainer, lambda: probe_pass.run(trainer, pl_module, show))
    except Exception as error:
        wrong_argument = isinstance(error, MISCONFIGURATIONS) and event.kind in ("start", "validate")
        if wrong_argument or any(callback.on_error == "raise" for callback in group):
            raise
        names = ", ".join(callback.name for callback in group)
        probe_pass.warn_once(f"{names}: no values, because the pass over the probe set failed. {explain(error)}")
        complete = False
    for callback in group:
        callback.end_evaluation(trainer, pl_module, complete=complete)


_SESSIONS: "WeakKeyDictionary[pl.Trainer, Session]" = WeakKeyDictionary()


def session_of(trainer: "pl.Trainer") -> Session:
    """The session of a trainer, which is owned by no callback and released together with the trainer."""
    return _SESSIONS.setdefault(trainer, Session())
