"""The shape of one layer's activations: its Mapper graph and its persistent homology."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_neuro.layer_result import nonfinite_note, short_repr
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.persistence import Persistence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW_COVERAGE = 0.5


@dataclass(frozen=True, eq=False)
class TopologyResult:
    """The shape of a layer's activations as a cloud of points, one point per sample.

    Attributes:
        samples: int64 (N,), the number of each point's sample in the probe set.
        graph: The Mapper graph, whose members are indices into `samples`; None if it was not requested.
        homology: Connected components and loops; None if they were not requested.
        scale: The .9 quantile of the distances, by which lengths are divided; 1 for cosine distances.
        null: Measure + `_null` -> its value in Gaussian clouds of the same mean and covariance: for loops and branches
            the mean of several clouds, if asked for; for the lengths of bars that of one.
        spread: Measure + `_std` -> standard deviation of the homology's measures over random halves of the points.
        drift_samples: int64, the samples on which drift and homology are measured.
        drift_distances: float32, their scaled distances in condensed form; empty without homology.
        num_units: Number of units of the layer.
        num_samples: Number of samples used.
        num_nonfinite: Number of samples left out because of NaN or infinite activations.
    """

    samples: Tensor
    graph: MapperGraph | None
    homology: Persistence | None
    scale: float = 1.0
    null: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    drift_samples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    drift_distances: Tensor = field(default_factory=lambda: torch.zeros(0))
    num_units: int = 0
    num_samples: int = 0
    num_nonfinite: int = 0

    __repr__ = short_repr

    def plot(self, *, layer: str = "") -> "Figure":
        """Draw the Mapper graph, or the persistence diagram if there is none.

        Args:
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.topology.plot import plot_graphs
        from lightning_neuro.topology.plot_diagrams import plot_homology

        return plot_graphs({layer: self}) if self.graph is not None else plot_homology({layer: self})

    def scalars(self) -> dict[str, float]:
        """Measure -> value of the graph and the homology; undefined measures are left out."""
        values: dict[str, float] = {}
        if self.graph is not None and (found := self.graph.scalars()):
            values |= found | {"eps": self.graph.eps / self.scale}
        if self.homology is not None:
            values |= self.homology.scalars()
        return values | dict(self.null) | dict(self.spread)

    def notes(self) -> dict[str, str]:
        """Kind -> a warning for the user, shown once: samples left out, why something is undefined."""
        notes: dict[str, str] = {}
        if self.num_nonfinite:
            notes["nonfinite"] = nonfinite_note(self.num_nonfinite, self.num_samples)
        if self.graph is not None and self.graph.num_nodes and self.graph.coverage < LOW_COVERAGE:
            notes["coverage"] = (
                f"Only {self.graph.coverage:.0%} of the samples are in clusters, so purity and graph are those of few"
                " samples. The radius was frozen at an early evaluation: call `callback.refreeze()`, or pass a larger"
                " `warm_up`."
            )
        reasons = [self.homology.why_undefined()] if self.homology is not None else []
        reasons += [self.graph.why_empty()] if self.graph is not None else []
        if undefined := " ".join(filter(None, reasons)):
            notes["undefined"] = undefined
        return notes

    def histogram(self) -> Tensor:
        """Scaled distances at which components merge; without homology the sizes of the graph's nodes."""
        if self.homology is not None:
            return torch.from_numpy(self.homology.diagrams[0][:, 1] / self.homology.scale)
        return self.graph.sizes.double() if self.graph is not None else torch.zeros(0)
