"""The shape of activation space as training curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro import logging
from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.isolation import why_off
from lightning_neuro.probe import Probe, ProbeBatch
from lightning_neuro.topology.cover import Lens
from lightning_neuro.topology.export import write_graphs
from lightning_neuro.topology.layout import layout, point_positions
from lightning_neuro.topology.metric import ActivationShape
from lightning_neuro.topology.persistence import drift_of_distances, expanded
from lightning_neuro.topology.plot import plot_graphs
from lightning_neuro.topology.plot_homology import plot_homology
from lightning_neuro.topology.result import TopologyResult
from lightning_neuro.topology.thumbnails import plot_members, thumbnails

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 2048

_GRAPH_CHARTS = {
    "purity, with permuted labels, at the start": ("purity", "purity_null", "purity_initial"),
    "share of the samples in clusters": ("coverage",),
}
_HOMOLOGY_CHARTS = {
    "loops' total length, in a Gaussian cloud": ("h1_total", "h1_total_null"),
    "pieces' total length, in a Gaussian cloud": ("h0_total", "h0_total_null"),
    "drift since the last evaluation and the first": ("drift", "drift_from_start"),
}


class ActivationTopology(MetricCallback):
    """Shows the shape of activation space, layer by layer, while the network trains.

    Each sample is a point in the space of a layer's units. A Mapper graph shows which samples lie together and how
    groups hang together; persistent homology counts the pieces and loops of the cloud over all distances. The samples
    are the same all run. Purity well above its null says that the layer tells classes apart. Whether the topology
    should grow simpler or richer in training is open: reports disagree, so no direction is the healthy one. Loops and
    branches mean something only above their null.

    Args:
        probe: Which samples, which layers, when; see `Probe`. For the points of the paper, one random position of each
            image, `Probe(reduction="random")`.
        mapper: Whether to build Mapper graphs.
        homology: Whether to find pieces and loops, in at most 1,000 of the samples.
        subsamples: Random halves of the samples, stratified by class, whose spread is the error bar of the homology's
            measures; 0 for none.
        lens: What orders the samples: `"l2"` norm, `"l1"` norm, `"knn"` distance to the fifth nearest other sample,
            `"pc1"` first principal component, or a function of the (N, units) activations.
        intervals: Of the lens; default: the cube root of the number of samples.
        overlap: Share of an interval that it shares with the next, at least 0 and below 1.
        cover: `"uniform"` intervals, or `"quantile"` for equally many samples in each.
        distance: Of the clusters: `"euclidean"` or `"cosine"`.
        eps: Radius of the clusters; default: found in the data. A radius given is used as it is, however much
            activations grow.
        min_samples: Samples within the radius that make a cluster's core.
        warm_up: Evaluations with a radius of their own, the one before training included; the radius of the next is
            frozen, because graphs of different radii cannot be compared. It is frozen in units of the .9 quantile of
            the distances, because activations can grow a hundredfold in the first epochs. Where `coverage` falls all
            the same, call `refreeze`.
        max_points: Of more samples (tokens), a fixed choice is looked at.
        projector: Whether to write the activations to TensorBoard's projector at the end of the run (on rank 0, that
            rank's samples).
        name: First part of the keys, instead of `topology`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        on_error: `"warn"` or `"raise"`.

    Keys:
        Each as `topology/<measure>/<layer>`, and as `topology/<measure>` for the mean over layers. Lengths are in units
        of the .9 quantile of the layer's distances.

        ========================= ========================================================= ============ ============
        measure                   meaning                                                   range        better when
        ========================= ========================================================= ============ ============
        `nodes`, `edges`          clusters; pairs of clusters that share samples            0 ..         neither
        `components`              pieces of the graph                                       0 ..         neither
        `loops`, `loops_null`     cycles through nodes of 10 or more samples; the mean of   0 ..         above null:
                                  3 Gaussian clouds of the same mean and covariance                      structure
        `branches`,               such nodes in which 3 or more edges meet; in the          0 ..         above null:
        `branches_null`           Gaussian clouds                                                        structure
        `coverage`                share of the samples that are in a cluster                0 .. 1       high: trust it
        `eps`                     radius of the clusters                                    0 ..         (parameter)
        `purity`, `purity_null`   mean over nodes of 1 / classes in it; the mean of 20      0 .. 1       above null
                                  permutations of the labels
        `class_purity`, `_null`   the same, class by class and sample by sample             0 .. 1       above null
        `majority_share`, `_null` share of the samples in their node's largest class        0 .. 1       above null
        `purity_initial`          `purity` before the first training step                   0 .. 1       (reference)
        `h0_total`, `_null`       summed distances at which pieces merge; of a Gaussian one 0 ..         neither
        `h0_half`                 distance at which half of the pieces have merged          0 ..         neither
        `h0_longest`              distance at which the last two pieces merge               0 ..         neither
        `h0_entropy`              evenness of these distances; 0 with fewer than two        0 .. 1       neither
        `h1_total`, `_null`       summed lives of the loops; the same in a Gaussian cloud   0 ..         above null:
        `h1_longest`, `_null`     the longest life of a loop; the same in a Gaussian cloud  0 ..         structure
        `h1_entropy`              evenness of the loops' lives; 0 with fewer than two       0 .. 1       neither
        `h1_peak`                 largest number of loops alive at one distance             0 ..         neither
        `h1_unfinished`           loops not followed to their end; their lives are bounds   0 ..         low
        `..._std`                 spread of totals, longest and entropies over the halves   0 ..         (error bar)
        `drift`                   RTD-Lite to the previous evaluation, in at most 256       0 ..         low: settled
                                  samples; from the second evaluation on
        `drift_from_start`        RTD-Lite to the first evaluation                          0 ..         neither
        ========================= ========================================================= ============ ============

    Also figures (`topology/graphs`, `topology/homology`, and, where inputs are images, `topology/members`: samples of
    the largest nodes), a histogram of the merging distances (`topology/merge_distances/<layer>`), and, at the end of
    the run, `lightning_neuro/topology/<layer>.graphml` and `.json` in the log directory.

    Raises:
        ValueError: For a wrong option, at construction.

    Source:
        A. Rathore, N. Chalapathi, S. Palande, B. Wang, "TopoAct: Visually Exploring the Shape of Activations in Deep
        Learning", arXiv 1912.06332 (2021); purity after E. Purvine et al., arXiv 2212.00222; drift: RTD-Lite.

    Example:
        >>> callback = ActivationTopology(Probe(layers="relu*"), prog_bar="topology/purity")
    """

    family = "topology"
    baselines = ("purity",)
    charts = _GRAPH_CHARTS | _HOMOLOGY_CHARTS
    histogram_name = "merge_distances"
    meanings = {  # noqa: RUF012
        "purity": "clusters hold few classes: mean of 1 / classes in a cluster",
        "purity_null": "the same with permuted labels: no structure",
        "coverage": "share of the samples that are in a cluster",
        "h1_total": "summed lives of the loops in activation space",
        "h1_total_null": "the same in a Gaussian cloud of the same covariance",
        "drift": "change of shape since the previous evaluation (RTD-Lite)",
    }

    def __init__(
        self,
        probe: Probe | None = None,
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
        projector: bool = False,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        if not isinstance(projector, bool):
            raise ValueError(f"projector must be True or False, but it is {projector!r}.")
        metric = ActivationShape(
            mapper=mapper,
            homology=homology,
            subsamples=subsamples,
            lens=lens,
            intervals=intervals,
            overlap=overlap,
            cover=cover,
            distance=distance,
            eps=eps,
            min_samples=min_samples,
            warm_up=warm_up,
            max_points=max_points,
        )
        super().__init__(metric, probe, name=name, prog_bar=prog_bar, on_error=on_error)
        self.projector = projector
        self.charts = (_GRAPH_CHARTS if mapper else {}) | (_HOMOLOGY_CHARTS if homology else {})
        self._images: list[Tensor] = []
        self._shown = 0
        self._rows_per_sample: dict[str, int] = {}
        self._world_size = 1

    def refreeze(self) -> None:
        """Find each layer's radius anew at the next evaluation, and freeze it again."""
        for layer in self._saved_metrics:  # just resumed: the radius waits there for the next evaluation
            if layer not in self._metrics:
                self.metric_at(layer, torch.device("cpu"))
        for metric in self._metrics.values():
            if isinstance(metric, ActivationShape):
                metric.refreeze()

    # The samples' images

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Share the pass with the callbacks that have an equal probe; forget the images of an earlier run."""
        super().setup(trainer, pl_module, stage)
        self._images = []

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Get ready for a pass of the probe."""
        self._shown, self._world_size = 0, trainer.world_size
        super().begin(trainer, pl_module)

    def observe(self, batch: ProbeBatch) -> None:
        """Take in one batch; in the first pass, small images of its samples too."""
        with self._guard("the images of the samples"):
            known = sum(map(len, self._images))
            if known == self._shown < MAX_IMAGES and (images := thumbnails(batch.inputs)) is not None:
                self._images.append(images)
            self._shown += batch.num_samples
            for layer, activations in batch.activations.items():
                self._rows_per_sample[layer] = max(1, len(activations) // max(1, batch.num_samples))
        super().observe(batch)

    def _images_of(self, layer: str, result: TopologyResult) -> dict[int, Tensor]:
        """Position among the layer's points -> image, for the samples of this rank."""
        images = [image for batch in self._images for image in batch]
        every, own = self._rows_per_sample.get(layer, 1), {}
        for position, number in enumerate(result.samples.tolist()):
            local = number // self._world_size // every
            # Samples are numbered over all ranks in turn, and rank 0, which draws, has its own.
            if number % self._world_size == 0 and local < len(images):
                own[position] = images[local]
        return own

    # Drift, and the places of the nodes: what is remembered from one evaluation to the next

    def measures(self, result: TopologyResult, previous: Memory | None) -> dict[str, float]:
        """The result's scalars, and how far the cloud's shape is from the previous and the first evaluation's."""
        scalars = super().measures(result, previous)
        for measure, then in (("drift", "previous"), ("drift_from_start", "first")):
            if previous and then in previous and _same_samples(result, previous[then]):
                pairs = expanded(result.drift_distances), expanded(previous[then]["distances"])
                scalars[measure] = drift_of_distances(*pairs)
        return scalars

    def remember(self, result: TopologyResult) -> Memory:
        """The distances between at most 256 samples."""
        if len(result.drift_samples) < 2:
            return {}
        return {"previous": {"samples": result.drift_samples, "distances": result.drift_distances}}

    def _measured(self, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        before = dict(self._previous)
        measured = super()._measured(results)
        for layer, memory in self._previous.items():
            # What is not renewed stays: the first evaluation, the places in the picture.
            kept = before.get(layer, {}) | memory
            self._previous[layer] = kept | (
                {"first": kept["previous"]} if "previous" in kept and "first" not in kept else {}
            )
        return measured

    def draw(self, results: Mapping[str, TopologyResult]) -> dict[str, "Figure"]:
        """Each layer's graph, members of its largest nodes, and its diagrams."""
        figures: dict[str, Figure] = {}
        if self.metric.mapper:
            figures["graphs"] = plot_graphs(results, {layer: self._placed(layer, results[layer]) for layer in results})
            if self._images:
                images = {layer: self._images_of(layer, result) for layer, result in results.items()}
                figures["members"] = plot_members(results, images)
        if self.metric.homology:
            figures["homology"] = plot_homology(results)
        return figures

    def _placed(self, layer: str, result: TopologyResult) -> Tensor:
        assert result.graph is not None
        memory = self._previous.setdefault(layer, {})
        positions = layout(result.graph, memory.get("places"))
        memory["places"] = point_positions(result.graph, positions)
        return positions

    # At the end of the run

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write each layer's last graph to the log directory, and the projector's data if asked for."""
        if why_off(trainer) or not self.result:
            return
        folder = logging.artefact_folder(trainer, self.name)
        with self._guard("the graphs, at writing them"):
            if folder is not None and trainer.is_global_zero:
                write_graphs(folder, self.result)
        if self.projector:
            with self._guard("the projector's data"):
                self._project(trainer, pl_module)

    def _project(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        seen: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []

        def collect(batch: ProbeBatch) -> None:
            for layer, activations in batch.activations.items():
                if len(activations) == batch.num_samples:  # a token is no sample
                    seen.setdefault(layer, []).append(activations.cpu())
            if batch.targets is not None:
                labels.append(batch.targets.cpu())

        self.probe.run(trainer, pl_module, collect)
        images = torch.cat(self._images).permute(0, 3, 1, 2).float() / 255 if self._images else None
        for layer, parts in seen.items():
            tag, names = f"{self.name}/{layer}", torch.cat(labels).tolist() if labels else None
            logging.log_embedding(trainer, tag, torch.cat(parts), names, images)


def _same_samples(result: TopologyResult, then: Memory) -> bool:
    return torch.equal(result.drift_samples, then["samples"]) and len(result.drift_distances) > 0
