"""Support for both names of Lightning, `pytorch_lightning` and `lightning`, which have separate class hierarchies."""

import importlib.util
from typing import TYPE_CHECKING

import pytorch_lightning as pl

if TYPE_CHECKING or importlib.util.find_spec("lightning") is None:
    Callback = pl.Callback
else:
    import lightning.pytorch

    class Callback(pl.Callback, lightning.pytorch.Callback):
        """A callback that either trainer accepts."""
