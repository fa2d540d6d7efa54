"""Neuron communities as training curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.communities.functional import partition_agreement
from lightning_neuro.communities.metric import NeuronModularity
from lightning_neuro.communities.plot import plot_communities
from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.probe import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NeuronCommunities(MetricCallback):
    """Shows how the units of each layer group while the network trains.

    Units that rise and fall together over the probe's samples are joined into a graph; communities are the groups it
    falls into, and the modularity says how much of its weight lies inside them. Read the modularity only beside its
    null, what the same units give when each one's activations are shuffled over the samples, and beside its value
    before training. Above the null there are groups; far below it the units rise and fall all together, as one group
    (usual for convolutions averaged over the image). On real runs it follows how far a network has fitted its training
    data, and goes on rising while it fits noise: it does not predict test accuracy.

    Args:
        probe: Which samples, which layers, when; see `Probe`.
        mode: `"correlation"`, or `"mostafa2021"` for the graphs of the paper (needs class labels).
        weight: Edge weight in mode `"correlation"`: `"correlation"` (positive part of Pearson's r),
            `"correlation_squared"`, `"phi"` (of on/off states) or `"coactivation"`.
        algorithm: `"louvain"`, or the name of any crisp algorithm of `cdlib.algorithms`.
        algorithm_options: Further arguments of a cdlib algorithm.
        resolution: Above 1: more and smaller communities.
        seeds: Runs of the detection on each graph; the best one is reported.
        null_draws: Shuffled graphs for the null; 0 for none.
        max_units: A wider layer is represented by a fixed random choice of this many units.
        score: Level above which a unit counts as active in mode `"mostafa2021"`: `"mean"` or `"frequency"`.
        name: First part of the keys, instead of `communities`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        on_error: `"warn"` or `"raise"`.

    Keys:
        Each as `communities/<measure>/<layer>`, and as `communities/<measure>` for the mean over layers.

        ======================= ============================================================= =========== ============
        measure                 meaning                                                       range       better when
        ======================= ============================================================= =========== ============
        `modularity`            weight inside the communities beyond what strengths alone     -.5 .. 1    above null
                                would give; best of `seeds` runs
        `modularity_null`       mean of the shuffled graphs, one run each                     0 .. 1      (reference)
        `modularity_initial`    modularity before the first training step                     -.5 .. 1    (reference)
        `modularity_excess`     mean of the runs minus `modularity_null`                      -1 .. 1     > 0: structure
        `modularity_z`          the excess in standard deviations of the null                 any         > 3: structure
        `num_communities`       how many groups                                               1 .. units  neither
        `largest_share`         share of the live units in the largest group                  0 .. 1      neither
        `seed_agreement`        agreement between the runs (normalised mutual information)    0 .. 1      high: trust it
        `stability`             agreement with the previous evaluation's groups; from the     0 .. 1      high: settled
                                second evaluation on
        `dead_share`            share of units that are dead or constant, left out            0 .. 1      low
        `class_modularity`      mode `"mostafa2021"`: mean over classes of each class graph's -.5 .. 1    neither
        ======================= ============================================================= =========== ============

    Also a figure (`communities/graphs`: each layer's graph, ordered by community), a histogram of the edge weights
    (`communities/edge_weights/<layer>`), and `callback.result[layer]`, a `CommunityResult` with `to_networkx()`.

    Raises:
        ValueError: For a wrong option, at construction.

    Source:
        S. Mostafa, D. Mondal, "On the Evolution of Neuron Communities in a Deep Learning Architecture",
        arXiv 2106.04693 (2021); weighted modularity after Newman (2004).

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from pytorch_lightning.callbacks import EarlyStopping
        >>> stop = EarlyStopping("communities/modularity", mode="max", patience=3)
        >>> trainer = Trainer(callbacks=[NeuronCommunities(), stop], logger=False, enable_checkpointing=False)
    """

    family = "communities"
    baselines = ("modularity",)
    charts = {"modularity, its null, its start": ("modularity", "modularity_null", "modularity_initial")}  # noqa: RUF012
    histogram_name = "edge_weights"
    meanings = {  # noqa: RUF012
        "modularity": "weight inside groups of units beyond chance; read it against its null and its start",
        "modularity_null": "the same when each unit is shuffled over the samples: no structure",
        "modularity_z": "distance to that null in standard deviations; above 3: groups; far below 0: one group",
        "num_communities": "how many groups of units",
        "stability": "agreement of the groups with the previous evaluation, 0 to 1",
        "dead_share": "share of units that are dead or constant",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        mode: str = "correlation",
        weight: str = "correlation",
        algorithm: str = "louvain",
        algorithm_options: Mapping[str, Any] | None = None,
        resolution: float = 1.0,
        seeds: int = 5,
        null_draws: int = 10,
        max_units: int = 2048,
        score: str = "mean",
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        metric = NeuronModularity(
            mode=mode,
            weight=weight,
            algorithm=algorithm,
            algorithm_options=algorithm_options,
            resolution=resolution,
            seeds=seeds,
            null_draws=null_draws,
            max_units=max_units,
            score=score,
        )
        super().__init__(metric, probe, name=name, prog_bar=prog_bar, on_error=on_error)
        self.needs_labels = mode == "mostafa2021"  # a graph per class

    def measures(self, result: CommunityResult, previous: Memory | None) -> dict[str, float]:
        """The result's scalars, and how far the groups are still those of the previous evaluation."""
        scalars = super().measures(result, previous)
        if previous and result.defined:
            # Which units are alive differs from one evaluation to the next: compare those that are in both.
            _, now, before = np.intersect1d(result.units.cpu(), previous["units"].cpu(), return_indices=True)
            if len(now) > 1:
                scalars["stability"] = partition_agreement(result.labels.cpu()[now], previous["labels"].cpu()[before])
        return scalars

    def remember(self, result: CommunityResult) -> Memory:
        """The groups."""
        return {"units": result.units.cpu(), "labels": result.labels.cpu()} if result.defined else {}

    def draw(self, results: Mapping[str, CommunityResult]) -> dict[str, "Figure"]:
        """Each layer's graph, ordered by community."""
        return {"graphs": plot_communities(results)}
