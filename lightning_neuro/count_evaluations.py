"""EarlyStopping once per evaluation of a callback instead of once per validation or epoch."""

from typing import Any

import pytorch_lightning as pl

from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.compat import Callback
from lightning_neuro.scheduled_callback import ScheduledCallback


class CountEvaluations(Callback):
    """Lets EarlyStopping check its value once after each evaluation, so that `patience` counts evaluations.

    Alone, EarlyStopping checks after each validation or at the end of each epoch. If the callback that logs the value
    evaluates less often (`Probe(every_n_epochs=5)`), the value does not change in between, and `patience` is used up by
    one old value. If it evaluates more often (`Probe(every_n_steps=100)`), values are passed over. Where every
    validation comes with an evaluation, which is the default, this class is not needed.

    Args:
        stop: Lightning's EarlyStopping, or a class derived from it. Its `monitor` is a key of a callback of this
            package. `check_on_train_epoch_end` has no effect.

    The value before training is not counted. An evaluation in which the value is undefined counts as one without
    improvement. If it is listed before the callback that logs the value, it may stop one step later.

    Attributes:
        stop: The given callback, with its `best_score`, `stopped_epoch` and so on.

    Raises:
        ArgumentError: If `stop` has no `monitor`, at construction. Before the first step: if no callback of the trainer
            logs the key.

    Example:
        >>> from pytorch_lightning.callbacks import EarlyStopping
        >>> from lightning_neuro import CountEvaluations, ObserverProbes, Probe
        >>> observers = ObserverProbes(Probe(every_n_epochs=5))
        >>> stop = EarlyStopping("observers/balanced_accuracy", mode="max", patience=3)
        >>> callbacks = [observers, CountEvaluations(stop)]  # stops after 15 epochs without improvement, not after 3
    """

    def __init__(self, stop: Any) -> None:
        require(isinstance(getattr(stop, "monitor", None), str), "stop", "be an EarlyStopping", stop)
        self.stop = stop
        self.monitor: str = stop.monitor  # what is monitored is always logged
        self._watched: ScheduledCallback | None = None
        self._seen: object = None

    @property
    def state_key(self) -> str:
        """Identifies the callback in a checkpoint."""
        return f"{type(self).__qualname__}({self.stop.state_key})"

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Find the callback that logs the value."""
        self.stop.setup(trainer, pl_module, stage)
        name = self.monitor.split("/")[0]
        ours = [one for one in trainer.callbacks if isinstance(one, ScheduledCallback)]  # type: ignore[attr-defined]
        self._watched, self._seen = next((one for one in ours if one.name == name), None), None
        if stage == "fit" and self._watched is None:
            names = ", ".join(repr(one.name) for one in ours) or "none"
            raise ArgumentError(
                f"`stop` must monitor a key of a callback in the trainer; got {self.monitor!r}, and the names of the"
                f" callbacks are: {names}. For other keys, use EarlyStopping alone."
            )

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *args: Any) -> None:
        """Check after an evaluation in the middle of an epoch."""
        self._check(trainer, pl_module)

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Check after an evaluation with a validation."""
        self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Check after an evaluation at the end of an epoch."""
        self._check(trainer, pl_module)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let go of the other callback."""
        self._watched = None

    def state_dict(self) -> dict[str, Any]:
        """The state of the given callback."""
        state: dict[str, Any] = self.stop.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the given callback."""
        self.stop.load_state_dict(state_dict)

    def _check(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        event = None if self._watched is None else self._watched.event
        if event is None or event.kind == "start" or event == self._seen:
            return
        self._seen = event
        # By its arguments, one of the two checks and the other does nothing.
        self.stop.on_validation_end(trainer, pl_module)
        self.stop.on_train_epoch_end(trainer, pl_module)
