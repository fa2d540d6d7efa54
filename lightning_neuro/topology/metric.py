"""The shape of activations as a torchmetrics metric."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.checks import (
    ArgumentError,
    ArrayLike,
    as_activations,
    as_labels,
    check_bool,
    check_int,
    finite_rows,
    require,
)
from lightning_neuro.layer_result import ResultMetric
from lightning_neuro.topology.distances import Matrix, distance_matrix, pairs_of, scale_of
from lightning_neuro.topology.drift import scaled
from lightning_neuro.topology.gaussian_null import null_measures
from lightning_neuro.topology.mapper import mapper_of
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.options import MapperOptions, MapperSettings
from lightning_neuro.topology.persistence import persistence_of_distances
from lightning_neuro.topology.result import TopologyResult
from lightning_neuro.topology.sample_choice import content_order, number_hashes, random_order, rank_and_world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPREAD = ("h0_total", "h0_longest", "h0_entropy", "h1_total", "h1_longest", "h1_entropy")


class ActivationShape(ResultMetric):
    """Computes the Mapper graph and the persistent homology of a layer's activations, one point per sample.

    The points are stored, because both need all of them at once; if there are more than `max_points`, a fixed random
    choice is used. The result does not depend on the order of the points or on how they are distributed over ranks. The
    first `warm_up` computations each estimate a radius of the clusters; that of the next one is frozen, because graphs
    with different radii cannot be compared, and saved in the `state_dict`. It is frozen relative to the .9 quantile of
    the distances, so that rescaling a cloud does not change its graph. The options of torchmetrics are attributes:
    `metric.sync_on_compute = False`.

    Args:
        mapper: See `TopologyOptions`, as for the next six.
        homology: See `TopologyOptions`.
        homology_points: See `TopologyOptions`.
        num_null_samples: See `TopologyOptions`.
        num_subsamples: See `TopologyOptions`.
        warm_up: See `TopologyOptions`.
        max_points: See `TopologyOptions`.
        options: Options of the Mapper graph; see `TopologyOptions`.

    Raises:
        ArgumentError: If an option is invalid; the message names it.

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
        homology_points: int = 256,
        num_null_samples: int = 0,
        num_subsamples: int = 0,
        warm_up: int = 1,
        max_points: int = 10_000,
        **options: Unpack[MapperOptions],
    ) -> None:
        check_bool("mapper", mapper)
        check_bool("homology", homology)
        require(mapper or homology, "homology", "be True if `mapper` is False", homology)
        check_int("homology_points", homology_points, minimum=2)
        check_int("num_null_samples", num_null_samples, minimum=0)
        check_int("num_subsamples", num_subsamples, minimum=0)
        require(num_subsamples != 1, "num_subsamples", "be 0, or at least 2 for a standard deviation", num_subsamples)
        check_int("warm_up", warm_up, minimum=0)
        check_int("max_points", max_points, minimum=2)
        super().__init__()
        self.mapper = mapper
        self.homology = homology
        self.homology_points = homology_points
        self.num_null_samples = num_null_samples
        self.num_subsamples = num_subsamples
        self.warm_up = warm_up
        self.max_points = max_points
        self.settings = MapperSettings(**options)
        self.frozen_eps: float | None = None
        self.evaluations = 0
        self.add_state("width", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")
        # Flat vectors of (sample number, class, activations) rows, so that a rank without samples can still gather.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, activations: ArrayLike, targets: ArrayLike | None = None) -> None:
        """Add a batch.

        Args:
            activations: (N, units) of any real dtype, stored in float32 (float64 stays float64).
            targets: (N,) integer class labels, negative if unlabelled.

        Raises:
            ArgumentError: If a shape or dtype is wrong, or the number of units differs from that of earlier batches.
        """
        points = as_activations(activations, num_units=int(self.width))
        labels = as_labels(targets, len(points))
        self.width = torch.full_like(self.width, points.shape[1])
        # Samples are assigned to ranks in turn, so a sample has the same number for any number of ranks.
        rank, world = rank_and_world()
        number = (torch.arange(len(points)) + int(self.seen)) * world + rank
        self.seen = self.seen + len(points)
        facts = torch.stack([number, torch.full_like(number, -1) if labels is None else labels.cpu()], dim=1)
        self.rows.append(torch.cat([facts.to(points), points], dim=1).flatten())
        if self.seen > 2 * self.max_points:
            self.rows = [self._kept(self._table()).flatten()]

    def compute(self) -> TopologyResult:
        """The shape of all samples so far; undefined measures are left out and explained in the notes."""
        table = self._kept(self._table())
        samples, labels, points = table[:, 0].long().cpu(), table[:, 1].long().cpu(), table[:, 2:]
        targets = labels if (labels >= 0).any() else None
        finite = finite_rows(points)
        order = random_order(samples, labels)[: self.homology_points].to(points.device)
        chosen = order[finite[order]]
        distances = distance_matrix(points[chosen])
        # Angles do not grow with the activations, so cosine distances need no scale.
        scale = scale_of(pairs_of(distances)) if self.settings.distance == "euclidean" else 1.0
        graph: MapperGraph | None = None
        null: dict[str, float] = {}
        if self.mapper:
            graph = self._graph(points, targets, scale)
            if self.num_null_samples:
                measure = self._measures_without_structure
                null = null_measures(points[finite], measure, num_null_samples=self.num_null_samples)
        result = TopologyResult(
            samples,
            graph,
            None,
            scale,
            null,
            num_units=points.shape[1] if self.width else 0,
            num_samples=int(finite.sum()),
            num_nonfinite=int((~finite).sum()),
        )
        return self._with_homology(result, points, distances, chosen, labels, len(order)) if self.homology else result

    def plot(self, result: TopologyResult | None = None, *, layer: str = "") -> "Figure":
        """Draw the Mapper graph, or the persistence diagrams if there is none.

        Args:
            result: The result to draw; default: that of `compute()`.
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        found = self.compute() if result is None else result
        return found.plot(layer=layer)

    def refreeze(self) -> None:
        """Estimate the radius again in the next computation, and freeze it."""
        self.frozen_eps = None
        self.evaluations = max(self.evaluations, self.warm_up)

    def _graph(self, points: Tensor, targets: Tensor | None, scale: float) -> MapperGraph:
        # In an order that depends only on the content, because a point between two clusters joins the first.
        order = content_order(points)
        settings = self.settings
        if settings.eps is None and self.frozen_eps is not None:
            settings = replace(settings, eps=self.frozen_eps * scale)
        graph = mapper_of(points[order.to(points.device)], None if targets is None else targets[order], settings)
        self.evaluations += 1
        # A radius of 0, from coinciding points (a dead layer), would make all points noise once they differ.
        if self.frozen_eps is None and self.evaluations > self.warm_up and graph.num_nodes and graph.eps > 0:
            self.frozen_eps = graph.eps / scale
        return replace(graph, members=tuple(order[own].sort().values for own in graph.members), targets=targets)

    def _measures_without_structure(self, points: Tensor) -> dict[str, float]:
        # With a separate radius: within that of the data most of these points would be noise.
        graph = mapper_of(points, None, replace(self.settings, eps=None))
        return {"num_loops": graph.num_loops(), "num_branches": len(graph.branches())}

    def _with_homology(
        self, result: TopologyResult, points: Tensor, distances: Matrix, chosen: Tensor, labels: Tensor, num_asked: int
    ) -> TopologyResult:
        """Add the homology of the chosen points, whose distances are given, to the result."""
        null = null_measures(points[chosen], _homology_without_structure, num_null_samples=1)
        used = chosen.cpu()
        samples = result.samples[used]
        return replace(
            result,
            homology=persistence_of_distances(distances, num_nonfinite=num_asked - len(chosen)),
            null=dict(result.null) | null,
            spread=self._spread(distances, samples, labels[used]),
            drift_samples=samples,
            drift_distances=torch.from_numpy(scaled(pairs_of(distances))).float(),
        )

    def _spread(self, distances: Matrix, samples: Tensor, labels: Tensor) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for draw in range(1, self.num_subsamples + 1):
            half = random_order(samples, labels, draw)[: -(-len(samples) // 2)].sort().values.numpy()
            scalars = persistence_of_distances(distances[np.ix_(half, half)]).scalars()
            for measure in _SPREAD:
                if measure in scalars:
                    found.setdefault(measure, []).append(scalars[measure])
        return {f"{name}_std": float(np.std(values, ddof=1)) for name, values in found.items() if len(values) > 1}

    def _table(self) -> Tensor:
        flat = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        return (flat if isinstance(flat, Tensor) else torch.zeros(0)).reshape(-1, 2 + max(1, int(self.width)))

    def _kept(self, table: Tensor) -> Tensor:
        """The rows by sample number, at most `max_points` of them, independent of the order of arrival."""
        order = torch.argsort(table[:, 0], stable=True)
        if len(order) > self.max_points:
            lowest = torch.argsort(number_hashes(table[order, 0].long().cpu()))[: self.max_points]
            order = order[lowest.sort().values.to(order.device)]
        return table[order]

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # The samples of this metric come after the incoming ones, so their numbers continue from there.
        theirs = int(incoming_state["width"])
        if self.width and theirs and theirs != int(self.width):
            raise ArgumentError(
                f"The metrics to merge must have the same number of units; got {int(self.width)} and {theirs}."
            )
        if self.rows and int(incoming_state["seen"]):
            table = self._table().clone()
            table[:, 0] += int(incoming_state["seen"]) * rank_and_world()[1]
            self.rows = [table.flatten()]
        super()._reduce_states(incoming_state)

    def get_extra_state(self) -> dict[str, Any]:
        """What is saved in addition to the states: the frozen relative radius, and the number of evaluations."""
        return {"eps": self.frozen_eps, "evaluations": self.evaluations}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the frozen radius.

        Args:
            state: What `get_extra_state` returned.
        """
        self.frozen_eps = state["eps"]
        self.evaluations = state["evaluations"]


def _homology_without_structure(points: Tensor) -> dict[str, float]:
    scalars = persistence_of_distances(distance_matrix(points)).scalars()
    return {name: scalars[name] for name in ("h0_total", "h1_total", "h1_longest")}
