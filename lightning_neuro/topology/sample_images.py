"""Small images of the probe set's samples, and their assignment to the points of a layer."""

import torch
from torch import Tensor

from lightning_neuro.figures import thumbnails
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.topology.result import TopologyResult

MAX_IMAGES = 2048


class SampleImages:
    """Holds small images of this rank's samples, from the first pass of a run; empty if the inputs are not images.

    Attributes:
        world_size: Number of processes in the run.
        rows_per_sample: Layer -> number of points per sample: more than one for tokens.
    """

    def __init__(self) -> None:
        self.world_size = 1
        self.rows_per_sample: dict[str, int] = {}
        self._images: list[Tensor] = []
        self._num_seen = 0

    def __len__(self) -> int:
        return sum(map(len, self._images))

    def start_pass(self, world_size: int) -> None:
        """Prepare for a pass over the probe set."""
        self.world_size = world_size
        self._num_seen = 0

    def add(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass."""
        if len(self) == self._num_seen < MAX_IMAGES and (images := thumbnails(batch.inputs)) is not None:
            self._images.append(images)
        self._num_seen += batch.num_samples
        for layer, activations in batch.activations.items():
            self.rows_per_sample[layer] = max(1, len(activations) // max(1, batch.num_samples))

    def of_points(self, layer: str, result: TopologyResult) -> dict[int, Tensor]:
        """Index of the layer's point -> image, for the samples of rank 0, which draws the figures."""
        images = [image for batch in self._images for image in batch]
        found = {}
        for position, number in enumerate(result.samples.tolist()):
            # The points are numbered in turn over all ranks.
            local = number // self.world_size // self.rows_per_sample.get(layer, 1)
            if number % self.world_size == 0 and local < len(images):
                found[position] = images[local]
        return found

    def stacked(self) -> Tensor | None:
        """All images as float (N, 3, height, width) in 0 .. 1; None if there are none."""
        return torch.cat(self._images).permute(0, 3, 1, 2).float() / 255 if self._images else None
