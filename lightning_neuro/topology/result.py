"""The shape of one layer's activations: its Mapper graph and its homology, in numbers and notes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_neuro.topology.graph import MapperGraph
from lightning_neuro.topology.persistence import Persistence


@dataclass(frozen=True, eq=False)
class TopologyResult:
    """What a layer's activations look like as a cloud of points, one point a sample.

    Attributes:
        samples: int64 (N,), the number of each sample in the sample set, by which the graph's members are found in it.
        graph: The Mapper graph, its members being positions in `samples`; None if it was not asked for.
        homology: Pieces and loops; None if they were not asked for.
        scale: The .9 quantile of the distances, by which lengths are divided; 1 for cosine distances.
        null: Measure + `_null` -> its value in Gaussian clouds of the same mean and covariance: for loops and branches
            the mean of three, for the lengths of bars that of one.
        spread: Measure + `_std` -> standard deviation of the homology's measures over random halves of the points.
        drift_samples: int64, the samples (at most 256) that drift is measured on.
        drift_distances: float32, their scaled distances as a vector of pairs; empty without homology.
    """

    samples: Tensor
    graph: MapperGraph | None
    homology: Persistence | None
    scale: float = 1.0
    null: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    drift_samples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    drift_distances: Tensor = field(default_factory=lambda: torch.zeros(0))

    def scalars(self) -> dict[str, float]:
        """All measures of the graph and the homology; what is undefined is left out."""
        values: dict[str, float] = {}
        if self.graph is not None and (found := self.graph.scalars()):
            values |= found | {"eps": self.graph.eps / self.scale}
        if self.homology is not None:
            values |= self.homology.scalars()
        return values | dict(self.null) | dict(self.spread)

    def notes(self) -> dict[str, str]:
        """What a reader of the numbers must know, by kind; see the graph's and the homology's notes."""
        notes = {} if self.homology is None else self.homology.notes()
        return notes | ({} if self.graph is None else self.graph.notes())

    def histogram(self) -> Tensor:
        """Scaled distances at which pieces merge; without homology the sizes of the graph's nodes."""
        if self.homology is not None:
            return torch.from_numpy(self.homology.diagrams[0][:, 1] / self.homology.scale)
        return self.graph.sizes.double() if self.graph is not None else torch.zeros(0)
