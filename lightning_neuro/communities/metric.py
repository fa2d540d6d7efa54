"""Neuron communities as a torchmetrics metric."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.checks import (
    ArgumentError,
    ArrayLike,
    as_activations,
    as_labels,
    check_choice,
    check_int,
    finite_rows,
    require,
)
from lightning_neuro.communities.algorithms import make_runner, try_algorithm
from lightning_neuro.communities.dense_louvain import Floats
from lightning_neuro.communities.detection import Communities, check_resolution, detect_communities, weighted_modularity
from lightning_neuro.communities.mostafa2021 import class_graphs, sum_graphs
from lightning_neuro.communities.options import MODES, SCORES, WEIGHTS, Mode, Score, Weight
from lightning_neuro.communities.permutation_null import keep_rows, null_graphs, shuffles, stretch
from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.communities.unit_graph import (
    ActivationGraph,
    add_samples,
    graph_of_moments,
    merge_moments,
    moments,
)
from lightning_neuro.layer_result import ResultMetric
from lightning_neuro.ranks import gather_padded, stack_padded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NeuronModularity(ResultMetric):
    """Computes the modularity of a layer's units: how clearly they are separated into groups that are active together.

    Units whose activations are correlated over the samples are joined into a graph, the graph is partitioned into
    communities, and the modularity measures how much of the edge weight lies inside them. It is computed together with
    its null, the value for the same units with each unit's activations shuffled over the samples: only the difference
    from the null is evidence of structure. Modularity describes what the network has fitted; it does not predict
    accuracy.

    In mode `"correlation"` the state is a matrix of sums and at most 2,048 samples, for any number of samples seen, and
    the result does not depend on how these are split into batches or over ranks. Mode `"mostafa2021"` follows the
    paper, class by class, and has to keep all activations and targets (in float32).

    Args:
        mode: See `CommunityOptions`, as for all options.
        weight: Edge weight.
        algorithm: Algorithm that detects communities.
        algorithm_options: Further arguments of a cdlib algorithm.
        resolution: Resolution of the modularity.
        num_runs: Number of runs of the detection.
        num_null_samples: Number of graphs of shuffled activations.
        max_units: Maximum number of units that are used.
        score: Level above which a unit counts as active in mode `"mostafa2021"`.
        seed: Seed of the private generators.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ArgumentError: If an option is invalid, at construction.

    Source:
        S. Mostafa, D. Mondal, "On the Evolution of Neuron Communities in a Deep Learning Architecture",
        arXiv 2106.04693 (2021).

    Example:
        >>> import torch
        >>> signal = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> metric = NeuronModularity()
        >>> metric.update(signal.repeat_interleave(3, dim=1).relu())
        >>> result = metric.compute()
        >>> result.labels.tolist(), result.modularity_z > 2
        ([0, 0, 0, 1, 1, 1], True)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    width: Tensor
    num_nonfinite: Tensor
    num_silent: Tensor
    moments: Tensor
    kept: Tensor
    rows: list[Tensor]

    def __init__(
        self,
        *,
        mode: Mode = "correlation",
        weight: Weight = "correlation",
        algorithm: str = "louvain",
        algorithm_options: Mapping[str, Any] | None = None,
        resolution: float = 1.0,
        num_runs: int = 5,
        num_null_samples: int = 5,
        max_units: int = 1024,
        score: Score = "mean",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("score", score, SCORES)
        check_choice("weight", weight, WEIGHTS)
        check_resolution(resolution)
        check_int("num_runs", num_runs, minimum=1)
        check_int("num_null_samples", num_null_samples, minimum=0)
        check_int("max_units", max_units, minimum=2)
        check_int("seed", seed, minimum=0)
        require(isinstance(algorithm, str), "algorithm", "be a string", algorithm)
        options = {} if algorithm_options is None else algorithm_options
        try_algorithm(algorithm, resolution, options)
        kwargs["dist_sync_fn"] = kwargs.get("dist_sync_fn") or gather_padded
        super().__init__(**kwargs)
        self.mode = mode
        self.weight: Weight = weight
        self.algorithm = algorithm
        self.algorithm_options = dict(options)
        self.resolution = resolution
        self.num_runs = num_runs
        self.num_null_samples = num_null_samples
        self.max_units = max_units
        self.score: Score = score
        self.seed = seed

        self.add_state("width", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")
        if mode == "correlation":
            self.add_state("num_silent", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state("moments", torch.zeros(2, 1, dtype=torch.float64), dist_reduce_fx=merge_moments)
            self.add_state("kept", torch.zeros(0, 1), dist_reduce_fx=keep_rows)
        else:  # flat vectors of (target, activations) rows, so that a rank without samples can still gather
            self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, activations: ArrayLike, targets: ArrayLike | None = None) -> None:
        """Add a batch.

        Args:
            activations: (N, units) of any real dtype.
            targets: (N,) integer class labels, negative if unlabelled; needed by mode `"mostafa2021"` and ignored
                otherwise.

        Raises:
            ArgumentError: If a shape is wrong, or the number of units differs from that of earlier batches.
        """
        values = as_activations(activations, num_units=int(self.width))
        classes = as_labels(targets, len(values)) if self.mode == "mostafa2021" else None
        if self.mode == "mostafa2021" and classes is None:
            raise ArgumentError("`targets` must be given in mode 'mostafa2021', which builds one graph per class.")
        self.width = self.width.new_tensor(values.shape[1])
        finite = finite_rows(values)
        self.num_nonfinite = self.num_nonfinite + (~finite).sum().to(self.num_nonfinite.device)
        values = values[finite].to(self.width.device)
        if values.shape[1] > self.max_units:
            values = values[:, self._chosen()]
        if classes is not None:
            labelled = torch.cat([classes[finite.to(classes.device)].to(values)[:, None], values], dim=1)
            self.rows.append(labelled.float().flatten())
            return
        # State tensors must be usable outside of the inference mode in which `Trainer.validate` runs.
        with torch.inference_mode(False), torch.no_grad():
            self._add(values)

    def _add(self, values: Tensor) -> None:
        self.num_silent = self.num_silent + (values.float() == 0).all(dim=1).sum()
        if self.moments.shape[1] == 1:  # nothing has been seen yet, so the width is not known
            self.moments = moments(values, weight=self.weight)
        else:
            add_samples(self.moments, values, weight=self.weight)
        self.kept = keep_rows(torch.cat([self.kept, values.float()] if len(self.kept) else [values.float()]))

    def compute(self) -> CommunityResult:
        """Find the communities of the samples so far; undefined measures are NaN and explained in the notes."""
        observed = self._observe_moments() if self.mode == "correlation" else self._observe_classes()
        graph = observed.graph
        facts: dict[str, Any] = {
            "mode": self.mode,
            "weight": self.weight if self.mode == "correlation" else "co-activation above the unit's level",
            "adjacency": graph.adjacency,
            "units": graph.units,
            "layer_width": int(self.width),
            "num_units": graph.num_units,
            "num_constant": graph.num_constant,
            "num_dead": graph.num_dead,
            "num_samples": graph.num_samples,
            "num_nonfinite": graph.num_nonfinite,
        }
        if reason := why_undefined(graph):
            return CommunityResult(**facts, labels=torch.zeros(0, dtype=torch.int64), reason=reason)
        found = self._detect(graph.adjacency)
        sizes = found.labels.bincount()
        return CommunityResult(
            **facts | self._against_null(float(np.mean(found.modularities)), observed.null),
            labels=found.labels,
            modularity=found.modularity,
            class_modularity=self._mean_modularity(observed.class_adjacencies),
            num_communities=len(sizes),
            largest_share=int(sizes.max()) / int(sizes.sum()),
            nmi_runs=found.agreement,
        )

    def plot(self, result: CommunityResult | None = None, *, layer: str = "") -> "Figure":
        """Draw the graph with its communities; see `plot_communities`.

        Args:
            result: The result to draw; default: that of `compute()`.
            layer: The layer's name, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        found = self.compute() if result is None else result
        return found.plot(layer=layer)

    def _detect(self, adjacency: Tensor) -> Communities:
        return detect_communities(
            adjacency,
            self.algorithm,
            resolution=self.resolution,
            num_runs=self.num_runs,
            algorithm_options=self.algorithm_options,
        )

    def _chosen(self) -> Tensor:
        """Indices of the units that are used, the same in every batch and on every rank."""
        width = int(self.width)
        if width <= self.max_units:
            return torch.arange(width, device=self.width.device)
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.max_units].sort().values.to(self.width.device)

    def _observe_moments(self) -> "_Observed":
        graph = graph_of_moments(self.moments, weight=self.weight, num_nonfinite=int(self.num_nonfinite))
        rows = self.kept.cpu()[:, graph.units].numpy()

        def null() -> Iterator[Floats]:
            values = stretch(rows, graph.num_samples, int(self.num_silent))
            return null_graphs(values, self.weight, self.num_null_samples, np.random.default_rng(self.seed))

        return _Observed(self._in_layer(graph), null, [])

    def _observe_classes(self) -> "_Observed":
        flat = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        num_units = len(self._chosen())
        rows = (flat if isinstance(flat, Tensor) else torch.zeros(0)).reshape(-1, 1 + num_units).cpu().numpy()
        classes, values = rows[:, 0].astype(np.int64), np.ascontiguousarray(rows[:, 1:].T)
        graphs = class_graphs(values, classes, self.score)
        counts = moments(torch.from_numpy(values.T), weight="correlation")
        varying = graph_of_moments(counts, weight="correlation", num_nonfinite=int(self.num_nonfinite))
        chosen = np.unique(np.concatenate([top for top, _ in graphs])) if graphs else np.zeros(0, dtype=np.int64)
        units = np.intersect1d(chosen, varying.units.numpy())
        graph = ActivationGraph(
            adjacency=torch.from_numpy(sum_graphs(num_units, graphs)[np.ix_(units, units)]),
            units=torch.from_numpy(units),
            num_units=num_units,
            num_constant=varying.num_constant,
            num_dead=varying.num_dead,
            num_samples=varying.num_samples,
            num_nonfinite=varying.num_nonfinite,
        )

        def null() -> Iterator[Floats]:
            rng = np.random.default_rng(self.seed)
            for shuffled in shuffles(values, self.num_null_samples, rng):
                yield sum_graphs(num_units, class_graphs(shuffled, classes, self.score))

        return _Observed(self._in_layer(graph), null, [adjacency for _, adjacency in graphs])

    def _in_layer(self, graph: ActivationGraph) -> ActivationGraph:
        """The graph with unit indices in the layer instead of those among the chosen units."""
        return replace(graph, units=self._chosen().cpu()[graph.units])

    def _against_null(self, mean_run: float, null: Callable[[], Iterator[Floats]]) -> dict[str, float]:
        if self.num_null_samples == 0:
            return {}
        run = make_runner(self.algorithm, self.resolution, self.algorithm_options)
        by_chance = []
        for seed, weights in enumerate(null()):
            linked = weights.any(axis=1)  # units without an edge do not change the modularity
            weights = weights if linked.all() else weights[np.ix_(linked, linked)]
            by_chance.append(weighted_modularity(weights, run(weights, seed), self.resolution) if linked.any() else 0.0)
        mean = float(np.mean(by_chance))
        measures = {"modularity_null": mean, "modularity_excess": mean_run - mean}
        if len(by_chance) > 1:
            std = measures["modularity_null_std"] = float(np.std(by_chance, ddof=1))
            if std > 1e-9:  # it is 0 if every null graph is a single community, whose modularity is 0
                measures["modularity_z"] = (mean_run - mean) / std
        return measures

    def _mean_modularity(self, adjacencies: list[Floats]) -> float:
        linked = [torch.from_numpy(adjacency) for adjacency in adjacencies if adjacency.any()]
        found = [self._detect(adjacency).modularity for adjacency in linked]
        return float(np.mean(found)) if found else float("nan")

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # torchmetrics stacks both states (in forward and merge_state), but an empty one has no width yet.
        theirs = int(incoming_state["width"])
        if self.width and theirs and theirs != self.width:
            raise ArgumentError(f"`incoming_state` must have {int(self.width)} units; got {theirs}.")
        incoming_state = dict(incoming_state)
        for name in ("moments", "kept") if self.mode == "correlation" else ():
            ours, incoming_state[name] = stack_padded([getattr(self, name), incoming_state[name]]).unbind()
            setattr(self, name, ours)
        super()._reduce_states(incoming_state)


@dataclass(frozen=True, eq=False)
class _Observed:
    graph: ActivationGraph
    null: Callable[[], Iterator[Floats]]
    class_adjacencies: list[Floats]


def why_undefined(graph: ActivationGraph) -> str:
    """Why communities are not defined for this graph; an empty string if they are."""
    if graph.num_samples < 3:
        return f"at least 3 finite samples are needed; got {graph.num_samples}"
    if graph.num_dead == graph.num_units:
        return f"all {graph.num_units} units are dead (never above zero)"
    if len(graph.units) < 2:
        return (
            f"at least 2 live units are needed, and of {graph.num_units} units {graph.num_dead} are dead (never above "
            f"zero) and {graph.num_constant} constant"
        )
    if not graph.adjacency.any():
        return f"no two of the {len(graph.units)} live units are active together, so the graph has no edge"
    return ""
