"""When figures are drawn: at the start, at the end, and in between as long as drawing costs next to nothing."""

from typing import Literal

import pytorch_lightning as pl

Figures = Literal["auto", "always", "never"]

# Drawing may take this share of a run's time, besides the first and the last figures.
SHARE = 0.02
# TensorBoard keeps so many images of a tag and throws the others away.
KEPT_IMAGES = 10


def draws_in_between(*, elapsed: float, drawn: float, expected: float, progress: float, last_progress: float) -> bool:
    """Whether to draw at an evaluation that is neither the first nor the last.

    Args:
        elapsed: Seconds since the start of the fit.
        drawn: Seconds for which the callbacks have drawn so far.
        expected: Seconds that drawing will take now.
        progress: Fraction of the training that is over; see `progress_of`.
        last_progress: The same when figures were drawn last.

    Returns:
        Whether drawing stays below 2 % of the time, and the logger will keep the figures.

    Example:
        >>> draws_in_between(elapsed=100, drawn=1.0, expected=0.5, progress=0.5, last_progress=0.2)
        True
    """
    # Slightly less than a tenth, because .3 - .2 is.
    return drawn + expected <= SHARE * elapsed and progress - last_progress >= 1 / KEPT_IMAGES - 1e-9


def progress_of(trainer: "pl.Trainer") -> float:
    """Fraction of the training that is over, counted in steps or epochs, whichever ends it first.

    Without an end, every step counts as a tenth, so that figures are limited by their cost only.
    """
    over = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
    if (trainer.max_epochs or -1) > 0:
        assert trainer.max_epochs is not None
        batches = trainer.num_training_batches
        within = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        part = within / batches if 0 < batches < float("inf") else 0.0
        over.append((trainer.current_epoch + part) / trainer.max_epochs)
    return max(over) if over else trainer.global_step / KEPT_IMAGES
