"""Neuron communities as training curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.communities.detection import partition_agreement
from lightning_neuro.communities.metric import NeuronModularity
from lightning_neuro.communities.options import CommunityOptions
from lightning_neuro.communities.plot import plot_communities
from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.figures import by_layer
from lightning_neuro.probe import Probe
from lightning_neuro.scheduled_callback import OnError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NeuronCommunities(MetricCallback[CommunityResult]):
    """Logs how clearly the units of each layer are separated into communities, and how stable these are.

    Units whose activations are correlated over the probe set are joined into a graph. Communities are groups of densely
    connected units, and the modularity measures how much of the edge weight lies inside them. Always compare the
    modularity with its null, the value for the same units with each unit's activations shuffled over the samples, and
    with its value before training. Above the null there are groups; far below it all units rise and fall together, as
    one group (usual for convolutions averaged over the image). On real runs modularity follows how far a network has
    fitted its training data, and it continues to rise while the network fits noise: it does not predict test accuracy.

    Args:
        probe: Selects the samples, the layers and the schedule; see `Probe`.
        name: First part of the keys; default: `communities`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.
        **options: See `CommunityOptions`.

    Keys:
        Each as `communities/<measure>/<layer>`, and as `communities/<measure>` for the mean over layers. By default,
        `modularity_excess`, `largest_share`, `nmi_runs`, `dead_share` and `constant_share` are not logged; they are in
        `callback.scalars`.

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `modularity` | weight inside the communities beyond expectation, best of the runs | -0.5 .. 1 | above null |
        | `modularity_null` | mean over graphs of shuffled activations, one run each | 0 .. 1 | (reference) |
        | `modularity_initial` | modularity before the first training step | -0.5 .. 1 | (reference) |
        | `modularity_excess` | mean of the runs minus `modularity_null` | -1 .. 1 | > 0: structure |
        | `modularity_z` | the excess in standard deviations of the null | any | > 3: structure |
        | `num_communities` | number of communities | 1 .. units | neither |
        | `largest_share` | fraction of the live units in the largest community | 0 .. 1 | neither |
        | `nmi_runs` | agreement between the runs (normalised mutual information) | 0 .. 1 | high: reliable |
        | `nmi_previous` | agreement with the previous evaluation, from the second one on | 0 .. 1 | high: stable |
        | `dead_share` | fraction of units that are never active | 0 .. 1 | low |
        | `constant_share` | fraction of units that are active but do not vary | 0 .. 1 | low |
        | `class_modularity` | mode `"mostafa2021"`: mean modularity of the classes' graphs | -0.5 .. 1 | neither |

        Also logged: a figure (`communities/graphs`: each layer's graph, ordered by community) and a histogram of the
        edge weights (`communities/edge_weights/<layer>`). `callback.result[layer]` is a `CommunityResult` with
        `to_networkx()`.

    Raises:
        ArgumentError: If an argument is invalid, at construction.

    Source:
        S. Mostafa, D. Mondal, "On the Evolution of Neuron Communities in a Deep Learning Architecture",
        arXiv 2106.04693 (2021); weighted modularity after Newman (2004).

    Example:
        >>> from pytorch_lightning import Trainer
        >>> communities = NeuronCommunities(prog_bar="communities/modularity")
        >>> trainer = Trainer(callbacks=[communities], logger=False, enable_checkpointing=False)
    """

    family = "communities"
    curves = (
        *("modularity", "modularity_null", "modularity_z", "class_modularity"),
        *("num_communities", "nmi_previous"),
    )
    baselines = ("modularity",)
    charts = {  # noqa: RUF012
        "modularity, null, initial value": ("modularity", "modularity_null", "modularity_initial"),
    }
    histogram_name = "edge_weights"
    meanings = {  # noqa: RUF012
        "modularity": "weight inside communities beyond expectation; compare it with its null and its initial value",
        "modularity_null": "the same with each unit shuffled over the samples: no structure",
        "modularity_z": "distance to that null in standard deviations; above 3: communities; far below 0: one group",
        "num_communities": "number of communities",
        "nmi_previous": "agreement with the communities of the previous evaluation, 0 to 1",
        "dead_share": "fraction of units that are never active",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: OnError = "warn",
        **options: Unpack[CommunityOptions],
    ) -> None:
        metric = NeuronModularity(**options)
        super().__init__(
            metric,
            probe,
            name=name,
            prog_bar=prog_bar,
            log_scalars=log_scalars,
            figures=figures,
            on_error=on_error,
        )
        self.needs_labels = self.requested = metric.mode == "mostafa2021"  # one graph per class

    def layer_measures(self, result: CommunityResult, memory: Memory | None) -> dict[str, float]:
        """The result's scalars, and the agreement with the communities of the previous evaluation."""
        scalars = result.scalars()
        if memory and result.defined:
            # Different units are live in different evaluations: compare those that are in both.
            _, now, before = np.intersect1d(result.units.cpu(), memory["units"].cpu(), return_indices=True)
            if len(now) > 1:
                scalars["nmi_previous"] = partition_agreement(result.labels.cpu()[now], memory["labels"].cpu()[before])
        return scalars

    def remember(self, result: CommunityResult, memory: Memory | None) -> Memory:
        """The units and their communities."""
        return {"units": result.units.cpu(), "labels": result.labels.cpu()} if result.defined else {}

    def draw(self, results: Mapping[str, CommunityResult]) -> dict[str, "Figure"]:
        """Draw each layer's graph, ordered by community."""
        return by_layer("graphs", results, plot_communities)
