"""Probe: which samples and which layers to look at, how often, and the one pass that shows them to every callback."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_neuro.arguments import check_count
from lightning_neuro.capture import Capture, uncompiled
from lightning_neuro.isolation import undisturbed
from lightning_neuro.layers import REDUCTIONS, Reduction, latest_layout, resolve_layers, to_units
from lightning_neuro.ranks import on_any_rank, over_ranks
from lightning_neuro.samples import (
    BatchFunction,
    Samples,
    batch_length,
    class_labels,
    collect_samples,
    default_input,
    default_target,
)

Event = tuple[str, int, int]


@dataclass(frozen=True)
class ProbeBatch:
    """What a callback sees of one batch of the sample set.

    Attributes:
        activations: Layer name -> (N, units) tensor on the model's device; (N x positions, units) for
            `reduction="tokens"`.
        inputs: What the model was given.
        targets: (N,) int64 class labels, or None where the batch has no such thing.
        batch: The whole batch, on the model's device.
        num_samples: N.
        num_classes: Largest class label in the whole sample set, over all ranks, plus one; 0 without class labels.
    """

    activations: dict[str, Tensor]
    inputs: Any
    targets: Tensor | None
    batch: Any
    num_samples: int
    num_classes: int


class Observer(Protocol):
    """Who is shown the batches of a pass."""

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Get ready: a pass is about to begin."""

    def observe(self, batch: ProbeBatch) -> None:
        """Take in one batch."""


