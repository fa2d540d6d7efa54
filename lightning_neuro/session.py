"""The evaluations of one run: which callbacks are due, and one pass over the probe set for all that share a probe.

An evaluation reads top-down in `Session.evaluate`: every callback that is due prepares itself, the model runs once over
each probe set and every batch is passed to the callbacks of that probe, and then each callback computes and logs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_neuro.artefacts.results_writer import ResultsWriter
from lightning_neuro.checks import NothingToDoError
from lightning_neuro.compat import MISCONFIGURATIONS
from lightning_neuro.cost import cost_report
from lightning_neuro.isolation import isolated_random_state, why_no_replay, without_inference_mode
from lightning_neuro.model_runner import GuessError
from lightning_neuro.module_state import has_lazy_weights
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_pass import NoReplayError, ProbePass
from lightning_neuro.ranks import FailedOnAnotherRankError, agreed, explain
from lightning_neuro.threads import threads_for

if TYPE_CHECKING:
    from lightning_neuro.scheduled_callback import ScheduledCallback

EventKind = Literal["start", "step", "validation", "epoch", "validate"]


@dataclass(frozen=True)
class Event:
    """A moment at which callbacks evaluate.

    Attributes:
        kind: Before the first training step, after a step, at the end of a validation in a fit, at the end of an epoch
            without validation, or in `trainer.validate`.
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
        # In the order of the trainer, in which Lightning calls them.
        self._in_order: list[ScheduledCallback] = []
        self.passes: dict[Probe, ProbePass] = {}
        self.results = ResultsWriter()
        self._start = time.perf_counter()

    def join(self, callback: "ScheduledCallback", pl_module: "pl.LightningModule") -> ProbePass:
        """Register a callback, and find the layers if it needs any.

        Returns:
            The pass of its probe, shared by all callbacks with an equal probe.
        """
        if not self.callbacks:
            self.results = ResultsWriter()
            self._start = time.perf_counter()
        if callback not in self.callbacks:
            self.callbacks.append(callback)
            self._in_order.append(callback)
        probe_pass = self.passes.setdefault(callback.probe, ProbePass(callback.probe))
        probe_pass.join(pl_module, needs_layers=callback.needs_layers)
        return probe_pass

    def leave(self, callback: "ScheduledCallback") -> None:
        """Unregister a callback. With the last one of a probe, its samples and references to the model are released."""
        if callback in self.callbacks:
            self.callbacks.remove(callback)
            self._in_order.remove(callback)
        if all(other.probe != callback.probe for other in self.callbacks):
            self.passes.pop(callback.probe, None)

    @property
    def elapsed(self) -> float:
        """Seconds since the first callback has joined, at the start of a fit."""
        return time.perf_counter() - self._start

    def report_cost(self, callback: "ScheduledCallback") -> None:
        """Note what the callbacks have cost in this fit; the last that Lightning calls says it."""
        for one in self.callbacks:
            one.cost.seconds["pass"] = self.passes[one.probe].cost.total
            one.cost.fit_seconds = self.elapsed
        if self._in_order and callback is self._in_order[-1]:
            costs = {one.name: one.cost for one in self.callbacks}
            rank_zero_info(cost_report(costs, [one.cost for one in self.passes.values()], self.elapsed))

    def acts_for_all(self, callback: "ScheduledCallback") -> bool:
        """Whether a callback passes Lightning's events on to the passes, as the first that Lightning calls."""
        return bool(self._in_order) and self._in_order[0] is callback

    def begin_loop(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """A validation loop begins."""
        kind: EventKind = "validation"
        if trainer.state.fn == "validate" or trainer.sanity_checking:
            kind = "validate" if trainer.state.fn == "validate" else "start"
        event = Event(kind, trainer.current_epoch, trainer.global_step)
        for probe_pass, group in self._groups(event):
            if probe_pass.source.trace is not None and not _have_layers(pl_module, probe_pass, group):
                continue
            probe_pass.source.begin_loop(trainer, pl_module, due=any(callback.rides for callback in group))

    def begin_batch(self, pl_module: "pl.LightningModule", batch: Any, number: int) -> None:
        """A validation step begins."""
        for probe_pass in self.passes.values():
            with probe_pass.cost.timing("pass"):
                probe_pass.source.begin_batch(pl_module, batch, number)

    def begin_training_batch(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, number: int
    ) -> None:
        """A training step begins."""
        for probe_pass in self.passes.values():
            probe_pass.source.begin_training_batch(trainer, pl_module, batch, number)

    def end_batch(self) -> None:
        """A step has ended."""
        for probe_pass in self.passes.values():
            with probe_pass.cost.timing("pass"):
                probe_pass.source.end_batch()

    def end_loop(self, trainer: "pl.Trainer") -> None:
        """A validation loop has ended."""
        with without_inference_mode():
            for probe_pass in self.passes.values():
                with probe_pass.cost.timing("pass"):
                    probe_pass.source.end_loop(trainer)

    def close(self) -> None:
        """Remove all hooks, after an exception."""
        for probe_pass in self.passes.values():
            probe_pass.source.close()

    def _groups(self, event: Event) -> list[tuple[ProbePass, list["ScheduledCallback"]]]:
        """Each pass, with its callbacks that are due."""
        due = [callback for callback in self.callbacks if callback.is_due(event)]
        return [(one, [callback for callback in due if callback.probe == one.probe]) for one in self.passes.values()]

    def evaluate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", kind: EventKind) -> None:
        """Evaluate all callbacks that are due; the first callback whose hook runs does this for all of them."""
        event = Event(kind, trainer.current_epoch, trainer.global_step)
        groups = self._groups(event)
        if any(group for _, group in groups):  # not in every training step, if the schedule counts steps
            # A small model, too, runs faster on one thread; a large one on those of the training.
            threads = threads_for(_num_weights(pl_module))
            with isolated_random_state(pl_module.device), without_inference_mode(), threads:
                for probe_pass, group in groups:
                    if group:
                        _evaluate_group(trainer, pl_module, event, probe_pass, group)
        for probe_pass, _ in groups:
            probe_pass.source.units = None


def _num_weights(model: nn.Module) -> int:
    """Number of weights, as far as they exist: those of lazy modules are made in the first pass."""
    return sum(weight.numel() for weight in model.parameters() if not is_lazy(weight))


def _evaluate_group(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    event: Event,
    probe_pass: ProbePass,
    group: Sequence["ScheduledCallback"],
) -> None:
    if not _is_ready(trainer, pl_module, event, probe_pass, group):
        return
    group = [callback for callback in group if callback.is_due(event)]  # those without layers are disabled now
    probe_pass.announce(trainer, _names(group))
    # If the model has to be run anyway, its activations serve all callbacks.
    runners = [callback for callback in group if not callback.rides]
    riders = [callback for callback in group if callback.rides]
    if reason := why_no_replay(trainer):
        for callback in runners:
            callback.warn_once("no_replay", f"{callback.name}: no values, because {reason}.")
            callback.skip_evaluation(event)
        runners = []
        if probe_pass.source.units is None:
            return
    complete = {True: True, False: True}
    for callback in runners:
        _begin(trainer, pl_module, event, callback)
    if runners or probe_pass.source.units is None:
        complete[False] = _show(trainer, pl_module, event, probe_pass, group, shown=runners, replay=True)
    if probe_pass.source.units is None:
        for callback in riders:
            callback.skip_evaluation(event)
        riders = []
    with threads_for(probe_pass.source.largest_layer):
        for callback in riders:
            _begin(trainer, pl_module, event, callback)
        if riders:
            complete[True] = _show(trainer, pl_module, event, probe_pass, group, shown=riders, replay=False)
    for callback in [callback for callback in group if callback in runners or callback in riders]:
        callback.end_evaluation(trainer, pl_module, complete=complete[callback.rides])


def _begin(trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event, callback: "ScheduledCallback") -> None:
    with callback.cost.timing("compute"):
        callback.begin_evaluation(trainer, pl_module, event)


def _have_layers(pl_module: "pl.LightningModule", probe_pass: ProbePass, group: Sequence["ScheduledCallback"]) -> bool:
    """Whether the layers are known; if the model has no default ones, the callbacks that need them are told."""
    try:
        probe_pass.find_layers(pl_module)
    except NothingToDoError as error:
        for callback in group:
            if callback.needs_layers:
                callback.report("the default layers", error)
        return False
    return True


def _is_ready(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    event: Event,
    probe_pass: ProbePass,
    group: Sequence["ScheduledCallback"],
) -> bool:
    """Whether the samples and the layers are known; if they cannot be found, the callbacks are told."""
    try:
        probe_pass.source.load(trainer, pl_module)
        is_lazy_still = event.kind == "start" and has_lazy_weights(pl_module)
        if probe_pass.samples is None or is_lazy_still:
            if event.kind == "start":
                why = "the weights of lazy modules do not exist" if is_lazy_still else "the samples are not known"
                rank_zero_info(f"{_names(group)}: no values before training, because {why} yet.")
                for callback in group:
                    callback.skip_evaluation(event)
            return False
        if not probe_pass.reader.is_ready:
            agreed(trainer, lambda: probe_pass.see_calls(trainer, pl_module))
    except Exception as error:
        for callback in group:
            callback.skip_evaluation(event)
        _report(trainer, event, probe_pass, group, error)
        return False
    return _have_layers(pl_module, probe_pass, group) or any(not callback.needs_layers for callback in group)


def _show(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    event: Event,
    probe_pass: ProbePass,
    group: Sequence["ScheduledCallback"],
    *,
    shown: Sequence["ScheduledCallback"],
    replay: bool,
) -> bool:
    """Show all batches to some of the callbacks; returns whether this succeeded on all ranks."""

    def show(batch: ProbeBatch) -> None:
        for callback in shown:
            with callback.cost.timing("compute"):
                callback.show(batch)

    units = probe_pass.source.units
    start, before = time.perf_counter(), sum(callback.cost.total for callback in shown)
    try:
        agreed(trainer, lambda: probe_pass.run(trainer, pl_module, show, replay=replay, keep_units=True))
    except Exception as error:
        probe_pass.source.units = units  # as before, also where the pass succeeded, because it failed on another rank
        _report(trainer, event, probe_pass, group if units is None else shown, error)
        return False
    finally:
        in_callbacks = sum(callback.cost.total for callback in shown) - before
        probe_pass.cost.add("pass", time.perf_counter() - start - in_callbacks)
    return True


def _report(
    trainer: "pl.Trainer",
    event: Event,
    probe_pass: ProbePass,
    group: Sequence["ScheduledCallback"],
    error: Exception,
) -> None:
    if isinstance(error, (GuessError, FailedOnAnotherRankError)) and probe_pass.source.forget_guess(trainer):
        rank_zero_info(f"{_names(group)}: no values yet, because it is not known how the model is called.")
        return
    if isinstance(error, NothingToDoError):
        for callback in group:
            callback.report("the pass over the probe set", error)
        return
    if isinstance(error, NoReplayError):
        probe_pass.warn_once(f"{_names(group)}: no values, because {error}.")
        return
    wrong_argument = isinstance(error, MISCONFIGURATIONS) and event.kind in ("start", "validate")
    if wrong_argument or any(callback.on_error == "raise" for callback in group):
        raise error
    probe_pass.warn_once(f"{_names(group)}: no values, because the pass over the probe set failed. {explain(error)}")


def _names(group: Sequence["ScheduledCallback"]) -> str:
    return ", ".join(callback.name for callback in group)


_SESSIONS: "WeakKeyDictionary[pl.Trainer, Session]" = WeakKeyDictionary()


def session_of(trainer: "pl.Trainer") -> Session:
    """The session of a trainer, which is owned by no callback and released together with the trainer."""
    return _SESSIONS.setdefault(trainer, Session())
