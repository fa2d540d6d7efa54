"""What the taps on the training steps show to those who watch single samples."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """Who the samples of a training micro-batch are: one object a micro-batch, the same for all of its layers.

    Attributes:
        ids: (B,) int64, each sample's place in the dataset, on the device of the model; None where it is not known.
        targets: (B,) int64 class labels on the same device; None where the targets are something else.
    """

    ids: Tensor | None = None
    targets: Tensor | None = None

    def rows(self, num_samples: int, device: torch.device) -> Tensor:
        """The samples' rows in a table of `num_samples` + 1 rows; the last one is for ids that have none.

        The device is not asked which these are, so that training need not wait for it.
        """
        assert self.ids is not None
        ids = self.ids.to(device)
        return torch.where((ids >= 0) & (ids < num_samples), ids, num_samples)


class Observer(Protocol):
    """Someone who watches layers while they are trained.

    What is seen is pending until the optimiser's step of its layer is known to have happened (`commit`) or not
    (`drop`). Nothing here may wait for the device.
    """

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Take in one backward pass through a layer.

        Args:
            layer: Its name.
            module: The layer.
            inputs: Its input, (B, ..., in) for linear layers, (B, channels, ...) for convolutions.
            gradients: The gradient of the loss with respect to its output, laid out the same way.
            batch: Who the B samples are.
        """

    def commit(self, layer: str, rate: Tensor) -> None:
        """The layer's weights were changed: what is pending counts, times `rate`.

        Args:
            layer: Its name.
            rate: Scalar on the device: learning rate x (gradient that the optimiser used / gradient that was seen).
        """

    def drop(self, layer: str) -> None:
        """The gradients were thrown away: so is what is pending."""
