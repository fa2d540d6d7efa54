"""The passes of one probe in one run: the model runs over the probe set, and each batch is passed to a visitor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_neuro.batches import (
    batch_length,
    class_labels,
    default_input,
    default_target,
    read_field,
    sample_dim,
)
from lightning_neuro.capture import Capture, uncompiled
from lightning_neuro.checks import ArgumentError
from lightning_neuro.isolation import undisturbed
from lightning_neuro.layers import resolve_layers
from lightning_neuro.probe import Probe
from lightning_neuro.probe_set import ProbeSet, as_class_names, load_probe_set
from lightning_neuro.ranks import agreed, over_ranks
from lightning_neuro.units import latest_layout, to_units


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """One batch of the probe set, as callbacks receive it.

    Attributes:
        activations: Layer name -> (N, units) tensor on the model's device; (N x positions, units) for
            `reduction="tokens"`.
        inputs: The inputs of the model.
        targets: (N,) int64 class labels; None if the batch has none.
        batch: The whole batch, on the model's device.
        num_samples: N.
        num_classes: Largest class label in the whole probe set, over all ranks, plus one; 0 without class labels.
    """

    activations: dict[str, Tensor]
    inputs: Any
    targets: Tensor | None
    batch: Any
    num_samples: int
    num_classes: int


class ProbePass:
    """Runs the model over the probe set of one probe. There is one per probe in a run, shared by its callbacks.

    Args:
        probe: The probe.

    Attributes:
        probe: The probe.
        layers: Layer name -> module, once `resolve_layers` was called.
        num_forwards: Number of forward passes so far, by which the hooks of callbacks recognise which calls belong to
            one forward pass.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.layers: dict[str, nn.Module] = {}
        self.num_forwards = 0
        self._probe_set: ProbeSet | None = None
        self._num_classes = 0
        self._warned: set[str] = set()

    def resolve_layers(self, pl_module: "pl.LightningModule") -> None:
        """Find the layers.

        Raises:
            ArgumentError: If a pattern matches nothing or the model has no default layers.
        """
        self.layers = resolve_layers(pl_module, self.probe.layers)

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
            samples = self._load(trainer)
            generators = {name: self._generator(name) for name in self.layers}
            for cpu_batch in samples.batches[:max_batches]:
                visit(self._forward(trainer, pl_module, cpu_batch, generators))

    def count_classes(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> int:
        """Largest class label in the probe set, over all ranks, plus one; 0 without class labels."""
        with undisturbed(trainer, pl_module):
            self._load(trainer)
        return self._num_classes

    def class_names(self, trainer: "pl.Trainer") -> tuple[str, ...] | None:
        """The names of the classes: the probe's, else the datamodule's, else the dataset's; None if there are none."""
        if self.probe.class_names is not None:
            return tuple(self.probe.class_names)
        datamodule = getattr(trainer, "datamodule", None)
        for name in ("class_names", "classes"):
            if (found := as_class_names(getattr(datamodule, name, None))) is not None:
                return found
        return None if self._probe_set is None else self._probe_set.class_names

    def target(self, batch: Any) -> Any:
        """The target in a batch, as the probe finds it."""
        field = self.probe.target_fn
        return default_target(batch) if field is None else read_field("target_fn", field, batch)

    def _input(self, batch: Any) -> Any:
        field = self.probe.input_fn
        return default_input(batch) if field is None else read_field("input_fn", field, batch)

    def _generator(self, name: str) -> torch.Generator:
        # One generator per layer, new in every pass, so that each sample keeps its position throughout the run.
        return torch.Generator().manual_seed(self.probe.seed + crc32(name.encode()))

    def _load(self, trainer: "pl.Trainer") -> ProbeSet:
        if self._probe_set is None:
            found = agreed(
                trainer,
                lambda: load_probe_set(
                    _find_source(trainer, self.probe.source),
                    num_samples=self.probe.num_samples,
                    seed=self.probe.seed,
                    # The default is passed on unchanged, because with it labels may be read without loading samples.
                    target_fn=default_target if self.probe.target_fn is None else self.target,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                ),
            )
            self._num_classes = over_ranks(trainer, found.num_classes, "max")
            total = over_ranks(trainer, found.num_samples, "sum")
            if 0 < total < self.probe.num_samples:
                rank_zero_info(f"The probe set holds all {total} samples (num_samples={self.probe.num_samples}).")
            self._probe_set = found
        return self._probe_set

    def _forward(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, generators: dict[str, torch.Generator]
    ) -> ProbeBatch:
        # A copy, because transfer hooks and models may change their batch in place, and the samples must not change.
        batch = apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        inputs = self._input(batch)
        targets = class_labels(self.target(batch))
        # The number of samples is taken from the labels first, because inputs may have the time in dimension 0.
        num_samples = batch_length(targets, inputs, batch)

        def units(name: str, output: Tensor) -> Tensor:
            return self._units(output, num_samples, layout(output), generators[name])

        # The hooks exist for this call only, so none can be left behind, and training steps run without them.
        capture = Capture(self.layers, transform=units)
        self.num_forwards += 1
        with uncompiled(), latest_layout(pl_module) as layout, capture.recording() as recording:
            self._call(pl_module, inputs)
        self._warn_of_missing(capture.not_called(recording), recording.failures)
        return ProbeBatch(recording.activations, inputs, targets, batch, num_samples or 0, self._num_classes)

    def _call(self, pl_module: "pl.LightningModule", inputs: Any) -> None:
        if self.probe.forward_fn is not None:
            self.probe.forward_fn(pl_module, inputs)
        elif type(pl_module).forward.__qualname__ == "LightningModule.forward":
            raise ArgumentError(
                f"{type(pl_module).__name__} has no `forward`, so the probe cannot run it. Define one, or pass"
                " `Probe(forward_fn=lambda pl_module, inputs: ...)`."
            )
        else:
            pl_module(inputs)

    def _units(
        self, output: Tensor, num_samples: int | None, units_last: bool | None, generator: torch.Generator
    ) -> Tensor:
        if num_samples is not None and output.ndim > 0 and output.shape[0] != num_samples:
            if output.ndim != 3 or sample_dim(output, num_samples) is None:
                raise ValueError(
                    f"its output of shape {tuple(output.shape)} does not have the {num_samples} samples of the batch"
                    " in its first dimension"
                )
            output, units_last = output.transpose(0, 1), True
        if output.device.type == "mps":
            output = output.cpu()  # metrics need float64, which this device does not support
        return to_units(output, self.probe.reduction, units_last=units_last, generator=generator)

    def _warn_of_missing(self, not_called: list[str], failures: dict[str, str]) -> None:
        why = "its hook did not fire, because the forward pass does not call it or it is scripted or fused"
        for name, reason in (failures | dict.fromkeys(not_called, why)).items():
            sentence = f"Layer '{name}' is not (fully) recorded: {reason}. Leave it out with `Probe(layers=...)`."
            self.warn_once(sentence, cause=name)

    def warn_once(self, sentence: str, *, cause: str | None = None) -> None:
        """Warn, once per cause (default: the sentence itself) in a run."""
        if (cause or sentence) not in self._warned:
            self._warned.add(cause or sentence)
            rank_zero_warn(sentence)


def _find_source(trainer: "pl.Trainer", source: Any) -> Any:
    if not isinstance(source, str):
        return source
    loaders = _val_loaders(trainer) if source == "val" else trainer.train_dataloader
    if source == "val" and (loaders is None or loaders == []):
        rank_zero_info("There is no validation data, so the probe set is taken from the training data.")
        loaders = trainer.train_dataloader
    while isinstance(loaders, (list, tuple, dict)) and len(loaders) > 0:
        loaders = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders[0]
    if loaders is None:
        raise ArgumentError(f"The trainer has no {source} data to take the probe set from. Pass `Probe(source=...)`.")
    return loaders


def _val_loaders(trainer: "pl.Trainer") -> Any:
    if trainer.val_dataloaders is None and trainer.state.fn == "fit" and trainer.enable_validation:
        # The first epoch ends without validation, so Lightning has not requested the loaders yet. A separate request
        # does not change the time of Lightning's own request, nor its use of the random generators.
        return trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    return trainer.val_dataloaders
