"""The id of each sample in a training batch: its dataset index, read from the batch or found in the data loader."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_neuro.batches import BatchField, read_field, tensors_in
from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.refinement.drawn_indices import DrawnIndices, UnknownInternalsError, training_loaders

ID_KEY = "sample_id"
_REMEDY = (
    "To enable it, wrap the training dataset in `lightning_neuro.refinement.Indexed`, and pass `sample_id_fn=-1`"
    " (items that are tuples) or `sample_id_fn='sample_id'` (items that are dicts)"
)


class Indexed(Dataset[Any]):
    """A map-style dataset whose items also hold their index, for `RepresentationRefinement(sample_id_fn=...)`.

    The index is appended to items that are tuples or lists (`sample_id_fn=-1`), and stored under the key `"sample_id"`
    in items that are mappings (`sample_id_fn="sample_id"`). Any other item becomes a pair of item and index. The
    training step must accept the longer batch: `x, y, *_ = batch`.

    Args:
        dataset: The dataset. Its other attributes, such as `classes`, stay available.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 0])
        >>> _, label, index = Indexed(TensorDataset(images, labels))[1]
        >>> int(label), index
        (1, 1)
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return {**item, ID_KEY: index}
        return (*item, index) if isinstance(item, (tuple, list)) else (item, index)

    def __getattr__(self, name: str) -> Any:
        # Not the private ones: `__getitems__` of the dataset would fetch items without their indices.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)


class SampleIds:
    """Finds the id of each sample in the training batches of one fit.

    The simplest source is a field of the batch, such as the one that `Indexed` adds. Without a field, the ids are found
    in the data loader: they are indices into the training dataset (for a `Subset`, into the subset). This works for
    map-style datasets under any sampler, batch sampler, number of workers and distributed strategy. It does not work
    for an `IterableDataset`, a loader with `in_order=False`, several loaders at once, a training step that takes the
    `dataloader_iter`, batches that do not hold as many samples as were drawn, and versions of torch or Lightning whose
    internals have changed; a warning then gives the reason.

    Args:
        trainer: The trainer, in `setup`: before it creates the iterator over its training loader.
        field: Where a batch holds the ids of its samples, integers from 0 to the length of the dataset - 1: a key, an
            index, or a function of the batch. None: they are found in the data loader.
    """

    def __init__(self, trainer: "pl.Trainer", field: BatchField | None = None) -> None:
        self.trainer = trainer
        self.field = field
        self._drawn: DrawnIndices | None = None
        self._unavailable = ""
        self._field_was_found = False
        self._warned = False
        if field is None:
            try:
                self._drawn = DrawnIndices(trainer)
            except UnknownInternalsError as error:
                self._unavailable = str(error)

    def close(self) -> None:
        """Stop listening to the data loader."""
        if self._drawn is not None:
            self._drawn.close()

    @property
    def num_samples(self) -> int:
        """Number of samples in the training dataset, once training has started; 0 if ids cannot be known."""
        if self.why_unknown():
            return 0
        loaders = training_loaders(self.trainer)
        dataset = getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None
        return len(dataset) if isinstance(dataset, Sized) else 0

    def why_unknown(self) -> str:
        """The reason why the ids cannot be known; empty if they can. Call it once training has started."""
        if self.field is not None or self._unavailable:
            return self._unavailable
        assert self._drawn is not None
        return self._drawn.why_unknown()

    def of_batch(self, batch: Any) -> Tensor | None:
        """The ids of the samples in the training batch that is running; may be called any number of times.

        Args:
            batch: The batch, in `on_train_batch_start` or later in the step.

        Returns:
            (B,) int64, on the CPU or on the device of the field; None, with one warning, if the ids are not known.

        Raises:
            ArgumentError: If the first batch does not have the field, or does not hold integers there.
        """
        if self.field is not None:
            return self._from_field(batch)
        ids: Tensor | None = None
        if not (reason := self.why_unknown()):
            assert self._drawn is not None
            try:
                ids = as_ids(self._drawn.of_current_batch())
                reason = _why_unlike(ids, batch)
            except UnknownInternalsError as error:
                reason = str(error)
        if reason:
            self.warn_disabled(reason)
        return None if reason else ids

    def warn_disabled(self, reason: str = "") -> None:
        """Warn, once, that samples are not tracked because their ids are not known, or have no upper limit."""
        if not self._warned:
            self._warned = True
            reason = reason or self.why_unknown() or "the training data has no length"
            rank_zero_warn(f"Per-sample tracking is disabled because {reason}. {_REMEDY}.")

    def _from_field(self, batch: Any) -> Tensor | None:
        assert self.field is not None
        try:
            found = read_field("sample_id_fn", self.field, batch)
            ids = as_ids(found)
            require(ids is not None, "sample_id_fn", "return one integer per sample, its index in the dataset", found)
        except ArgumentError:
            # Only the first batch may stop the fit.
            if self._field_was_found:
                return None
            raise
        self._field_was_found = True
        return ids


def as_ids(found: Any) -> Tensor | None:
    """Integers as an int64 (B,) tensor; None if the values are not integers."""
    if isinstance(found, (list, tuple, np.ndarray)):
        try:
            found = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            return None
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        return None
    found = found.flatten() if found.ndim == 2 and found.shape[1] == 1 else found
    return found.long() if found.ndim == 1 else None


def _why_unlike(ids: Tensor | None, batch: Any) -> str:
    """The reason why these cannot be the ids of the samples in the batch; empty if they can."""
    if ids is None:
        return "the sampler of the training loader does not return lists of integers"
    lengths = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
    if lengths and len(ids) not in lengths:
        return f"the sampler drew {len(ids)} samples, but the batch does not hold as many"
    return ""
