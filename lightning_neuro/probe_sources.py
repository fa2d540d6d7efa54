"""Where the samples of a probe come from: the loaders of the trainer, or what the user passes."""

from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_neuro.checks import ArgumentError
from lightning_neuro.probe import Probe


def validates(trainer: "pl.Trainer") -> bool:
    """Whether the run has a validation loop with at least one batch."""
    if trainer.state.fn == "validate":
        return True
    if not trainer.enable_validation:
        return False
    given = trainer.fit_loop.epoch_loop.val_loop._data_source
    if trainer.val_dataloaders is None:
        return given.is_defined() and (given.is_module() or _first(given.instance) is not None)
    return any(trainer.num_val_batches)


def watched_loader(trainer: "pl.Trainer") -> Any:
    """The first validation loader; None if Lightning has not requested the loaders from the user's hook yet.

    The hook is not called, because a second call may return other data, or consume a stream.
    """
    loop = _validation_loop(trainer)
    loaders = loop._combined_loader
    if loaders is None:
        given = loop._data_source
        loaders = None if given.is_module() else given.instance
    return loaders if _is_combined(loaders) else _first(loaders)


def _validation_loop(trainer: "pl.Trainer") -> Any:
    return trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop


def _is_combined(loaders: Any) -> bool:
    """Whether each batch is made of those of several loaders, so that no single loader can give it."""
    return _is_several(loaders) and loaders._mode != "sequential"


def _is_several(loaders: Any) -> bool:
    """Whether this is a `CombinedLoader`, of either of Lightning's namespaces."""
    return hasattr(loaders, "flattened") and hasattr(loaders, "_mode")


def find_source(trainer: "pl.Trainer", probe: Probe, *, quiet: bool = False) -> Any:
    """The loader, dataset or batches from which samples can be loaded; None if Lightning has not requested them yet.

    Several loaders whose batches are combined are returned as they are: from them, nothing can be loaded by index.

    Raises:
        ArgumentError: If the trainer has no such data.
    """
    if not isinstance(probe.source, str):
        return probe.source
    if probe.source == "val" and validates(trainer):
        return watched_loader(trainer)
    if probe.source == "val" and not quiet:
        rank_zero_info("There is no validation data, so the probe set is taken from the training data.")
    found = trainer.train_dataloader
    if not _is_combined(found) and not isinstance(found, (list, tuple, dict)):  # which Lightning combines, too
        found = _first(found)
    if found is None and trainer.state.fn != "fit" and not quiet:
        raise ArgumentError(
            f"The trainer has no {probe.source} data to take the probe set from. Pass `Probe(source=...)`."
        )
    return found


def _first(loaders: Any) -> Any:
    """The first of one or several loaders; None without any."""
    if _is_several(loaders):
        loaders = loaders.flattened
    while isinstance(loaders, (list, tuple, dict)) and len(loaders) > 0:
        loaders = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders[0]
    return None if isinstance(loaders, (list, tuple, dict)) else loaders


def several_loaders(trainer: "pl.Trainer") -> int:
    """Number of validation loaders."""
    loaders = _validation_loop(trainer)._combined_loader
    if _is_combined(loaders):
        return 1
    if _is_several(loaders):
        return len(loaders.flattened)
    return len(loaders) if isinstance(loaders, (list, tuple, dict)) else int(loaders is not None)
