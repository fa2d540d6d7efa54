"""Which samples of the dataset a training batch holds, with no change in the user's code.

A `DataLoader` asks its batch sampler for the indices of each batch and delivers the batches in the order in which it
asked, whatever its workers do. So what the batch sampler yields is written down on its way into each new iterator over
the training loader, and the k-th batch delivered is the k-th written down. The loader keeps its own samplers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any
from weakref import WeakSet

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_neuro.samples import describe

_OFF = "The part of the single samples is off"
_REMEDY = "Let the dataset return each sample's index, and name the batch's field that holds it."


class SampleIds:
    """Tells the ids of the samples in each training batch.

    Ids are indices into the training loader's dataset (for a `Subset`, into the subset). They are known for a map-style
    dataset under any sampler, batch sampler, number of workers and distributed strategy. They are not known, and this
    is said once, for an `IterableDataset`, a loader with `in_order=False`, several loaders at once, a training step
    that takes the `dataloader_iter`, and batches that do not hold as many samples as were drawn.

    Args:
        field: Where a batch holds its samples' ids, if it does: a key (batches that are mappings) or a position
            (sequences). The ids must be whole numbers from 0 to the dataset's length - 1.

    Example:
        >>> ids = SampleIds()
        >>> # in a callback: `on_fit_start` calls ids.attach(trainer), `on_train_batch_start` ids.of_batch(trainer,
        >>> # batch), and `teardown` and `on_exception` call ids.detach()
    """

    def __init__(self, field: str | int | None = None) -> None:
        self.field = field
        self._attached: list[Any] = []
        self._loaders: WeakSet[DataLoader[Any]] = WeakSet()
        self._checked_field = self._warned = False

    @property
    def attached(self) -> bool:
        """Whether what the batch samplers yield is being written down."""
        return bool(self._attached)

    def attach(self, trainer: "pl.Trainer") -> None:
        """Begin to listen, before Lightning makes the training loader: in `on_fit_start`."""
        if self.attached or self.field is not None:
            return
        self._attached = [trainer]
        # The last place where Lightning handles each loader before it iterates over it.
        _StandIn.put(trainer.strategy, "process_dataloader", self, self._on_loader)

    def detach(self) -> None:
        """Leave the strategy and the loaders as they were."""
        for trainer in self._attached:
            _StandIn.take_off(trainer.strategy, "process_dataloader", self)
        for loader in self._loaders:
            _StandIn.take_off(loader, "_get_iterator", self)
        self._attached, self._loaders = [], WeakSet()
        self._checked_field = self._warned = False

    def num_samples(self, trainer: "pl.Trainer") -> int:
        """Samples in the dataset, once training has started; 0 where ids cannot be known."""
        return 0 if self.why_off(trainer) else len(_loaders(trainer)[0].dataset)

    def why_off(self, trainer: "pl.Trainer") -> str:
        """Why the ids cannot be known, or an empty string; once training has started."""
        loaders = _loaders(trainer)
        if len(loaders) != 1:
            return f"the training data comes from {len(loaders)} loaders at once"
        loader = loaders[0]
        if not isinstance(loader, DataLoader):
            return f"the training data comes from a {type(loader).__name__} and not from a DataLoader"
        if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
            return f"a {type(loader.dataset).__name__} numbers no samples"
        if self.field is not None:
            return ""
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            return "with `in_order=False` the training loader's batches do not come in the order they are drawn"
        if self._draws(trainer) is None:
            return f"the {type(loader).__name__} does not take its batches from its batch sampler as they are asked for"
        return ""

    def of_batch(self, trainer: "pl.Trainer", batch: Any) -> Tensor | None:
        """The ids of the samples in the batch that training is at; may be asked any number of times.

        Args:
            trainer: The trainer.
            batch: The batch, in `on_train_batch_start` or later in the step.

        Returns:
            (B,) int64, on the CPU or on the device of the batch's field; None where they are not known, which is said
            once.

        Raises:
            MisconfigurationException: If the first batch has no such field, or no whole numbers in it.
        """
        if self.field is not None:
            return self._from_field(batch)
        if reason := self.why_off(trainer):
            ids = None
        else:
            draws = self._draws(trainer)
            ids = None if draws is None else _as_ids(draws.at(_place(trainer)))
            reason = _why_unlike(ids, batch)
        if reason and not self._warned:
            self._warned = True
            rank_zero_warn(f"{_OFF}: {reason}. {_REMEDY}")
        return None if reason else ids

    def _from_field(self, batch: Any) -> Tensor | None:
        known = self.field in batch if isinstance(batch, Mapping) else _has_position(batch, self.field)
        found = _as_ids(batch[self.field]) if known else None
        if found is None and not self._checked_field:
            raise MisconfigurationException(
                f"The field {self.field!r} must hold one whole number per sample, its place in the dataset. The batch"
                f" is {describe(batch)}."
            )
        self._checked_field = True
        return found

    # Writing down what is drawn

    def _on_loader(self, strategy: Any, original: Callable[..., Any], loader: Any) -> Any:
        loader = original(loader)
        if isinstance(loader, DataLoader) and loader not in self._loaders:
            self._loaders.add(loader)
            _StandIn.put(loader, "_get_iterator", self, self._on_iterator)
        return loader

    def _on_iterator(self, loader: DataLoader[Any], original: Callable[..., Any]) -> Any:
        """Make an iterator over the training loader that takes its indices through our hands."""
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        training = any(loader is other for trainer in self._attached for other in _loaders(trainer))
        if not training or name not in vars(loader):
            return original()
        sampler = vars(loader)[name]
        # Past `DataLoader.__setattr__`, and only while the iterator is made: nobody else is to see it.
        vars(loader)[name] = _Listened(sampler, self)
        try:
            return original()
        finally:
            vars(loader)[name] = sampler

    def _draws(self, trainer: "pl.Trainer") -> "_Draws | None":
        """What was drawn for the iterator that training is at."""
        draws = getattr(_iterator(trainer), "_sampler_iter", None)
        while isinstance(draws, _Draws) and draws.listener is not self:
            draws = draws.iterator
        return draws if isinstance(draws, _Draws) else None


class _Listened:
    """A sampler whose iterators write down what they yield."""

    def __init__(self, sampler: Any, listener: SampleIds) -> None:
        self.sampler, self.listener = sampler, listener

    def __iter__(self) -> "_Draws":
        # At once and not at the first `next`: a sampler may draw random numbers here.
        return _Draws(iter(self.sampler), self.listener)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


class _Draws:
    """An iterator that writes down what it yields until it was asked for."""

    def __init__(self, iterator: Iterator[Any], listener: SampleIds) -> None:
        self.iterator, self.listener = iterator, listener
        self.drawn: dict[int, Any] = {}
        self.count = 0

    def __iter__(self) -> "_Draws":
        return self

    def __next__(self) -> Any:
        indices = next(self.iterator)
        if self.listener.attached:
            # A copy: the sampler may fill the same list again.
            self.drawn[self.count] = list(indices) if isinstance(indices, list) else indices
        self.count += 1
        return indices

    def at(self, place: int) -> Any:
        """What was yielded at this place; what came before is forgotten."""
        for earlier in [key for key in self.drawn if key < place]:
            del self.drawn[earlier]
        return self.drawn.get(place)


class _StandIn:
    """Takes the place of an object's bound method for a while; several may stand on top of each other."""

    def __init__(self, owner: Any, name: str, user: object, call: Callable[..., Any]) -> None:
        self.owner, self.name, self.call = owner, name, call
        self.original = getattr(owner, name)
        self.user: object | None = user

    def __call__(self, *args: Any) -> Any:
        return self.original(*args) if self.user is None else self.call(self.owner, self.original, *args)

    def __reduce__(self) -> Any:
        # A pickled or copied owner has its own method again.
        return getattr, (self.owner, self.name)

    @staticmethod
    def put(owner: Any, name: str, user: object, call: Callable[..., Any]) -> None:
        """Let `call(owner, original, *args)` stand for `owner.name(*args)`."""
        setattr(owner, name, _StandIn(owner, name, user, call))

    @staticmethod
    def take_off(owner: Any, name: str, user: object) -> None:
        """Undo `put`; where somebody else stands on top, only pass on what is asked."""
        current = top = vars(owner).get(name)
        while isinstance(current, _StandIn):
            current.user = None if current.user is user else current.user
            current = current.original
        while isinstance(top, _StandIn) and top.user is None:
            top = top.original
        if getattr(top, "__func__", None) is getattr(type(owner), name):
            del vars(owner)[name]
        elif top is not None:
            vars(owner)[name] = top


