"""`PrintSummary`: the main measures of a run as a table, at the end of a fit."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_neuro.callback import MetricCallback
from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.summary import HEADER


class PrintSummary(pl.Callback):
    """Prints, at the end of a fit, the main measures of all callbacks of this package with their meanings.

    Args:
        layer: Name of the layer whose measures are printed; default: the last layer of each callback.

    Raises:
        ArgumentError: If `layer` is not a string.

    Example:
        >>> from lightning_neuro import NeuronCommunities
        >>> callbacks = [NeuronCommunities(), PrintSummary()]
    """

    def __init__(self, layer: str | None = None) -> None:
        require(layer is None or isinstance(layer, str), "layer", "be the name of a layer or None", layer)
        super().__init__()
        self.layer = layer

    @rank_zero_only
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Print the table."""
        print(summary_of(trainer.callbacks, self.layer))  # type: ignore[attr-defined]


def summary_of(callbacks: Sequence[Any], layer: str | None = None) -> str:
    """The tables of all callbacks of this package below each other; those without the layer are left out.

    Args:
        callbacks: Any callbacks, such as `trainer.callbacks`.
        layer: Name of a layer; default: the last layer of each callback.
    """
    found = []
    for callback in callbacks:
        if isinstance(callback, MetricCallback):
            try:
                found.append(callback.summary(layer))
            except ArgumentError:  # not one of its layers
                continue
    return "\n".join([HEADER, *filter(None, found)])
