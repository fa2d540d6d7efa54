"""Draws the results of a method when it is due: the part of `MetricCallback` that schedules figures."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import pytorch_lightning as pl

from lightning_neuro import loggers
from lightning_neuro.figure_schedule import draws_in_between, progress_of
from lightning_neuro.keys import Table, key_of
from lightning_neuro.ranks import of_rank_zero
from lightning_neuro.scheduled_callback import ScheduledCallback
from lightning_neuro.session import session_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

R = TypeVar("R")
History = dict[str, list[tuple[int, float]]]
"""Key -> training step and value at each evaluation."""


class DrawingCallback(ScheduledCallback, Generic[R]):
    """Draws figures of its results at the first and the last evaluation, and in between as long as it costs little.

    Attributes:
        history: Key -> training step and value at each evaluation, for the measures that the charts show.
    """

    result: dict[str, R]
    run_state: ClassVar[tuple[str, ...]] = ("history",)
    figure_step: int | None
    """The step of the evaluation to which figures belong, which may be earlier than that at which they are drawn."""

    def start_run(self) -> None:
        """Called at construction and before a fit from step 0: reset the state of an earlier run."""
        super().start_run()
        self.history: History = {}
        self._drawn_at: float | None = None
        self._left_for_later = False
        self._draw_seconds = 0.0
        self.figure_step: int | None = None

    def draw(self, results: Mapping[str, R]) -> dict[str, "Figure"]:
        """Last part of the tag -> new figure of all layers' results. Called on rank 0 if a logger accepts images."""
        return {}

    def keep_history(self, trainer: "pl.Trainer", table: Table) -> None:
        """Keep the values of an evaluation that the charts show."""
        charted = {measure for measures in self.charts.values() for measure in measures}
        if trainer.state.fn == "fit":
            step = loggers.logging_step(trainer)
            for entry, value in table.items():
                if entry.measure in charted and entry.attribute is None:
                    self.history.setdefault(key_of(self.name, entry), []).append((step, value))

    def draw_curves(self) -> dict[str, "Figure"]:
        """Last part of the tag -> figure of the charted measures of all evaluations, from the second one on."""
        from lightning_neuro.curves_plot import plot_curves

        if max(map(len, self.history.values()), default=0) < 2:
            return {}
        known = {key.split("/")[1] for key in self.history}
        charts = {title: [one for one in measures if one in known] for title, measures in self.charts.items()}
        return {
            f"curves/{measures[0]}": plot_curves(title, measures, self.history, self.name)
            for title, measures in charts.items()
            if measures
        }

    def log_figures(self, trainer: "pl.Trainer") -> None:
        """Draw and log all figures. Called on all ranks whenever they are due; only rank 0 draws."""
        loggers.log_figures(
            trainer,
            self.name,
            lambda: self.draw_curves() | self.draw(self.result),
            step=self.figure_step,
            epoch=None if self.event is None else self.event.epoch,
        )

    def draw_if_due(self, trainer: "pl.Trainer") -> None:
        """Draw the result of an evaluation, or leave it for later."""
        self.figure_step = loggers.logging_step(trainer)
        progress = progress_of(trainer)
        # Each rank has a clock of its own, and drawing may need the other ranks.
        due = of_rank_zero(trainer, self.figures != "auto" or self._is_due(trainer, progress))
        self._left_for_later = not due
        if due and self.figures != "never":
            self._draw(trainer, progress)

    def end_training(self, trainer: "pl.Trainer") -> None:
        """Draw the last result, unless it was drawn."""
        super().end_training(trainer)
        if self._left_for_later and self.result:
            self._left_for_later = False
            self._draw(trainer, progress_of(trainer))

    def release(self) -> None:
        """Called at the end of a run and after an exception: the next run begins with figures."""
        super().release()
        self._drawn_at, self._left_for_later = None, False

    def _is_due(self, trainer: "pl.Trainer", progress: float) -> bool:
        if self._drawn_at is None:
            return True
        session = session_of(trainer)
        return draws_in_between(
            elapsed=session.elapsed,
            drawn=sum(callback.cost.seconds.get("draw", 0.0) for callback in session.callbacks),
            expected=self._draw_seconds,
            progress=progress,
            last_progress=self._drawn_at,
        )

    def _draw(self, trainer: "pl.Trainer", progress: float) -> None:
        start = time.perf_counter()
        with self.cost.timing("draw"):
            self.attempt(trainer, "the figures", lambda: self.log_figures(trainer))
        self._drawn_at, self._draw_seconds = progress, time.perf_counter() - start
