"""`ActivationTopology`: the shape of activation space as training curves."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro import loggers
from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.checks import check_bool
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.figures import by_layer, class_name
from lightning_neuro.isolation import why_off
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.topology.drift import drift_between
from lightning_neuro.topology.export import write_graphs
from lightning_neuro.topology.layout import place_nodes, point_positions
from lightning_neuro.topology.metric import ActivationShape
from lightning_neuro.topology.options import TopologyOptions
from lightning_neuro.topology.plot import plot_graphs
from lightning_neuro.topology.plot_diagrams import plot_homology
from lightning_neuro.topology.plot_samples import plot_members
from lightning_neuro.topology.result import TopologyResult
from lightning_neuro.topology.sample_images import SampleImages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GRAPH_CHARTS = {
    "purity, with permuted labels, before training": ("purity", "purity_null", "purity_initial"),
    "fraction of the samples in clusters": ("coverage",),
}
_HOMOLOGY_CHARTS = {
    "loops' total lifetime, in a Gaussian cloud": ("h1_total", "h1_total_null"),
    "drift since the previous and the first evaluation": ("drift", "drift_from_initial"),
}


class ActivationTopology(MetricCallback[TopologyResult]):
    """Logs the topology of activation space, layer by layer: Mapper graphs and persistent homology.

    Each sample is a point in the space of a layer's units. A Mapper graph shows which samples lie together and how
    groups are connected; persistent homology counts the connected components and loops of the points over all
    distances. The samples are the same throughout the run. Purity far above its null means that the layer separates
    classes. Whether topology should become simpler or richer during training is an open question: published reports
    disagree, so neither direction is better. Loops and branches of a graph are
    meaningful only above their null, which `num_null_samples=3` computes.

    Args:
        probe: Selects the samples, the layers and the schedule; see `Probe`. For the points of the paper, one random
            position of each image, use `Probe(reduction="random")`.
        projector: Whether to write the activations to TensorBoard's projector at the end of the run (on rank 0, that
            rank's samples).
        name: First part of the keys; default: `topology`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.
        options: See `TopologyOptions`.

    Keys:
        Each as `topology/<measure>/<layer>`, and as `topology/<measure>` for the mean over layers. Lengths are relative
        to the .9 quantile of the layer's distances. By default, `num_nodes`, `coverage`, `purity`, `h1_total`,
        their nulls and the drifts are logged; the others are in `callback.scalars`.

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `num_nodes`, `num_edges` | number of clusters; of pairs that share samples | 0 .. | neither |
        | `num_components` | connected components of the graph | 0 .. | neither |
        | `num_loops`, `_null` | cycles through nodes of 10+ samples; in Gaussian clouds, if asked | 0 .. | > null |
        | `num_branches`, `_null` | such nodes with 3 or more edges; in Gaussian clouds, if asked | 0 .. | > null |
        | `coverage` | fraction of the samples that are in a cluster | 0 .. 1 | high: trust the graph |
        | `eps` | radius of the clusters | 0 .. | (parameter) |
        | `purity`, `_null` | mean over nodes of 1 / (classes in the node); with permuted labels | 0 .. 1 | > null |
        | `class_purity`, `_null` | the same, averaged per sample and class | 0 .. 1 | > null |
        | `majority_share`, `_null` | fraction of the samples in their node's largest class | 0 .. 1 | > null |
        | `purity_initial` | `purity` before the first training step | 0 .. 1 | (reference) |
        | `h0_total`, `_null` | sum of the distances at which components merge; Gaussian cloud | 0 .. | neither |
        | `h0_half` | distance at which half of the components have merged | 0 .. | neither |
        | `h0_longest` | distance at which the last two components merge | 0 .. | neither |
        | `h0_entropy` | evenness of these distances; 0 with fewer than two | 0 .. 1 | neither |
        | `h1_total`, `_null` | sum of the loops' lifetimes; Gaussian cloud | 0 .. | > null |
        | `h1_longest`, `_null` | longest lifetime of a loop; Gaussian cloud | 0 .. | > null |
        | `h1_entropy` | evenness of the loops' lifetimes; 0 with fewer than two | 0 .. 1 | neither |
        | `h1_peak` | largest number of loops alive at one distance | 0 .. | neither |
        | `h1_unfinished` | loops not followed to their end; their lifetimes are lower bounds | 0 .. | low |
        | `..._std` | the same over random halves of the samples, if `num_subsamples` is given | 0 .. | (error bar) |
        | `drift` | RTD-Lite to the previous evaluation, on the samples of the homology | 0 .. | low: stable |
        | `drift_from_initial` | RTD-Lite to the first evaluation | 0 .. | neither |

        Also logged: figures (`topology/graphs/<layer>`, `homology` and, for image inputs, `members`: samples
        of the largest nodes), a histogram of the merging distances (`topology/merge_distances/<layer>`) and, at the end
        of the run, `lightning_neuro/topology/<layer>.graphml` and `.json` in the log directory.

    Raises:
        ArgumentError: If an option is invalid, at construction.

    Source:
        A. Rathore, N. Chalapathi, S. Palande, B. Wang, "TopoAct: Visually Exploring the Shape of Activations in Deep
        Learning", arXiv 1912.06332 (2021); purity after E. Purvine et al., arXiv 2212.00222; drift: RTD-Lite.

    Example:
        >>> callback = ActivationTopology(Probe(layers="relu*"), prog_bar="topology/purity")
    """

    family = "topology"
    curves = (
        *("num_nodes", "coverage", "purity", "purity_null", "h1_total", "h1_total_null"),
        *("drift", "drift_from_initial"),
    )
    baselines = ("purity",)
    charts = _GRAPH_CHARTS | _HOMOLOGY_CHARTS
    histogram_name = "merge_distances"
    run_state: ClassVar[tuple[str, ...]] = ("places", "refreeze_requested")
    meanings = {  # noqa: RUF012
        "purity": "mean of 1 / (number of classes in a cluster)",
        "purity_null": "the same with permuted labels: no structure",
        "coverage": "fraction of the samples that are in a cluster",
        "h1_total": "sum of the lifetimes of the loops in activation space",
        "h1_total_null": "the same in a Gaussian cloud of the same covariance",
        "drift": "change of shape since the previous evaluation (RTD-Lite)",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        projector: bool = False,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: Literal["warn", "raise"] = "warn",
        **options: Unpack[TopologyOptions],
    ) -> None:
        check_bool("projector", projector)
        self.metric: ActivationShape
        metric = ActivationShape(**options)
        super().__init__(
            metric,
            probe,
            name=name,
            prog_bar=prog_bar,
            log_scalars=log_scalars,
            figures=figures,
            on_error=on_error,
        )
        self.projector = projector
        self.charts = (_GRAPH_CHARTS if metric.mapper else {}) | (_HOMOLOGY_CHARTS if metric.homology else {})

    def start_run(self) -> None:
        """Reset the state of an earlier run."""
        super().start_run()
        self.places: dict[str, Tensor] = {}
        self.refreeze_requested = False

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Release the images of earlier samples."""
        super().setup(trainer, pl_module, stage)
        self.images = SampleImages()

    def refreeze(self) -> None:
        """Estimate each layer's radius anew at the next evaluation, and freeze it again."""
        self.refreeze_requested = True

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Release the frozen radii if this was requested."""
        self.images.start_pass(trainer.world_size)
        for layer in self.probe_pass.layers if self.refreeze_requested else ():
            metric = self.metric_at(layer, pl_module.device)
            assert isinstance(metric, ActivationShape)
            metric.refreeze()
        self.refreeze_requested = False

    def observe(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass; in the first pass, also keep small images of its samples."""
        with self.guarded("the images of the samples"):
            self.images.add(batch)
        super().observe(batch)

    def layer_measures(self, result: TopologyResult, memory: Memory | None) -> dict[str, float]:
        """The scalars of the result, and the drift since the previous and the first evaluation."""
        scalars = result.scalars()
        for measure, moment in (("drift", "previous"), ("drift_from_initial", "first")):
            then = (memory or {}).get(moment)
            if then and len(result.drift_distances) and torch.equal(result.drift_samples, then["samples"]):
                scalars[measure] = drift_between(result.drift_distances, then["distances"])
        return scalars

    def remember(self, result: TopologyResult, memory: Memory | None) -> Memory:
        """The distances between at most 256 samples, now and at the first evaluation that had any."""
        kept = memory or {}
        if len(result.drift_samples) < 2:
            return kept
        now = {"samples": result.drift_samples, "distances": result.drift_distances}
        return {"first": kept.get("first", now), "previous": now}

    def draw(self, results: Mapping[str, TopologyResult]) -> dict[str, "Figure"]:
        """Draw each layer's graph, members of its largest nodes, and its persistence diagrams."""
        figures: dict[str, Figure] = {}
        if self.metric.mapper:
            positions = {}
            for layer, result in results.items():
                assert result.graph is not None
                positions[layer] = place_nodes(result.graph, self.places.get(layer))
                # The next figure starts from these positions, so that it changes little.
                self.places[layer] = point_positions(result.graph, positions[layer])
            names = self.class_names
            figures |= by_layer("graphs", results, partial(plot_graphs, positions=positions, class_names=names))
            if len(self.images):
                images = {layer: self.images.of_points(layer, result) for layer, result in results.items()}
                figures |= by_layer("members", results, partial(plot_members, images=images, class_names=names))
        if self.metric.homology:
            figures |= by_layer("homology", results, plot_homology)
        return figures

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write each layer's last graph to the log directory, and the projector's data if requested."""
        super().on_train_end(trainer, pl_module)
        if why_off(trainer) or not self.result:
            return
        with self.guarded("the files of the graphs"):
            # All ranks find the folder, and then rank 0 creates it, which may fail.
            folder = loggers.artefact_folder(trainer, self.name)
            if folder is not None and trainer.is_global_zero:
                write_graphs(folder, self.result)
        if self.projector:
            self.attempt(trainer, "the projector's data", lambda: self._project(trainer, pl_module))

    def _project(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        points: dict[str, list[Tensor]] = {}
        labels: list[Any] = []

        def collect(batch: ProbeBatch) -> None:
            for layer, activations in batch.activations.items():
                if len(activations) == batch.num_samples:  # a token is not a sample
                    points.setdefault(layer, []).append(activations.cpu())
            labels.extend([] if batch.targets is None else batch.targets.tolist())

        self.probe_pass.run(trainer, pl_module, collect)
        names = [class_name(label, self.class_names) for label in labels] or None
        for layer, parts in points.items():
            loggers.log_embedding(trainer, f"{self.name}/{layer}", torch.cat(parts), names, self.images.stacked())
