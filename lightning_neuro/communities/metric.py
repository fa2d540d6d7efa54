"""Neuron communities as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.communities.detection import (
    NO_OPTIONS,
    check_algorithm,
    check_count,
    check_resolution,
    detect_communities,
    quality,
    runner,
)
from lightning_neuro.communities.graph import (
    ActivationGraph,
    add_samples,
    check_weight,
    finite_rows,
    graph_of_moments,
    merge_moments,
    moments,
)
from lightning_neuro.communities.louvain import Floats
from lightning_neuro.communities.mostafa2021 import SCORES, class_graphs, sum_graphs
from lightning_neuro.communities.null import keep_rows, null_graphs, shuffles, stretch
from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.metric import ResultMetric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("correlation", "mostafa2021")


class NeuronModularity(ResultMetric):
    """How sharply a layer's units fall apart into groups that act together.

    Units that rise and fall together over the samples are joined into a graph, the graph is divided into communities,
    and the modularity says how much of the weight lies inside them. Beside it stands what the same units give when each
    one's activations are shuffled over the samples: only the distance to that is structure. It describes what the
    network has fitted; it does not predict accuracy.

    In mode ``"correlation"`` the state is a matrix of sums and at most 2,048 samples, however many are seen; batches,
    shards and ranks merge to what a single pass gives. Mode ``"mostafa2021"`` follows the paper, class by class, and
    has to keep all activations and targets (in float32).

    Args:
        mode: ``"correlation"`` or ``"mostafa2021"``.
        weight: edge weight of mode ``"correlation"``: ``"correlation"``, ``"correlation_squared"``, ``"phi"`` or
            ``"coactivation"``; see :func:`activation_graph`.
        algorithm: ``"louvain"``, or the name of a crisp algorithm of ``cdlib.algorithms``.
        resolution: above 1 finds more and smaller communities, below 1 fewer and larger ones.
        seeds: runs on the graph; the best one is reported.
        null_draws: graphs of shuffled activations, one run each; 0 for no null.
        max_units: a wider layer is represented by a fixed random choice of this many units.
        algorithm_options: further arguments of a cdlib algorithm.
        score: level of a unit in mode ``"mostafa2021"``: ``"mean"`` or ``"frequency"``.
        seed: of the private generators for the null and for ``max_units``.
        kwargs: further options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: at construction, if an option is outside what is said above.

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
        mode: str = "correlation",
        weight: str = "correlation",
        algorithm: str = "louvain",
        resolution: float = 1.0,
        seeds: int = 5,
        null_draws: int = 10,
        max_units: int = 2048,
        algorithm_options: Mapping[str, Any] | None = None,
        score: str = "mean",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, but it is {mode!r}.")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, but it is {score!r}.")
        check_weight(weight)
        check_resolution(resolution)
        for name, value, least in (("seeds", seeds, 1), ("null_draws", null_draws, 0), ("max_units", max_units, 2)):
            check_count(name, value, at_least=least)
        check_count("seed", seed, at_least=0)
        check_algorithm(algorithm, algorithm_options)
        runner(algorithm, resolution, algorithm_options or NO_OPTIONS)  # refuses a resolution the algorithm lacks
        kwargs["dist_sync_fn"] = kwargs.get("dist_sync_fn") or gather_padded
        super().__init__(**kwargs)
        self.mode, self.weight, self.algorithm, self.resolution, self.seeds = mode, weight, algorithm, resolution, seeds
        self.null_draws, self.max_units, self.score, self.seed = null_draws, max_units, score, seed
        self.algorithm_options = dict(algorithm_options or {})

        self.add_state("width", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")
        if mode == "correlation":
            self.add_state("num_silent", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state("moments", torch.zeros(2, 1, dtype=torch.float64), dist_reduce_fx=merge_moments)
            self.add_state("kept", torch.zeros(0, 1), dist_reduce_fx=keep_rows)
        else:  # flat vectors of (target, activations) rows: a rank without samples then still gathers
            self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            activations: ``(N, units)`` of any real dtype.
            targets: ``(N,)`` integer classes, negative where there is none; needed by mode ``"mostafa2021"`` and not
                looked at otherwise.

        Raises:
            ValueError: if a shape is wrong, or the number of units is not that of the earlier batches.
        """
        values, num_nonfinite = finite_rows(activations)
        if self.width and self.width != values.shape[1]:
            raise ValueError(
                f"activations must have {int(self.width)} units like the earlier ones, but have {values.shape[1]}."
            )
        classes = self._check_targets(activations, targets) if self.mode == "mostafa2021" else None
        self.width = self.width.new_tensor(values.shape[1])
        values = values.to(self.width.device)
        if values.shape[1] > self.max_units:
            values = values[:, self._chosen()]
        self.num_nonfinite = self.num_nonfinite + num_nonfinite
        if classes is not None:
            if num_nonfinite:
                classes = classes[activations.float().isfinite().all(dim=1)]
            self.rows.append(torch.cat([classes.to(values)[:, None], values], dim=1).float().flatten())
            return
        # What is kept must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            self._add(values)

    def _add(self, values: Tensor) -> None:
        self.num_silent = self.num_silent + (values.float() == 0).all(dim=1).sum()
        if self.moments.shape[1] == 1:  # has seen nothing yet, not even the width
            self.moments = moments(values, weight=self.weight)
        else:
            add_samples(self.moments, values, weight=self.weight)
        self.kept = keep_rows(torch.cat([self.kept, values.float()] if len(self.kept) else [values.float()]))

    def compute(self) -> CommunityResult:
        """Find the communities of what was seen so far; undefined measures are NaN and explained, never an error."""
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
        found = detect_communities(
            graph.adjacency, self.algorithm, self.resolution, self.seeds, algorithm_options=self.algorithm_options
        )
        sizes = found.labels.bincount()
        return CommunityResult(
            **facts | self._against_null(float(np.mean(found.modularities)), observed.null),
            labels=found.labels,
            modularity=found.modularity,
            class_modularity=self._mean_modularity(observed.class_adjacencies),
            num_communities=len(sizes),
            largest_share=int(sizes.max()) / int(sizes.sum()),
            seed_agreement=found.agreement,
        )

    def plot(self, result: CommunityResult | None = None) -> Figure:
        """Draw the graph with its communities; see :func:`plot_communities`.

        Args:
            result: what to draw, by default what :meth:`compute` returns.
        """
        from lightning_neuro.communities.plot import plot_communities

        return plot_communities({"": self.compute() if result is None else result})

    def _check_targets(self, activations: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise ValueError("targets must be given in mode 'mostafa2021', which builds one graph per class.")
        integers = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
        if not integers or targets.shape != activations.shape[:1]:
            seen = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets must be integer classes of shape ({len(activations)},), but got {seen}.")
        return targets.detach().long()

    def _chosen(self) -> Tensor:
        """Indices of the units that are looked at, the same in every batch and on every rank."""
        width = int(self.width)
        if width <= self.max_units:
            return torch.arange(width, device=self.width.device)
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.max_units].sort().values.to(self.width.device)

    def _observe_moments(self) -> _Observed:
        graph = graph_of_moments(self.moments, weight=self.weight, num_nonfinite=int(self.num_nonfinite))
        rows = self.kept.cpu()[:, graph.units].numpy()

        def null() -> Iterator[Floats]:
            values = stretch(rows, graph.num_samples, int(self.num_silent))
            return null_graphs(values, self.weight, self.null_draws, np.random.default_rng(self.seed))

        return _Observed(self._in_layer(graph), null, [])

    def _observe_classes(self) -> _Observed:
        flat = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        num_units = len(self._chosen())
        rows = (flat if isinstance(flat, Tensor) else torch.zeros(0)).reshape(-1, 1 + num_units).cpu().numpy()
        classes, values = rows[:, 0].astype(np.int64), np.ascontiguousarray(rows[:, 1:].T)
        graphs = class_graphs(values, classes, self.score)
        counts = moments(torch.from_numpy(values.T), weight="correlation")
        lively = graph_of_moments(counts, weight="correlation", num_nonfinite=int(self.num_nonfinite))
        chosen = np.unique(np.concatenate([top for top, _ in graphs])) if graphs else np.zeros(0, dtype=np.int64)
        units = np.intersect1d(chosen, lively.units.numpy())
        graph = ActivationGraph(
            adjacency=torch.from_numpy(sum_graphs(num_units, graphs)[np.ix_(units, units)]),
            units=torch.from_numpy(units),
            num_units=num_units,
            num_constant=lively.num_constant,
            num_dead=lively.num_dead,
            num_samples=lively.num_samples,
            num_nonfinite=lively.num_nonfinite,
        )

        def null() -> Iterator[Floats]:
            rng = np.random.default_rng(self.seed)
            for shuffled in shuffles(values, self.null_draws, rng):
                yield sum_graphs(num_units, class_graphs(shuffled, classes, self.score))

        return _Observed(self._in_layer(graph), null, [adjacency for _, adjacency in graphs])

    def _in_layer(self, graph: ActivationGraph) -> ActivationGraph:
        """Unit indices in the layer in place of those in the choice."""
        return ActivationGraph(**{**vars(graph), "units": self._chosen().cpu()[graph.units]})

    def _against_null(self, mean_run: float, null: Callable[[], Iterator[Floats]]) -> dict[str, float]:
        if self.null_draws == 0:
            return {}
        run = runner(self.algorithm, self.resolution, self.algorithm_options)
        by_chance = []
        for draw, weights in enumerate(null()):
            linked = weights.any(axis=1)  # units without an edge do not change the modularity
            weights = weights if linked.all() else weights[np.ix_(linked, linked)]
            by_chance.append(quality(weights, run(weights, draw), self.resolution) if linked.any() else 0.0)
        mean = float(np.mean(by_chance))
        measures = {"modularity_null": mean, "modularity_excess": mean_run - mean}
        if len(by_chance) > 1:
            std = measures["modularity_null_std"] = float(np.std(by_chance, ddof=1))
            if std > 1e-9:  # not so where every draw is one single community, for which the modularity is 0
                measures["modularity_z"] = (mean_run - mean) / std
        return measures

    def _mean_modularity(self, adjacencies: list[Floats]) -> float:
        linked = [torch.from_numpy(adjacency) for adjacency in adjacencies if adjacency.any()]
        options = self.algorithm_options
        found = [
            detect_communities(one, self.algorithm, self.resolution, self.seeds, algorithm_options=options).modularity
            for one in linked
        ]
        return float(np.mean(found)) if found else float("nan")

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # torchmetrics stacks the two sides (in forward and merge_state), but one that has seen nothing has no width yet
        theirs = int(incoming_state["width"])
        if self.width and theirs and theirs != self.width:
            raise ValueError(f"metrics to merge must have seen one width, but saw {int(self.width)} and {theirs}.")
        incoming_state = dict(incoming_state)
        for name in ("moments", "kept") if self.mode == "correlation" else ():
            ours, incoming_state[name] = stack_padded([getattr(self, name), incoming_state[name]])
            setattr(self, name, ours)
        super()._reduce_states(incoming_state)


@dataclass(frozen=True)
class _Observed:
    graph: ActivationGraph
    null: Callable[[], Iterator[Floats]]
    class_adjacencies: list[Floats]


def why_undefined(graph: ActivationGraph) -> str:
    """Why this graph can have no communities, or an empty string."""
    if graph.num_samples < 3:
        return f"at least 3 finite samples are needed and there were {graph.num_samples}"
    if graph.num_dead == graph.num_units:
        return f"all {graph.num_units} units are dead (never above zero)"
    if len(graph.units) < 2:
        return (
            f"at least 2 live units are needed, and of {graph.num_units} units {graph.num_dead} are dead (never above "
            f"zero) and {graph.num_constant} constant"
        )
    if not graph.adjacency.any():
        return f"no two of the {len(graph.units)} live units act together, so the graph has no edge"
    return ""


def stack_padded(parts: list[Tensor]) -> Tensor:
    """Stack matrices of different sizes, filled up with zeros (which both packed states read as "nothing")."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    return torch.stack([F.pad(part, (0, width - part.shape[1], 0, height - part.shape[0])) for part in parts])


def gather_padded(result: Tensor, group: Any | None = None) -> list[Tensor]:
    """Gather one state from all ranks; those that have seen fewer samples, or none, are filled up with zeros."""
    parts = gather_all_tensors(result, group)
    return list(stack_padded(parts)) if result.ndim == 2 else parts
