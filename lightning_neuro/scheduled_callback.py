"""When callbacks evaluate: Lightning's hooks become events of the session; failures are reported, not raised."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Literal, TypeVar, get_args

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_neuro import loggers
from lightning_neuro.checks import ArgumentError, as_globs, check_choice, check_name, require
from lightning_neuro.compat import MISCONFIGURATIONS, Callback
from lightning_neuro.cost import Cost
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.isolation import why_off
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.ranks import agreed, explain
from lightning_neuro.session import Event, session_of

T = TypeVar("T")

OnError = Literal["warn", "raise"]


class ScheduledCallback(Callback):
    """Takes part in the evaluations of a run: the part of `MetricCallback` that implements Lightning's hooks.

    Args:
        probe: Selects the samples, the layers and the schedule.
        name: First part of every key.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.

    Attributes:
        cost: What the callback has cost in the current or last fit.

    Raises:
        ArgumentError: If an argument is invalid.
    """

    charts: Mapping[str, tuple[str, ...]] = {}
    """Title -> measures shown in one chart of TensorBoard's Custom Scalars."""
    needs_layers: ClassVar[bool] = True
    """Whether the method uses the probe's layers."""
    rides: ClassVar[bool] = True
    """Whether the activations of the validation loop's own forward passes are enough; else the model is run again."""
    curves: tuple[str, ...] | None = None
    """Measures that are logged unless `log_scalars` is given; None: all of them."""
    follows_training: bool = False
    """Whether the method needs training steps, so that there is nothing to evaluate in `trainer.validate`."""
    run_state: ClassVar[tuple[str, ...]] = ("scalars", "initial", "last_epoch", "last_step")
    """Names of attributes that belong to the run: saved in checkpoints and restored on resume."""

    def __init__(
        self,
        probe: Probe | None,
        *,
        name: str,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: OnError = "warn",
    ) -> None:
        require(isinstance(probe, (Probe, type(None))), "probe", "be a lightning_neuro.Probe or None", probe)
        check_name(name)
        check_choice("on_error", on_error, ("warn", "raise"))
        check_choice("figures", figures, get_args(Figures))
        self.probe = Probe() if probe is None else probe
        self.name = name
        self.prog_bar = as_globs("prog_bar", prog_bar)
        self.log_scalars = None if log_scalars is None else as_globs("log_scalars", log_scalars)
        self.figures: Figures = figures
        self.on_error = on_error
        self._probe_pass: ProbePass | None = None
        self._keeps_state = False
        self.start_run()

    def start_run(self) -> None:
        """Called at construction and before a fit from step 0: reset the state of an earlier run.

        At construction it runs inside the constructor of the base class, before a subclass has set its own attributes.
        """
        self.scalars: dict[str, float] = {}
        self.initial: dict[str, float] = {}
        self.cost = Cost()
        self.event: Event | None = None
        self.last_epoch = -1
        self.last_step = -1
        self._warned: set[str] = set()

    def release(self) -> None:
        """Called at the end of a run and after an exception: release the model and everything large."""
        self._probe_pass = None
        self._keeps_state = False

    def shown(self, trainer: "pl.Trainer") -> dict[str, float]:
        """The known values that are logged."""
        asked = [*self.prog_bar, *(self.log_scalars or ()), *loggers.monitored(trainer)]
        usual = self.curves if self.log_scalars is None else ()
        measures = None if usual is None else {*usual, *(f"{name}_initial" for name in usual)}
        return {
            key: value
            for key, value in self.scalars.items()
            if measures is None or key.split("/")[1] in measures or loggers.matches(key, asked)
        }

    def layers_of(self, measure: str) -> list[str]:
        """The layers for which a measure has keys; each gets its own chart."""
        return []

    @property
    def probe_pass(self) -> ProbePass:
        """The passes over the probe set in the current run; available from `on_fit_start` on."""
        if self._probe_pass is None:
            raise RuntimeError(f"{type(self).__name__} has no probe set, because it is only available during a run.")
        return self._probe_pass

    # Failures

    def attempt(self, trainer: "pl.Trainer", what: str, compute: Callable[[], T]) -> T | None:
        """Compute something on all ranks; if it fails on one, it is reported and None is returned on all of them."""
        try:
            return agreed(trainer, compute)
        except Exception as error:
            self.report(what, error)
            return None

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Report an error in the block instead of letting it end the run. Not for collective operations."""
        try:
            yield
        except Exception as error:
            self.report(what, error)

    def report(self, what: str, error: Exception) -> None:
        """Warn once that a part of the analysis failed, or raise if `on_error="raise"`.

        Invalid arguments always raise up to and including the first evaluation. Later, they do not end the run.
        """
        begun = self.event is not None and self.event.kind in ("step", "validation", "epoch")
        if self.on_error == "raise" or (isinstance(error, MISCONFIGURATIONS) and not begun):
            raise error
        self.warn_once(f"{what}/error", f"{self.name}: the analysis of {what} failed and is left out. {explain(error)}")

    def warn_once(self, cause: str, message: str) -> None:
        """Warn, once per cause in a run."""
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(message)

    # What the session calls in an evaluation

    def is_due(self, event: Event) -> bool:
        """Whether this callback evaluates at this event."""
        if event == self.event:
            return False
        if event.kind == "start":
            return not self.scalars
        if event.kind == "step":
            return self.probe.due_at_step(event.step, self.last_step)
        if event.kind == "validation":
            return self.probe.due_at_epoch(event.epoch)
        if event.kind == "epoch":
            return event.epoch != self.last_epoch and self.probe.due_at_epoch(event.epoch)
        return self.probe.source != "train" and not self.follows_training  # `trainer.validate` has neither

    def begin_evaluation(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> None:
        """Prepare for a pass over the probe set."""
        self._note(event)

    def skip_evaluation(self, event: Event) -> None:
        """Leave out an evaluation, because the pass over the probe set failed."""
        self._note(event)

    def _note(self, event: Event) -> None:
        self.event = event
        self.last_step = event.step
        if event.kind in ("validation", "epoch"):
            self.last_epoch = event.epoch

    def show(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass."""

    def end_evaluation(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *, complete: bool) -> None:
        """Compute and log; `complete` is False if the pass failed on some rank."""

    def end_training(self, trainer: "pl.Trainer") -> None:
        """Called on all ranks at the end of a fit."""

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        """Identifies the callback in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Reset the state of an earlier run; raise an error if two callbacks have the same name."""
        self.event = None
        self._keeps_state = stage != "fit"
        if stage == "fit" and trainer.global_step == 0:
            self.start_run()
        for other in _ours(trainer):
            if other is self:
                break
            if other.name == self.name:
                raise ArgumentError(
                    f"`name` must differ between callbacks; got {self.name!r} for both {type(other).__name__} and"
                    f" {type(self).__name__}."
                )

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers, so that a wrong name raises an error before the first step."""
        self.cost = Cost()
        self._join(trainer, pl_module)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Evaluate the untrained network; after a resume, log the last values again so that callbacks find them."""
        if reason := why_off(trainer):
            rank_zero_warn(f"{type(self).__name__} is disabled, because {reason}.")
            return
        if self.scalars and self.event is None:
            loggers.log_scalars(trainer, pl_module, self.shown(trainer), prog_bar=self.prog_bar, moment="never")
        else:
            session_of(trainer).evaluate(trainer, pl_module, "start")
        for argument, patterns in (("prog_bar", self.prog_bar), ("log_scalars", self.log_scalars or ())):
            for pattern, near in loggers.unmatched(patterns, self.scalars).items():
                sentence = (
                    f"`{argument}` has {pattern!r}, which matches no key of {type(self).__name__}. Nearest: {near}"
                )
                self.warn_once(f"{argument}/{pattern}", sentence)
        self._log_layout(trainer)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Take samples from the batch, if the probe set cannot be found otherwise."""
        session = session_of(trainer)
        if session.acts_for_all(self):
            session.begin_training_batch(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if the schedule counts steps and an evaluation is due."""
        session = session_of(trainer)
        if session.acts_for_all(self):
            session.end_batch()
        if self.probe.every_n_steps is not None and not why_off(trainer):
            session.evaluate(trainer, pl_module, "step")

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers for `trainer.validate`, and prepare to take activations in the loop."""
        if trainer.state.fn == "validate":
            self._join(trainer, pl_module)

    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take activations in the step, if the batch holds samples of the probe set."""
        session = session_of(trainer)
        if session.acts_for_all(self) and dataloader_idx == 0:
            if batch_idx == 0:
                session.begin_loop(trainer, pl_module)
            session.begin_batch(pl_module, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop to take activations."""
        session = session_of(trainer)
        if session.acts_for_all(self):
            session.end_batch()

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Evaluate, so that callbacks that act after validation see the values."""
        if why_off(trainer):
            return
        session = session_of(trainer)
        if session.acts_for_all(self):
            session.end_loop(trainer)
        if trainer.state.fn == "validate" and self.probe.source == "train":
            self.warn_once("validate", f"{self.name}: no training data in `trainer.validate`, so nothing is logged.")
        elif trainer.state.fn == "validate" and self.follows_training:
            if not self.scalars:
                self.warn_once("validate", f"{self.name} follows training steps, of which `trainer.validate` has none.")
        elif trainer.state.fn == "validate":
            session.evaluate(trainer, pl_module, "validate")
        elif not trainer.sanity_checking:
            session.evaluate(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Evaluate if the epoch ended without validation."""
        if not why_off(trainer):
            session_of(trainer).evaluate(trainer, pl_module, "epoch")

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Draw the last evaluation, and say what the callbacks have cost."""
        if not why_off(trainer):
            self.end_training(trainer)
            session_of(trainer).report_cost(self)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the model, the samples and the metrics' states."""
        self._leave(trainer)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Let go of the model, the samples and the metrics' states."""
        self._leave(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue as if it had not been interrupted."""
        return {name: getattr(self, name) for name in self._all_run_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; what belongs to a fit stays as it is if a checkpoint is loaded for anything else."""
        if self._keeps_state:
            # In place, so that overrides of this method find nothing else either.
            state_dict.clear()
            state_dict.update(self.state_dict())
        for name in self._all_run_state():
            if name in state_dict:  # not in checkpoints of a version that did not have it
                setattr(self, name, deepcopy(state_dict[name]))

    def _all_run_state(self) -> list[str]:
        return [name for cls in type(self).__mro__ for name in vars(cls).get("run_state", ())]

    def _join(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not why_off(trainer):
            self._probe_pass = session_of(trainer).join(self, pl_module)

    def _leave(self, trainer: "pl.Trainer") -> None:
        session = session_of(trainer)
        session.close()
        session.leave(self)
        self.release()

    def _log_layout(self, trainer: "pl.Trainer") -> None:
        """The last of our callbacks writes the layout for all, because TensorBoard keeps only one per run."""
        if self is (ours := _ours(trainer))[-1]:
            with self.guarded("the layout of the charts"):
                charts = {our.name: loggers.multiline_charts(our.name, our.charts, our.layers_of) for our in ours}
                loggers.log_layout(trainer, charts)


def _ours(trainer: "pl.Trainer") -> list[ScheduledCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ScheduledCallback)]  # type: ignore[attr-defined]
