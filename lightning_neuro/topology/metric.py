"""The shape of activations as a torchmetrics metric."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.metric import ResultMetric
from lightning_neuro.samples import stratified
from lightning_neuro.topology.clustering import check_clustering
from lightning_neuro.topology.cover import Lens, check_cover
from lightning_neuro.topology.distances import Matrix, distance_matrix, scale_of
from lightning_neuro.topology.graph import MapperGraph
from lightning_neuro.topology.inputs import as_labels, as_points, check_whole, finite_rows
from lightning_neuro.topology.mapper import mapper as mapper_graph
from lightning_neuro.topology.null import null_measures
from lightning_neuro.topology.persistence import condensed, persistence_of_distances, scaled
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOMOLOGY_POINTS = 1000
DRIFT_POINTS = 256
_SPREAD = ("h0_total", "h0_longest", "h0_entropy", "h1_total", "h1_longest", "h1_entropy")


class ActivationShape(ResultMetric):
    """The Mapper graph and the homology of a layer's activations, one point a sample.

    The points are kept, because both need them all at once; of more than `max_points` a fixed choice. It does not
    matter in which order, or on which rank, they came. The radius of the clusters is found anew in the first `warm_up`
    computations and then frozen, because graphs of different radii cannot be compared, and goes into the `state_dict`.
    It is frozen in units of the .9 quantile of the distances: a cloud that only grows keeps its graph.

    Args:
        mapper: Whether to build the Mapper graph.
        homology: Whether to find pieces and loops, in at most 1,000 of the points.
        subsamples: Random halves of the points, stratified by class, whose spread is the measures' error bar; 0: none.
        lens: See :func:`mapper`; so for the next five.
        intervals: See :func:`mapper`.
        overlap: See :func:`mapper`.
        cover: See :func:`mapper`.
        distance: Of the Mapper graph, `"euclidean"` or `"cosine"`.
        eps: See :func:`mapper`; a radius given is used as it is, however much activations grow.
        min_samples: See :func:`mapper`.
        warm_up: Computations before the radius is frozen.
        max_points: Points kept.
        kwargs: Further options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: At construction, for an option that is none; it is named.

    Example:
        >>> import torch
        >>> metric = ActivationShape()
        >>> metric.update(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).relu())
        >>> result = metric.compute()
        >>> result.graph.coverage > 0.9, len(result.homology.diagrams[0])
        (True, 199)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    width: Tensor
    seen: Tensor
    rows: list[Tensor]

    def __init__(
        self,
        *,
        mapper: bool = True,
        homology: bool = True,
        subsamples: int = 3,
        lens: Lens = "l2",
        intervals: int | None = None,
        overlap: float = 0.3,
        cover: str = "uniform",
        distance: str = "euclidean",
        eps: float | None = None,
        min_samples: int = 5,
        warm_up: int = 1,
        max_points: int = 10_000,
        **kwargs: Any,
    ) -> None:
        for name, switch in (("mapper", mapper), ("homology", homology)):
            if not isinstance(switch, bool):
                raise ValueError(f"{name} must be True or False, but it is {switch!r}.")
        if not mapper and not homology:
            raise ValueError("mapper and homology are both False, so there is nothing to measure.")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance must be 'euclidean' or 'cosine', but it is {distance!r}.")
        check_cover(lens, intervals, overlap, cover)
        check_clustering(distance, eps, min_samples)
        check_whole("subsamples", subsamples, at_least=0)
        if subsamples == 1:
            raise ValueError("subsamples must be 0, or at least 2 for a spread, but it is 1.")
        check_whole("warm_up", warm_up, at_least=0)
        check_whole("max_points", max_points, at_least=2)
        super().__init__(**kwargs)
        self.mapper, self.homology, self.subsamples = mapper, homology, subsamples
        self.graph_options: dict[str, Any] = {
            **{"lens": lens, "intervals": intervals, "overlap": overlap, "cover": cover, "metric": distance},
            "min_samples": min_samples,
        }
        self.eps, self.warm_up, self.max_points = eps, warm_up, max_points
        self.frozen_eps: float | None = None
        self.evaluations = 0
        self.add_state("width", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")
        # Flat vectors of (sample number, class, activations) rows: a rank without samples then still gathers.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            activations: (N, units) of any real dtype, kept in float32 (float64 stays).
            targets: (N,) integer classes, negative where there is none.

        Raises:
            ValueError: If a shape is wrong, or the number of units is not that of the earlier batches.
        """
        points = as_points(activations, "activations")
        labels = as_labels(targets, len(points))
        if self.width and self.width != points.shape[1]:
            raise ValueError(
                f"activations must have {int(self.width)} units like the earlier ones, but have {points.shape[1]}."
            )
        self.width = torch.full_like(self.width, points.shape[1])
        # The number of a sample is the same however the samples are dealt out to ranks, one at a time to each.
        rank, world = _rank_and_world()
        number = (torch.arange(len(points)) + int(self.seen)) * world + rank
        self.seen = self.seen + len(points)
        facts = torch.stack([number, torch.full_like(number, -1) if labels is None else labels], dim=1)
        self.rows.append(torch.cat([facts.to(points), points], dim=1).flatten())
        if self.seen > 2 * self.max_points:
            self.rows = [self._kept(self._table()).flatten()]

    def compute(self) -> TopologyResult:
        """The shape of what was seen so far; undefined measures are left out and explained, never an error."""
        table = self._kept(self._table())
        samples, labels, points = table[:, 0].long().cpu(), table[:, 1].long().cpu(), table[:, 2:]
        targets = labels if (labels >= 0).any() else None
        order = _choice(samples, labels, draw=0)[:HOMOLOGY_POINTS].to(points.device)
        chosen = order[finite_rows(points[order])]
        distances = distance_matrix(points[chosen])
        # Angles do not grow with the activations, so cosine distances need no scale.
        scale = scale_of(distances) if self.graph_options["metric"] == "euclidean" else 1.0
        graph: MapperGraph | None = None
        null: dict[str, float] = {}
        if self.mapper:
            graph = self._graph(points, targets, scale)
            null = null_measures(points[finite_rows(points)], self._graph_without_structure, draws=3)
        if not self.homology:
            return TopologyResult(samples, graph, None, scale, null)
        used = chosen.cpu()
        return TopologyResult(
            samples,
            graph,
            persistence_of_distances(distances, num_nonfinite=len(order) - len(chosen)),
            scale,
            null=null | null_measures(points[chosen], _homology_without_structure, draws=1),
            spread=self._spread(distances, samples[used], labels[used]),
            drift_samples=samples[used[:DRIFT_POINTS]],
            drift_distances=condensed(scaled(distances[:DRIFT_POINTS, :DRIFT_POINTS])),
        )

    def plot(self, result: TopologyResult | None = None) -> "Figure":
        """Draw the Mapper graph, or without one the diagrams.

        Args:
            result: What to draw, by default what `compute` returns.
        """
        from lightning_neuro.topology.plot import plot_graphs
        from lightning_neuro.topology.plot_homology import plot_homology

        results = {"": self.compute() if result is None else result}
        return plot_graphs(results) if results[""].graph is not None else plot_homology(results)

    def refreeze(self) -> None:
        """Find the radius anew in the next computation, and freeze that."""
        self.frozen_eps, self.evaluations = None, max(self.evaluations, self.warm_up)

    def _graph(self, points: Tensor, targets: Tensor | None, scale: float) -> MapperGraph:
        # In an order of their own: a point between two clusters goes to the first.
        order = _by_content(points)
        eps = self.frozen_eps * scale if self.eps is None and self.frozen_eps is not None else self.eps
        labels = None if targets is None else targets[order]
        graph = mapper_graph(points[order.to(points.device)], targets=labels, eps=eps, **self.graph_options)
        self.evaluations += 1
        # A radius of 0, of points that coincide (a dead layer), would leave every point alone once they part.
        if self.frozen_eps is None and self.evaluations > self.warm_up and graph.num_nodes and graph.eps > 0:
            self.frozen_eps = graph.eps / scale
        return replace(graph, members=tuple(order[own].sort().values for own in graph.members), targets=targets)

    def _graph_without_structure(self, points: Tensor) -> dict[str, float]:
        # With a radius of its own: by that of the data most of these points would be alone.
        graph = mapper_graph(points, **self.graph_options)
        return {"loops": graph.large_loops(), "branches": len(graph.branches())}

    def _spread(self, distances: Matrix, samples: Tensor, labels: Tensor) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for draw in range(1, self.subsamples + 1):
            half = _choice(samples, labels, draw)[: -(-len(samples) // 2)].sort().values.numpy()
            scalars = persistence_of_distances(distances[np.ix_(half, half)]).scalars()
            for measure in _SPREAD:
                if measure in scalars:
                    found.setdefault(measure, []).append(scalars[measure])
        return {f"{name}_std": float(np.std(values, ddof=1)) for name, values in found.items() if len(values) > 1}

    def _table(self) -> Tensor:
        flat = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        return (flat if isinstance(flat, Tensor) else torch.zeros(0)).reshape(-1, 2 + max(1, int(self.width)))

    def _kept(self, table: Tensor) -> Tensor:
        """The rows by sample number, at most `max_points` of them, whatever the order in which they came."""
        order = torch.argsort(table[:, 0], stable=True)
        if len(order) > self.max_points:
            lowest = torch.argsort(_hashed(table[order, 0].long().cpu()))[: self.max_points]
            order = order[lowest.sort().values.to(order.device)]
        return table[order]

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # Our samples come after the incoming ones, so they are numbered on from there.
        theirs = int(incoming_state["width"])
        if self.width and theirs and theirs != int(self.width):
            raise ValueError(f"metrics to merge must have seen one width, but saw {int(self.width)} and {theirs}.")
        if self.rows and int(incoming_state["seen"]):
            table = self._table().clone()
            table[:, 0] += int(incoming_state["seen"]) * _rank_and_world()[1]
            self.rows = [table.flatten()]
        super()._reduce_states(incoming_state)

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the states: the frozen radius, in units of the scale."""
        return {"eps": self.frozen_eps, "evaluations": self.evaluations}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the frozen radius.

        Args:
            state: What `get_extra_state` gave.
        """
        self.frozen_eps, self.evaluations = state["eps"], state["evaluations"]


def _homology_without_structure(points: Tensor) -> dict[str, float]:
    scalars = persistence_of_distances(distance_matrix(points)).scalars()
    return {name: scalars[name] for name in ("h0_total", "h1_total", "h1_longest")}


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _hashed(numbers: Tensor, draw: int = 0) -> Tensor:
    """A number for each sample number that looks random and is always the same (splitmix64)."""
    z = (numbers.numpy().astype(np.uint64) + np.uint64(draw << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((z >> np.uint64(1)).astype(np.int64))


def _choice(samples: Tensor, labels: Tensor, draw: int) -> Tensor:
    """An order of the samples, the same all run, in which every beginning is spread evenly over the classes."""
    order = torch.argsort(_hashed(samples, draw), stable=True)
    return order[stratified(labels[order])] if len(order) else order


def _by_content(points: Tensor) -> Tensor:
    """An order of the rows that depends on nothing but what is in them."""
    rows = np.ascontiguousarray(points.cpu().numpy())
    if len(rows) == 0:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel().argsort(kind="stable"))
