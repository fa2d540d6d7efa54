"""Which dataset indices make up a training batch: the only file that uses private names of the data loader.

A `DataLoader` asks its sampler for the indices of each batch, and delivers the batches in the order in which it asked,
whatever its workers do. Every request goes through one method of its iterators, `_BaseDataLoaderIter._next_index`.
While a `DrawnIndices` is open, this method also passes on what it returns, so the k-th batch that an iterator delivers
holds the samples of its k-th request. Loaders, samplers and strategies are left as they are.
"""

import inspect
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

PRIVATE_NAMES = {
    "DataLoader": ("_index_sampler",),
    "_BaseDataLoaderIter": ("_next_index", "_index_sampler", "_sampler_iter", "_num_yielded"),
    "_MultiProcessingDataLoaderIter": ("_send_idx",),
    "_FitLoop": ("_data_fetcher",),
    "CombinedLoader": ("_iterator",),
    "_ModeIterator": ("iterators",),
    "_PrefetchDataFetcher": ("batches",),
}
"""All private names that this file reads or replaces, by the class that they belong to."""


class UnknownInternalsError(RuntimeError):
    """The installed torch or Lightning lacks a private name without which the sample ids cannot be found."""

    def __init__(self, owner: Any, name: str) -> None:
        owner = owner if isinstance(owner, type) else type(owner)
        super().__init__(
            f"{owner.__name__} has no `{name}` in the installed versions, torch {torch.__version__} and Lightning"
            f" {pl.__version__}"  # type: ignore[attr-defined]
        )


def training_loaders(trainer: "pl.Trainer") -> list[Any]:
    """The loaders that the training batches come from, once training has started."""
    loaders = trainer.train_dataloader
    return [] if loaders is None else CombinedLoader(loaders).flattened


class DrawnIndices:
    """Finds the dataset indices of the samples in each training batch.

    Args:
        trainer: The trainer, before it creates the iterator over its training loader: in `setup`, because a learning
            rate finder trains in `on_fit_start`.

    Raises:
        UnknownInternalsError: If the installed torch has no `_BaseDataLoaderIter._next_index`.
    """

    def __init__(self, trainer: "pl.Trainer") -> None:
        self._trainer = trainer
        self._requests: WeakKeyDictionary[Any, _Requests] = WeakKeyDictionary()
        self._error: UnknownInternalsError | None = None
        _patch.add(self)

    def close(self) -> None:
        """Stop listening."""
        _patch.remove(self)

    def why_unknown(self) -> str:
        """The reason why the indices cannot be known; empty if they can. Call it once training has started."""
        loaders = training_loaders(self._trainer)
        if len(loaders) != 1:
            return f"the training data comes from {len(loaders)} loaders at once"
        loader = loaders[0]
        if not isinstance(loader, DataLoader):
            return f"the training data comes from a {type(loader).__name__} and not from a DataLoader"
        if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
            return f"the samples of a {type(loader.dataset).__name__} have no index"
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            return "with `in_order=False` the batches do not arrive in the order in which they were drawn"
        try:
            iterator = self._current_iterator()
            # Without workers, nothing is requested before the first batch.
            known = self._current_requests() is not None or (
                isinstance(iterator, _BaseDataLoaderIter) and _private(iterator, "_num_yielded") == 0
            )
        except UnknownInternalsError as error:
            return str(error)
        return "" if known else f"the {type(loader).__name__} does not take its batches from its batch sampler in order"

    def of_current_batch(self) -> Any:
        """What the sampler returned for the training batch that is running; None if it is not known."""
        requests = self._current_requests()
        if requests is None:
            return None
        # Lightning fetches batches in advance, to know which one is the last.
        fetched_ahead = len(_private(_private(self._trainer.fit_loop, "_data_fetcher"), "batches"))
        return requests.take(int(_private(self._current_iterator(), "_num_yielded")) - 1 - fetched_ahead)

    def record(self, iterator: Any, indices: Any) -> None:
        """Note what the sampler returned to an iterator, if it is one over the training loader."""
        try:
            if not self._is_over_training_data(iterator):
                return
            sampler_iter = _private(iterator, "_sampler_iter")
            requests = self._requests.get(iterator)
            if requests is None or requests.sampler_iter is not sampler_iter:  # an iterator is reused in the next epoch
                requests = self._requests[iterator] = _Requests(sampler_iter, _num_requested(iterator))
        except UnknownInternalsError as error:
            self._error = error  # raised when the indices are asked for, not inside the loader
            return
        requests.add(indices)

    def _is_over_training_data(self, iterator: Any) -> bool:
        return any(
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and _private(loader, "_index_sampler") is _private(iterator, "_index_sampler")
            for loader in training_loaders(self._trainer)
        )

    def _current_requests(self) -> "_Requests | None":
        if self._error is not None:
            raise self._error
        iterator = self._current_iterator()
        return self._requests.get(iterator) if isinstance(iterator, _BaseDataLoaderIter) else None

    def _current_iterator(self) -> Any:
        """The iterator that the training batches come from; None if the training step iterates by itself."""
        if "dataloader_iter" in inspect.signature(self._trainer.lightning_module.training_step).parameters:
            return None
        combined = _private(self._trainer.fit_loop, "_data_fetcher").iterator
        mode = None if combined is None else _private(combined, "_iterator")
        iterators = [] if mode is None else _private(mode, "iterators")
        return iterators[0] if iterators else None


def _num_requested(iterator: Any) -> int:
    """Number of batches that an iterator has requested before the one that it requests now."""
    in_workers = isinstance(iterator, _MultiProcessingDataLoaderIter)  # which run ahead
    return int(_private(iterator, "_send_idx") if in_workers else _private(iterator, "_num_yielded"))


@dataclass(eq=False)
class _Requests:
    """What a sampler has returned to one iterator, by the number of the request, until it is taken."""

    sampler_iter: Any
    count: int
    kept: dict[int, Any] = field(default_factory=dict)

    def add(self, indices: Any) -> None:
        # A copy, because the sampler may fill the same list again.
        self.kept[self.count] = list(indices) if isinstance(indices, list) else indices
        self.count += 1

    def take(self, number: int) -> Any:
        """What was returned to this request; earlier ones are discarded."""
        for earlier in [key for key in self.kept if key < number]:
            del self.kept[earlier]
        return self.kept.get(number)


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise UnknownInternalsError(owner, name) from None


class _Patch:
    """Replaces `_BaseDataLoaderIter._next_index` while there are listeners.

    Other code may replace the method in turn. Then this patch stays in place below theirs, and is used again.
    """

    def __init__(self) -> None:
        self.listeners: list[DrawnIndices] = []
        self.original: Any = None
        self.function: Any = None

    def add(self, drawn: DrawnIndices) -> None:
        if self.function is None:
            self.original = _private(_BaseDataLoaderIter, "_next_index")
            self.function = self._passing_on(self.original)
            _BaseDataLoaderIter._next_index = self.function  # type: ignore[method-assign]
        self.listeners.append(drawn)

    def _passing_on(self, original: Any) -> Any:
        def next_index(iterator: Any) -> Any:
            indices = original(iterator)
            for listener in self.listeners:
                listener.record(iterator, indices)
            return indices

        return next_index

    def remove(self, drawn: DrawnIndices) -> None:
        if drawn in self.listeners:
            self.listeners.remove(drawn)
        if not self.listeners and self.function is not None and _BaseDataLoaderIter._next_index is self.function:
            _BaseDataLoaderIter._next_index = self.original  # type: ignore[method-assign]
            self.function = None


_patch = _Patch()
