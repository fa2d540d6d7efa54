"""The source of each sample in a batch (its class, or what the user derives from the batch), as a row of a ledger."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_neuro.batches import BatchField, batch_length, read_field
from lightning_neuro.checks import ArgumentError, describe

# Each source costs one more copy of the weights of each layer.
MAX_SOURCES = 100


@dataclass(frozen=True, eq=False)
class Sources:
    """The source of each sample of a batch.

    Attributes:
        rows: (B,) int64, in 0 .. num - 1.
        num: Number of sources.
    """

    rows: Tensor
    num: int

    @cached_property
    def counts(self) -> Tensor:
        """Number of samples of each source, (num,) float64 (float32 on devices without it)."""
        ones = torch.ones(len(self.rows), dtype=ledger_dtype(self.rows.device), device=self.rows.device)
        return ones.new_zeros(self.num).index_add_(0, self.rows, ones)

    @cached_property
    def one_hot(self) -> Tensor:
        """(B, num) bool: whether a sample is of a source. Unlike torch's function, it reads nothing on the host."""
        return self.rows[:, None] == torch.arange(self.num, device=self.rows.device)

    @cached_property
    def members(self) -> dict[int, Tensor]:
        """Source -> positions of its samples in the batch. Reads the labels on the host."""
        order = torch.argsort(self.rows, stable=True)
        sizes = torch.bincount(self.rows, minlength=self.num).tolist()
        return {source: part for source, part in enumerate(torch.split(order, sizes)) if len(part)}


def ledger_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_num_sources(num_sources: int) -> None:
    """Require between 1 and 100 sources.

    Raises:
        ArgumentError: If the probe set has no class labels (0 sources), or there are more than 100.
    """
    if num_sources == 0:
        raise ArgumentError(
            "RepresentationRefinement needs an integer class label for each sample, and none were found in the probe"
            " set. Pass `Probe(target_fn=...)`, or define other sources with `source_fn=` and `num_sources=`."
        )
    if num_sources > MAX_SOURCES:
        raise ArgumentError(
            f"`num_sources` must be at most {MAX_SOURCES}, because the ledgers hold a copy of the weights of each layer"
            f" for each source; got {num_sources} sources. Group them, for example with"
            " `source_fn=lambda batch: batch[1] // 10` and the number of groups."
        )


def source_rows(
    batch: Any,
    targets: Tensor | None,
    source_fn: BatchField | None,
    num_sources: int,
    labels: Tensor | None = None,
) -> Tensor:
    """The ledger row of each sample; the last row, "other", is for samples without a valid source.

    Args:
        batch: The batch.
        targets: (N,) class labels, or None.
        source_fn: Where the batch holds the sources of its samples; None: the sources are the classes.
        num_sources: Number of sources, without "other".
        labels: (num_sources,) the class label of each source, in increasing order; None: the rows are the labels.

    Returns:
        (N,) int64.

    Raises:
        ArgumentError: If `source_fn` does not return one integer per sample.
    """
    rows = targets if source_fn is None else read_field("source_fn", source_fn, batch)
    if rows is None and source_fn is None:
        return torch.full((batch_length(batch) or 1,), num_sources)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point():
        raise ArgumentError(f"`source_fn` must return (N,) integers, one for each sample; got {describe(rows)}.")
    rows = rows.long()
    if labels is not None:
        labels = labels.to(rows.device)
        place = torch.searchsorted(labels, rows).clamp(max=len(labels) - 1)
        return torch.where(labels[place] == rows, place, num_sources)
    return torch.where((rows >= 0) & (rows < num_sources), rows, num_sources)