class Probe:
    """Which samples, which layers, and when.

    The sample set is fixed once and kept in memory on the CPU; the model runs over it on schedule, in evaluation mode,
    without gradients or autocast, and everything is put back as it was. Callbacks given the same probe, or probes with
    the same arguments, share its passes.

    Args:
        layers: Layer names or globs. A full name means this layer; any other pattern is compared, segment by segment,
            with the end of the names (`"conv*"`, `"encoder.*.linear1"`). Default: the outputs of the activation
            modules, else of the linear and convolution layers without the last; at most eight.
        num_samples: Size of the sample set over all ranks. Drawn evenly over the classes where the dataset has class
            labels; from an `IterableDataset` the first samples.
        source: `"val"` (the validation data, or the training data where there is none), `"train"`, a `Dataset`, a
            `DataLoader` or an iterable of batches. Of several validation loaders, the first.
        every_n_epochs: Evaluate at the end of every n-th epoch.
        every_n_steps: Evaluate after every n-th optimiser step instead; `every_n_epochs` is then without effect.
        reduction: What becomes of positions (pixels, tokens) in a layer's output: `"mean"`, `"max"`, `"random"` (one
            position a sample, the same all run), `"tokens"` (each is a sample), `"cls"` (the first), `"flatten"` (each
            is a unit).
        input_fn: Finds the model's input in a batch. Default: the batch itself, its first element, or an entry of a
            usual name (`"image"`, `"x"`, ...).
        target_fn: Finds the target in a batch. Default: the second element, or an entry of a usual name (`"label"`,
            `"y"`, ...).
        forward_fn: Runs the model: `forward_fn(pl_module, inputs)`. Default: `pl_module(inputs)`.
        seed: Of the choice of samples and positions.

    Raises:
        MisconfigurationException: For a wrong argument, at construction; for a pattern that matches no layer, an empty
            source or a batch in which the input cannot be found, before the first training step.

    Example:
        >>> probe = Probe(layers=["conv*", "fc1"], num_samples=256, every_n_epochs=2)
        >>> probe
        Probe(layers=('conv*', 'fc1'), num_samples=256, every_n_epochs=2)
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        num_samples: int = 512,
        source: str | Dataset[Any] | DataLoader[Any] | Sequence[Any] = "val",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        reduction: Reduction = "mean",
        input_fn: BatchFunction | None = None,
        target_fn: BatchFunction | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        check_count("num_samples", num_samples)
        check_count("every_n_epochs", every_n_epochs)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        if reduction not in REDUCTIONS:
            raise MisconfigurationException(f"`reduction` must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
        if not isinstance(seed, int):
            raise MisconfigurationException(f"`seed` must be a whole number; got {seed!r}.")
        for name, function in {"input_fn": input_fn, "target_fn": target_fn, "forward_fn": forward_fn}.items():
            if function is not None and not callable(function):
                raise MisconfigurationException(f"`{name}` must be a function or None; got {function!r}.")
        iterable = isinstance(source, (Dataset, Iterable)) and not isinstance(source, Tensor)
        if not iterable or (isinstance(source, str) and source not in ("val", "train")):
            raise MisconfigurationException(
                f"`source` must be 'val', 'train', a Dataset, a DataLoader or an iterable of batches; got {source!r}."
            )
        if not isinstance(layers, (str, type(None))):
            layers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
            if not all(isinstance(layer, str) for layer in layers):
                raise MisconfigurationException(f"`layers` must be a name or glob, or several; got {layers!r}.")
            if not layers:
                raise MisconfigurationException("`layers` is empty; leave it out for the default layers.")
        self.layers = layers
        self.num_samples = num_samples
        self.source = source
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.reduction = reduction
        self.input_fn = input_fn
        self.target_fn = target_fn
        self.forward_fn = forward_fn
        self.seed = seed
        self._num_looks = 0
        self._observers: list[Observer] = []
        self._modules: dict[str, nn.Module] = {}
        self._samples: Samples | None = None
        self._num_classes = 0
        self._warned: set[str] = set()
        self._last_event: Event | None = None
        self._last_error: Exception | None = None

    def __repr__(self) -> str:
        defaults = Probe._arguments(Probe())
        given = {name: value for name, value in self._arguments().items() if value != defaults[name]}
        return f"Probe({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def same_as(self, other: "Probe") -> bool:
        """Whether two probes were given the same arguments, so that one pass serves both."""
        mine, theirs = self._arguments(), other._arguments()
        # By identity where two objects are not plain values: comparing datasets could load or broadcast them.
        plain = (str, int, type(None))
        layers = [(given,) if isinstance(given, str) else given for given in (mine.pop("layers"), theirs.pop("layers"))]
        return layers[0] == layers[1] and all(
            mine[name] == theirs[name] if isinstance(mine[name], plain) else mine[name] is theirs[name] for name in mine
        )

    def attach(self, pl_module: "pl.LightningModule", observer: Observer, *, needs_layers: bool = True) -> None:
        """Find the layers and enlist an observer; default layers only for one that needs any."""
        if not self._modules and (needs_layers or self.layers is not None):
            self._modules = resolve_layers(pl_module, self.layers)
        if observer not in self._observers:
            self._observers.append(observer)

    def detach(self, observer: Observer) -> None:
        """Strike an observer off; with the last one go the samples and the references to the model."""
        if observer in self._observers:
            self._observers.remove(observer)
        if not self._observers:
            self._modules, self._warned = {}, set()
            self._samples = self._last_event = self._last_error = None

    @property
    def num_looks(self) -> int:
        """Batches that the model was run on so far: tells others' hooks which calls belong to one forward pass."""
        return self._num_looks

    def count_classes(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> int:
        """Largest class label in the sample set, over all ranks, plus one; 0 without class labels."""
        with undisturbed(trainer, pl_module):
            self._collect(trainer)
        return self._num_classes

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether to evaluate at the end of this epoch, counted from 0."""
        return self.every_n_steps is None and (epoch + 1) % self.every_n_epochs == 0

    def due_at_step(self, global_step: int, last_step: int) -> bool:
        """Whether to evaluate after this many optimiser steps, the last evaluation having been after `last_step`."""
        n = self.every_n_steps
        # Not by the remainder: with several optimisers the count rises by more than one at a time.
        return n is not None and global_step // n > max(last_step, 0) // n

    def refresh(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> None:
        """Show the current state of the network to all observers: one pass per event, whoever asks first."""
        if event == self._last_event:
            if self._last_error is not None:
                raise self._last_error
            return
        self._last_event, self._last_error = event, None
        try:
            for observer in self._observers:
                observer.begin(trainer, pl_module)
            self.run(trainer, pl_module, self._show)
        except Exception as error:
            self._last_error = error
            raise

    def _show(self, batch: ProbeBatch) -> None:
        for observer in self._observers:
            observer.observe(batch)

    def run(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        visit: Callable[[ProbeBatch], object],
        *,
        max_batches: int | None = None,
    ) -> None:
        """Run the model over this rank's samples once, or the first batches of them, and call `visit` with each."""
        with undisturbed(trainer, pl_module):
            samples = self._collect(trainer)
            generators = {name: self._generator(name) for name in self._modules}
            for cpu_batch in samples.batches[:max_batches]:
                visit(self._look(trainer, pl_module, cpu_batch, generators))

    def _generator(self, name: str) -> torch.Generator:
        # Of its own for every layer, and new in every pass, so that each sample keeps its position all run.
        return torch.Generator().manual_seed(self.seed + crc32(name.encode()))

    def _look(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, generators: dict[str, torch.Generator]
    ) -> ProbeBatch:
        # A copy: transfer hooks and models may change their batch in place, and the samples must stay as they are.
        batch = apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        inputs = (self.input_fn or default_input)(batch)
        targets = class_labels((self.target_fn or default_target)(batch))
        # Labels first: the inputs of a recurrent network may have the time in front.
        num_samples = batch_length(targets, inputs, batch)

        def units(name: str, output: Tensor) -> Tensor:
            return self._units(output, num_samples, layout(output), generators[name])

        # The hooks are on for this one call only: nothing can be left behind, and training steps run without them.
        capture = Capture(self._modules, transform=units)
        self._num_looks += 1
        with uncompiled(), latest_layout(pl_module) as layout, capture.recording() as seen:
            self._forward(pl_module, inputs)
        self._warn_of_missing(capture.silent(seen), seen.failures)
        return ProbeBatch(seen.activations, inputs, targets, batch, num_samples or 0, self._num_classes)

    def _forward(self, pl_module: "pl.LightningModule", inputs: Any) -> None:
        if self.forward_fn is not None:
            self.forward_fn(pl_module, inputs)
        elif type(pl_module).forward.__qualname__ == "LightningModule.forward":
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no `forward`, so the probe cannot run it. Define one, or say how to"
                " run the model with `Probe(forward_fn=lambda pl_module, inputs: ...)`."
            )
        else:
            pl_module(inputs)

    def _units(
        self,
        output: Tensor,
        num_samples: int | None,
        units_last: bool | None,
        generator: torch.Generator,
    ) -> Tensor:
        if num_samples is not None and output.ndim > 0 and output.shape[0] != num_samples:
            # Recurrent and attention layers put the time first unless told otherwise.
            if output.ndim != 3 or output.shape[1] != num_samples:
                raise ValueError(
                    f"its output of shape {tuple(output.shape)} does not have the {num_samples} samples of the batch"
                    " in its first dimension"
                )
            output, units_last = output.transpose(0, 1), True
        if output.device.type == "mps":
            output = output.cpu()  # the metrics count in float64, which this device lacks
        return to_units(output, self.reduction, units_last=units_last, generator=generator)

    def _warn_of_missing(self, silent: list[str], failures: dict[str, str]) -> None:
        why = "its hook did not fire: the forward pass does not call it, or it is scripted or part of a fused kernel"
        reasons = failures | dict.fromkeys(silent, why)
        for name, reason in reasons.items():
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(f"The probe cannot fully see layer '{name}': {reason}.")

    def _collect(self, trainer: "pl.Trainer") -> Samples:
        if self._samples is None:
            error: Exception | None = None
            try:
                self._samples = collect_samples(
                    _find_source(trainer, self.source),
                    num_samples=self.num_samples,
                    seed=self.seed,
                    target_fn=self.target_fn or default_target,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                )
            except Exception as failure:
                error = failure
            # A rank that went on alone would wait for the others in the next line for ever.
            if on_any_rank(trainer, error is not None) or self._samples is None:
                self._samples = None
                raise error or RuntimeError("the samples could not be loaded on another rank")
            self._num_classes = over_ranks(trainer, self._samples.num_classes, "max")
            total = over_ranks(trainer, self._samples.num_samples, "sum")
            if 0 < total < self.num_samples:
                rank_zero_info(
                    f"The probe looks at all {total} samples there are; `num_samples` is {self.num_samples}."
                )
        return self._samples


def _find_source(trainer: "pl.Trainer", source: Any) -> Any:
    if not isinstance(source, str):
        return source
    loaders = _val_loaders(trainer) if source == "val" else trainer.train_dataloader
    if source == "val" and (loaders is None or loaders == []):
        rank_zero_info("There is no validation data, so the probe looks at training samples.")
        loaders = trainer.train_dataloader
    while isinstance(loaders, (list, tuple, dict)) and len(loaders) > 0:
        loaders = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders[0]
    if loaders is None:
        raise MisconfigurationException(
            f"The trainer has no {source} data to look at. Give the probe some: `Probe(source=my_dataset)`."
        )
    return loaders


def _val_loaders(trainer: "pl.Trainer") -> Any:
    if trainer.val_dataloaders is None and trainer.state.fn == "fit" and trainer.enable_validation:
        # The first epoch ends without validation, so Lightning has not asked for the loaders yet. Asking on our own
        # account leaves its own request, and what that draws from the random generators, where it would have been.
        return trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    return trainer.val_dataloaders
