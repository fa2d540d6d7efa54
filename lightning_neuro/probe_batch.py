"""One batch of the probe set, as callbacks receive it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_neuro.checks import describe
from lightning_neuro.targets import Targets
from lightning_neuro.units import UnitRows


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """One batch of the probe set, as callbacks receive it.

    Attributes:
        activations: Layer name -> (N, units) tensor on the model's device; (positions, units) for
            `reduction="tokens"`.
        inputs: What the model is called with: a tensor, or a tuple of them.
        targets: (N,) int64 class labels, -1 where unknown; None if there are none. In the batch that `at` returns, one
            for each row of the layer's activations.
        batch: The whole batch, as the model's steps receive it.
        num_samples: N.
        num_classes: Largest class label in the whole probe set, over all ranks, plus one; 0 without class labels.
        labels: The targets in all their forms: classes, attributes, labels per position.
        rows: Layer name -> which samples and positions the rows of its activations belong to.
        sample_index: In the batch that `at` returns: (R,) int64, the sample of each row of the layer's activations;
            None if there is one row for each sample, in order.
        classes: (K,) int64, sorted: the classes of which measures speak if they are only some; None: all. Other labels
            are -1 in `targets`.
    """

    activations: dict[str, Tensor]
    inputs: Any
    targets: Tensor | None
    batch: Any
    num_samples: int
    num_classes: int
    labels: Targets = Targets()  # noqa: RUF009 - immutable
    rows: Mapping[str, UnitRows] = field(default_factory=dict)
    sample_index: Tensor | None = None
    classes: Tensor | None = None

    @property
    def numbered_targets(self) -> Tensor | None:
        """The targets, numbered from 0 where only some classes are covered: the position of each in `classes`."""
        if self.targets is None or self.classes is None:
            return self.targets
        return self.numbered(self.targets)

    def numbered(self, labels: Tensor) -> Tensor:
        """The position of each class label in `classes`, -1 if it is not there; unchanged if all are covered."""
        if self.classes is None:
            return labels
        number = torch.searchsorted(self.classes, labels).clamp(max=len(self.classes) - 1)
        return torch.where(self.classes[number] == labels, number, -1)

    def is_aligned(self, layer: str) -> bool:
        """Whether it is known which samples the rows of a layer's activations belong to."""
        return layer not in self.rows or self.rows[layer].aligned

    def at(self, layer: str) -> "ProbeBatch":
        """The batch with a target for each row of a layer's activations: that of its sample or, if known, position."""
        rows = self.rows.get(layer)
        if rows is None:
            return self
        if not rows.aligned:
            return replace(self, targets=None, labels=Targets())
        targets = self._at_positions(rows)
        if targets is None and self.targets is not None:
            targets = self.targets if rows.samples is None else self.targets[rows.samples]
        return replace(self, targets=targets, sample_index=rows.samples)

    def _at_positions(self, rows: UnitRows) -> Tensor | None:
        labels = self.labels.positions
        if labels is None or rows.positions is None or not rows.grid:
            return None
        if tuple(labels.shape[1:]) != rows.grid:
            if labels.ndim - 1 != len(rows.grid):
                return None
            # Layers of lower resolution: the label of the nearest pixel.
            resized = interpolate(labels[:, None].double(), size=rows.grid, mode="nearest")
            labels = resized[:, 0].long()
        samples = rows.samples
        if samples is None:
            samples = torch.arange(len(rows.values), device=labels.device)
        return labels.flatten(1)[samples.to(labels.device), rows.positions.to(labels.device)]


def why_no_labels(name: str, batch: ProbeBatch, *, takes_positions: bool) -> str:
    """The sentence on a batch without class labels of its samples, with a remedy.

    Args:
        name: Name of the callback.
        batch: The batch.
        takes_positions: Whether the callback can work with labels of single positions.
    """
    remedy = "Pass `Probe(target_fn=...)`."
    if takes_positions and batch.labels.positions is not None:
        remedy = (
            "Its labels are those of single positions (pixels, tokens): pass `Probe(reduction='random')`, which takes"
            " one position of each sample, or `Probe(reduction='tokens')`, which takes all."
        )
    return (
        f"{name} needs a class label (an integer) for each sample, and none was found in the batch, which is"
        f" {describe(batch.batch)}. {remedy}"
    )
