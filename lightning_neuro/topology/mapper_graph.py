"""The Mapper graph: clusters of points as nodes, shared points as edges, and the measures of both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.topology.purity import Purity, compute_purity

MIN_NODE = 10
"""Number of points that a node needs to count in a loop or as a branch, because smaller nodes form both by noise."""


@dataclass(frozen=True, eq=False)
class MapperGraph:
    """The Mapper graph of a cloud of points; all tensors are on the CPU.

    Attributes:
        members: For each node the indices of its points among all points, int64, ascending.
        interval: int64 (nodes,), the interval of the cover in which each cluster was found.
        edges: int64 (edges, 2), pairs of nodes that share a point, the lower node first.
        weights: float64 (edges,), the Jaccard index of the two nodes: shared points over points in either.
        lens_mean: float64 (nodes,), mean lens value of the points.
        mean_activation: float32 (nodes, units), mean of the points.
        num_points: Number of points.
        num_nonfinite: Number of points left out because of NaN or infinite values.
        num_intervals: Number of intervals of the cover.
        eps: Radius of the clusters.
        min_samples: Number of points that make a neighbourhood dense.
        targets: int64 (num_points,) class labels, negative if unlabelled; None without labels.
    """

    members: tuple[Tensor, ...]
    interval: Tensor
    edges: Tensor
    weights: Tensor
    lens_mean: Tensor
    mean_activation: Tensor
    num_points: int
    num_nonfinite: int
    num_intervals: int
    eps: float
    min_samples: int
    targets: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        """Number of clusters."""
        return len(self.members)

    @property
    def num_edges(self) -> int:
        """Number of pairs of clusters that share a point."""
        return len(self.edges)

    @cached_property
    def sizes(self) -> Tensor:
        """int64 (nodes,), number of points in each node."""
        return torch.tensor([len(own) for own in self.members], dtype=torch.int64)

    @cached_property
    def num_noise(self) -> int:
        """Number of finite points that are in no cluster."""
        clustered = len(np.unique(np.concatenate(self.members))) if self.members else 0
        return self.num_points - self.num_nonfinite - clustered

    @property
    def coverage(self) -> float:
        """Fraction of the finite points that are in a cluster; NaN if no point is finite."""
        finite = self.num_points - self.num_nonfinite
        return 1 - self.num_noise / finite if finite else float("nan")

    @cached_property
    def component_of(self) -> Tensor:
        """int64 (nodes,), the connected component of each node."""
        return _components(self.num_nodes, self.edges)

    @property
    def num_components(self) -> int:
        """Number of connected components."""
        return int(self.component_of.max()) + 1 if self.num_nodes else 0

    def num_loops(self, min_size: int = MIN_NODE) -> int:
        """Number of independent cycles (edges - nodes + components) through nodes of at least `min_size` points."""
        large = self.sizes >= min_size
        edges = self.edges[large[self.edges].all(dim=1)]
        left_out = int((~large).sum())  # each of them is a component of its own
        components = int(_components(self.num_nodes, edges).max()) + 1 - left_out if self.num_nodes else 0
        return int(len(edges) - int(large.sum()) + components)

    def branches(self, min_size: int = MIN_NODE) -> Tensor:
        """int64, the nodes of at least `min_size` points with three or more edges."""
        degree = torch.bincount(self.edges.flatten(), minlength=self.num_nodes)
        return torch.nonzero((degree >= 3) & (self.sizes >= min_size)).flatten()

    @cached_property
    def classes(self) -> Tensor:
        """int64, the labels that occur, ascending: the columns of `class_counts` and `class_shares`."""
        labels = np.zeros(0, dtype=np.int64) if self.targets is None else self.targets[self.targets >= 0].numpy()
        return torch.from_numpy(np.unique(labels))

    @cached_property
    def class_counts(self) -> Tensor | None:
        """int64 (nodes, classes), number of points of each of the `classes` in each node; None without labels."""
        if self.targets is None or len(self.classes) == 0:
            return None
        # Only labels that occur have a column: labels may be identities with millions of values.
        labels = [self.targets[own] for own in self.members]
        columns = [torch.searchsorted(self.classes, own[own >= 0]) for own in labels]
        counts = [own.bincount(minlength=len(self.classes)) for own in columns]
        return torch.stack(counts) if counts else torch.zeros(0, len(self.classes), dtype=torch.int64)

    @cached_property
    def class_shares(self) -> Tensor | None:
        """float64 (nodes, classes), class fractions of each node (0 without labelled points); None without labels."""
        if self.class_counts is None:
            return None
        return self.class_counts.double() / self.class_counts.sum(dim=1, keepdim=True).clamp(min=1)

    @cached_property
    def purity(self) -> Purity | None:
        """Purity of the nodes and its value with permuted labels; None without nodes or labels."""
        return None if self.targets is None else compute_purity(self.members, self.targets)

    def scalars(self) -> dict[str, float]:
        """Measure -> value; undefined measures are left out."""
        if self.num_points == self.num_nonfinite:
            return {}
        values: dict[str, float] = {
            "num_nodes": self.num_nodes,
            "num_edges": self.num_edges,
            "num_components": self.num_components,
            "num_loops": self.num_loops(),
            "num_branches": len(self.branches()),
            "coverage": self.coverage,
        }
        if self.purity is not None:
            values["purity"], values["purity_null"] = self.purity.node_wise, self.purity.node_wise_null
            values["class_purity"], values["class_purity_null"] = self.purity.class_wise, self.purity.class_wise_null
            values["majority_share"] = self.purity.majority_share
            values["majority_share_null"] = self.purity.majority_share_null
        return values

    def why_empty(self) -> str:
        """Why the graph has no nodes; empty if it has some."""
        if self.num_nodes:
            return ""
        finite = self.num_points - self.num_nonfinite
        return (
            f"The Mapper graph is empty, because no interval of the cover has {self.min_samples} of the {finite} finite"
            f" points within {self.eps:.3g} of each other. Use more samples, fewer intervals or a larger `eps`."
        )

    def to_networkx(self) -> Any:
        """An undirected `networkx.Graph`: nodes 0, 1, ... with the attributes of `to_json`, edges with `weight`."""
        import networkx as nx

        graph = nx.Graph()
        for node in self._nodes():
            graph.add_node(node.pop("id"), **node)
        for (i, j), weight in zip(self.edges.tolist(), self.weights.tolist(), strict=True):
            graph.add_edge(i, j, weight=weight)
        return graph

    def to_json(self) -> str:
        """The graph as JSON text.

        Returns:
            A JSON object with `nodes` (id, interval, size, lens_mean, members, mean_activation, with labels also
            classes and purity), `edges` (source, target, weight) and the counts and options of the whole graph.
        """
        edges = zip(self.edges.tolist(), self.weights.tolist(), strict=True)
        facts = ("num_points", "num_nonfinite", "num_noise", "num_intervals", "eps", "min_samples")
        return json.dumps(
            {name: getattr(self, name) for name in facts}
            | {"nodes": self._nodes(), "edges": [{"source": i, "target": j, "weight": w} for (i, j), w in edges]}
        )

    def _nodes(self) -> list[dict[str, Any]]:
        shares = self.class_shares
        nodes = []
        for node, own in enumerate(self.members):
            facts: dict[str, Any] = {
                "id": node,
                "interval": int(self.interval[node]),
                "size": len(own),
                "lens_mean": float(self.lens_mean[node]),
                "members": own.tolist(),
                "mean_activation": [float(f"{value:.4g}") for value in self.mean_activation[node].tolist()],
            }
            if shares is not None:
                present = torch.nonzero(shares[node]).flatten().tolist()
                by_share = sorted(present, key=lambda c: -float(shares[node, c]))
                facts["classes"] = {str(int(self.classes[c])): round(float(shares[node, c]), 4) for c in by_share}
                facts["purity"] = 1 / len(present) if present else None
            nodes.append(facts)
        return nodes


def flat_attributes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a node as GraphML can hold them: lists and mappings as JSON text, None left out."""
    return {
        name: json.dumps(value) if isinstance(value, (Sequence, Mapping)) and not isinstance(value, str) else value
        for name, value in facts.items()
        if value is not None
    }


def _components(num_nodes: int, edges: Tensor) -> Tensor:
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    pairs = edges.numpy()
    links = csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(num_nodes, num_nodes))
    if num_nodes == 0:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(connected_components(links, directed=False)[1].astype(np.int64))
