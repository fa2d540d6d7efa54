"""The two names under which Lightning is installed, `pytorch_lightning` and `lightning`: different class trees."""

import importlib.util
from typing import TYPE_CHECKING

import pytorch_lightning as pl

if TYPE_CHECKING or importlib.util.find_spec("lightning") is None:
    Callback = pl.Callback
else:
    import lightning.pytorch

    class Callback(pl.Callback, lightning.pytorch.Callback):
        """A callback that either trainer accepts."""
