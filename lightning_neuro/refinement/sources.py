"""Whose samples are in a batch: classes, or whatever the user derives from it, as rows of the ledgers."""

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_neuro.arguments import check_count
from lightning_neuro.probe import Probe
from lightning_neuro.samples import describe

Sourcing = str | Callable[[Any], Any]


def check_sources(sources: Any, num_sources: Any) -> None:
    """Refuse what does not say whose samples are whose."""
    if sources != "class" and not callable(sources):
        raise MisconfigurationException(f"`sources` must be 'class' or a function of the batch; got {sources!r}.")
    if num_sources is not None:
        check_count("num_sources", num_sources)
    elif sources != "class":
        raise MisconfigurationException("`sources` is a function, so say with `num_sources` how many there are.")


def count_classes(probe: Probe, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> int:
    """How many classes the probe's samples have."""
    if num_classes := probe.count_classes(trainer, pl_module):
        return num_classes
    raise MisconfigurationException(
        "RepresentationRefinement needs a class label (a whole number) for each sample, and the probe finds none. Say"
        " where they are with `Probe(target_fn=lambda batch: ...)`, or what else the sources of the samples are with"
        " `sources=` and `num_sources=`."
    )


def rows_of(batch: Any, targets: Tensor | None, sources: Sourcing, num_sources: int) -> Tensor:
    """Each sample's row in the ledgers, (N,); the last, "other", for those with no source of their own."""
    rows = sources(batch) if callable(sources) else targets
    if rows is None:
        return torch.full((_length(batch) or 1,), num_sources)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point():
        raise ValueError(f"`sources` must return (N,) whole numbers; it returned {describe(rows)}.")
    rows = rows.long()
    return torch.where((rows >= 0) & (rows < num_sources), rows, num_sources)


def _length(batch: Any) -> int | None:
    """The first dimension of the first tensor in a batch of any kind."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((length for part in batch if (length := _length(part)) is not None), None)
    return batch.shape[0] if isinstance(batch, Tensor) and batch.ndim else None
