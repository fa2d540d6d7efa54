"""What one evaluation of neuron communities found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import networkx

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class CommunityResult:
    """The communities of one layer's units, how clear they are, and what chance alone would give.

    Read ``modularity`` beside ``modularity_null``: what counts is how far the first lies above the second
    (``modularity_excess``), in standard deviations of chance (``modularity_z``). Undefined numbers are NaN here and
    absent from :meth:`scalars`; :meth:`notes` says why.

    Attributes:
        mode: ``"correlation"`` or ``"mostafa2021"``.
        weight: what an edge weighs.
        adjacency: ``(k, k)`` float64 edge weights of the units in the graph.
        units: ``(k,)`` int64, their indices in the layer.
        labels: ``(k,)`` int64, their communities, 0 the largest; empty where undefined.
        modularity: of these communities, the best of the runs.
        modularity_null: mean over graphs of permuted activations, one run each.
        modularity_null_std: standard deviation over those graphs.
        modularity_excess: mean of the single runs on the real graph, less ``modularity_null``. (Not the best run: the
            best of several would beat single runs even on noise.)
        modularity_z: ``modularity_excess`` in units of ``modularity_null_std``.
        class_modularity: mean over classes of the modularity of the class's own graph (mode ``"mostafa2021"``).
        num_communities: communities found.
        largest_share: share of the units in the largest community.
        seed_agreement: mean normalised mutual information between runs; low means the division is arbitrary.
        layer_width: units of the layer.
        num_units: units looked at (fewer than ``layer_width`` where ``max_units`` is smaller).
        num_constant: of these, units that never vary.
        num_dead: of these, units never above zero.
        num_samples: samples used.
        num_nonfinite: samples left out for NaN or infinity.
        reason: why nothing is defined, or empty.
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
    seed_agreement: float = NAN
    layer_width: int = 0
    num_units: int = 0
    num_constant: int = 0
    num_dead: int = 0
    num_samples: int = 0
    num_nonfinite: int = 0
    reason: str = ""

    @property
    def defined(self) -> bool:
        """Whether there is a graph with communities."""
        return not self.reason

    def scalars(self) -> dict[str, float]:
        """The measures by name, without those that are undefined."""
        values = {
            "modularity": self.modularity,
            "modularity_null": self.modularity_null,
            "modularity_excess": self.modularity_excess,
            "modularity_z": self.modularity_z,
            "class_modularity": self.class_modularity,
            "num_communities": float(self.num_communities) if self.defined else NAN,
            "largest_share": self.largest_share,
            "seed_agreement": self.seed_agreement,
            "dead_share": (self.num_dead + self.num_constant) / self.num_units if self.num_samples > 1 else NAN,
        }
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}

    def notes(self) -> dict[str, str]:
        """What the user must be told: kind to sentence."""
        notes = {}
        if self.num_nonfinite:
            total = self.num_nonfinite + self.num_samples
            notes["nonfinite"] = f"{self.num_nonfinite} of {total} samples held NaN or infinity and were left out."
        if self.reason:
            notes["undefined"] = f"Neuron communities are not defined: {self.reason}."
        if self.num_units < self.layer_width:
            notes["max_units"] = (
                f"The layer has {self.layer_width} units; a fixed random choice of {self.num_units} was looked at "
                "(max_units)."
            )
        return notes

    def histogram(self) -> Tensor:
        """The positive edge weights, each pair of units once, as a vector."""
        i, j = torch.triu_indices(len(self.units), len(self.units), offset=1)
        weights = self.adjacency[i, j]
        return weights[weights > 0]

    def to_networkx(self, layer: str = "") -> networkx.Graph:
        """The graph for networkx: nodes are unit indices with unit, layer, community; edges have weight.

        Args:
            layer: the layer's name, set on every node.
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
