"""Reads the units of a probe's layers in forward passes: Lightning's own, or those of a replay."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.batches import read_field
from lightning_neuro.capture import Recording
from lightning_neuro.heads import Layer
from lightning_neuro.layer_reading import BatchShape, LayerAxes, UnitCapture, batch_first_of
from lightning_neuro.layers import named_layers
from lightning_neuro.padding import attention_layers, masks_in_calls, padding_mask
from lightning_neuro.probe import Probe
from lightning_neuro.units import latest_layout

Warn = Callable[[str, str], None]
"""Called with a sentence and its cause."""


class UnitReader:
    """Records the units of layers, and remembers where samples and units lie in their outputs.

    Args:
        probe: The probe.
        warn: Called for each layer that cannot be recorded.

    Attributes:
        layers: Layer name -> module or heads; empty while the default layers are not known.
        needs_layers: Whether a callback uses the layers.
        axes: Where the samples and the units lie.
    """

    def __init__(self, probe: Probe, warn: Warn) -> None:
        self.probe = probe
        self.warn = warn
        self.layers: dict[str, Layer] = {}
        self.needs_layers = False
        self.axes = LayerAxes()
        self._attention: list[nn.Module] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the layers are known, as far as they are needed."""
        return bool(self.layers) or not self.needs_layers

    @contextmanager
    def reading(self, model: nn.Module, shape: BatchShape, batch: Any) -> Iterator[Recording]:
        """Record the forward passes inside the block; the hooks are removed at its end.

        Args:
            model: The LightningModule.
            shape: What is known of the batch.
            batch: The batch, in which a padding mask is looked up.
        """
        owners = getattr(batch, "batch", None)  # as in batches of torch_geometric
        if isinstance(owners, Tensor) and owners.dtype == torch.int64 and owners.ndim == 1:
            shape = replace(shape, owners=owners)
        if self._attention is None:
            self._attention = attention_layers(model)
        if not self.axes.batch_first.keys() >= self.layers.keys():
            modules = named_layers(model)
            self.axes.batch_first = {name: batch_first_of(name, modules) for name in self.layers}
        with ExitStack() as stack:
            masks = stack.enter_context(masks_in_calls(self._attention))
            given = self.probe.mask_fn
            mask = padding_mask(batch) if given is None else read_field("mask_fn", given, batch).bool()
            masks += [] if mask is None else [mask]
            capture = UnitCapture(
                self.layers,
                reduction=self.probe.reduction,
                seed=self.probe.seed,
                axes=self.axes,
                shape=shape,
                units_last=stack.enter_context(latest_layout(model)) if self.axes.lacks(self.layers) else None,
                masks=masks,
            )
            recording = stack.enter_context(capture.recording())
            yield recording
        if recording.calls:  # else the step does not run the model at all
            self.warn_of_missing(capture.not_called(recording), recording.failures)

    def warn_of_missing(self, not_called: list[str], failures: dict[str, str]) -> None:
        """Warn of each layer that was not called or not recorded."""
        why = "its hook did not fire, because the forward pass does not call it or it is scripted or fused"
        for name, reason in (failures | dict.fromkeys(not_called, why)).items():
            self.warn(f"Layer '{name}' is not (fully) recorded: {reason}. Leave it out with `Probe(layers=...)`.", name)
