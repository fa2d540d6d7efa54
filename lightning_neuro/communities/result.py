"""The result of one evaluation of neuron communities."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_neuro.layer_result import nonfinite_note, short_repr

if TYPE_CHECKING:
    import networkx
    from matplotlib.figure import Figure

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class CommunityResult:
    """The communities of one layer's units, how clear they are, and the null.

    Compare `modularity` with `modularity_null`: the relevant quantity is the difference (`modularity_excess`), also in
    standard deviations of the null (`modularity_z`). Undefined measures are NaN here and absent from `scalars()`;
    `notes()` gives the reason.

    Attributes:
        mode: `"correlation"` or `"mostafa2021"`.
        weight: What the edge weights measure.
        adjacency: float64 (k, k), edge weights of the units in the graph.
        units: int64 (k,), their indices in the layer.
        labels: int64 (k,), their communities, 0 the largest; empty if undefined.
        modularity: Modularity of these communities, the best of the runs.
        modularity_null: Mean over graphs of permuted activations, one run each.
        modularity_null_std: Standard deviation over those graphs.
        modularity_excess: Mean of the single runs on the real graph minus `modularity_null`. (Not the best run: the
            best of several exceeds single runs even on noise.)
        modularity_z: `modularity_excess` in units of `modularity_null_std`.
        class_modularity: Mean over classes of the modularity of the class's own graph (mode `"mostafa2021"`).
        num_communities: Number of communities.
        largest_share: Fraction of the units in the largest community.
        nmi_runs: Mean normalised mutual information between runs; low values mean that the partition is arbitrary.
        layer_width: Number of units of the layer.
        num_units: Number of units used (fewer than `layer_width` if `max_units` is smaller).
        num_constant: Number of units, of those used, that never vary.
        num_dead: Number of units, of those used, that are never above zero.
        num_samples: Number of samples used.
        num_nonfinite: Number of samples left out because of NaN or infinite activations.
        reason: Why no measure is defined; empty if they are.
    """

    mode: str
    weight: str
    adjacency: Tensor
    units: Tensor
    labels: Tensor
    modularity: float = NAN
    modularity_null: float = NAN
    modularity_null_std: float = NAN
    modularity_excess: float = NAN
    modularity_z: float = NAN
    class_modularity: float = NAN
    num_communities: int = 0
    largest_share: float = NAN
    nmi_runs: float = NAN
    layer_width: int = 0
    num_units: int = 0
    num_constant: int = 0
    num_dead: int = 0
    num_samples: int = 0
    num_nonfinite: int = 0
    reason: str = ""

    __repr__ = short_repr

    @property
    def defined(self) -> bool:
        """Whether there is a graph with communities."""
        return not self.reason

    def plot(self, *, layer: str = "") -> "Figure":
        """Draw the graph, sorted by community; see `plot_communities`.

        Args:
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.communities.plot import plot_communities

        return plot_communities({layer: self})

    def scalars(self) -> dict[str, float]:
        """Measure -> value, without those that are undefined."""
        values = {
            "modularity": self.modularity,
            "modularity_null": self.modularity_null,
            "modularity_excess": self.modularity_excess,
            "modularity_z": self.modularity_z,
            "class_modularity": self.class_modularity,
            "num_communities": float(self.num_communities) if self.defined else NAN,
            "largest_share": self.largest_share,
            "nmi_runs": self.nmi_runs,
            "dead_share": self.num_dead / self.num_units if self.num_samples > 1 else NAN,
            "constant_share": self.num_constant / self.num_units if self.num_samples > 1 else NAN,
        }
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}

    def notes(self) -> dict[str, str]:
        """Kind -> a warning for the user: samples left out, why nothing is defined, units left out."""
        notes = {}
        if self.num_nonfinite:
            notes["nonfinite"] = nonfinite_note(self.num_nonfinite, self.num_samples)
        if self.reason:
            notes["undefined"] = f"Neuron communities are not defined: {self.reason}."
        if self.num_units < self.layer_width:
            notes["max_units"] = (
                f"Only {self.num_units} of the {self.layer_width} units are used, a fixed random choice. To use all,"
                " increase `max_units`."
            )
        return notes

    def histogram(self) -> Tensor:
        """The positive edge weights, each pair of units once, as a vector."""
        i, j = torch.triu_indices(len(self.units), len(self.units), offset=1)
        weights = self.adjacency[i, j]
        return weights[weights > 0]

    def to_networkx(self, layer: str = "") -> "networkx.Graph":
        """The graph as a networkx graph.

        Args:
            layer: The layer's name, set on every node.

        Returns:
            A graph whose nodes are unit indices with the attributes `unit`, `layer` and `community`, and whose edges
            have a `weight`.
        """
        import networkx

        graph = networkx.Graph()
        units = self.units.tolist()
        communities = self.labels.tolist() if self.defined else [None] * len(units)
        for unit, community in zip(units, communities, strict=True):
            graph.add_node(unit, unit=unit, layer=layer, community=community)
        pairs = torch.nonzero(self.adjacency.triu(diagonal=1))
        weights = self.adjacency[pairs[:, 0], pairs[:, 1]].tolist()
        named = ((units[i], units[j]) for i, j in pairs.tolist())
        graph.add_weighted_edges_from((i, j, w) for (i, j), w in zip(named, weights, strict=True))
        return graph