def _loaders(trainer: "pl.Trainer") -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def _iterator(trainer: "pl.Trainer") -> Any:
    """The iterator over the one training loader; None where the user's training step iterates by itself."""
    fetcher = trainer.fit_loop._data_fetcher
    mode = getattr(getattr(fetcher, "iterator", None), "_iterator", None)
    iterators = getattr(mode, "iterators", None)
    return iterators[0] if iterators and not hasattr(fetcher, "iterator_wrapper") else None


def _place(trainer: "pl.Trainer") -> int:
    """How many batches were delivered before the one that training is at."""
    ahead = len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
    return int(_iterator(trainer)._num_yielded) - 1 - ahead


def _as_ids(found: Any) -> Tensor | None:
    """(B,) int64, or None where these are not a batch of whole numbers."""
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
    """Why what was drawn cannot be what the batch holds."""
    if ids is None:
        return "the training loader's sampler does not yield lists of whole numbers"
    lengths = set(_lengths(batch))
    if lengths and len(ids) not in lengths:
        return f"a batch holds another number of samples than the {len(ids)} that were drawn"
    return ""


def _has_position(batch: Any, position: Any) -> bool:
    is_sequence = isinstance(batch, Sequence) and not isinstance(batch, str)
    return is_sequence and isinstance(position, int) and -len(batch) <= position < len(batch)


def _lengths(batch: Any) -> Iterator[int]:
    """The first dimension of each tensor in a batch."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _lengths(part)
