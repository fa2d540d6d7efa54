"""Support for both names of Lightning, `pytorch_lightning` and `lightning`, which have separate class hierarchies.

The callbacks and the exception of this package derive from the classes of both.
"""

from typing import TYPE_CHECKING

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException as _FabricMisconfiguration

MISCONFIGURATIONS: tuple[type[Exception], ...] = (_FabricMisconfiguration,)
"""The exceptions with which either Lightning reports wrong arguments."""

if TYPE_CHECKING:
    Callback = pl.Callback
    MisconfigurationException = _FabricMisconfiguration
else:
    try:
        import lightning.pytorch
        from lightning.fabric.utilities.exceptions import MisconfigurationException as _OtherMisconfiguration
    except ImportError:
        Callback = pl.Callback
        MisconfigurationException = _FabricMisconfiguration
    else:
        MISCONFIGURATIONS = (_FabricMisconfiguration, _OtherMisconfiguration)

        class Callback(pl.Callback, lightning.pytorch.Callback):
            """A callback that either trainer accepts."""

        class MisconfigurationException(*MISCONFIGURATIONS):
            """An exception that code for either Lightning catches."""
