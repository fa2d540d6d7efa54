"""Options of neuron communities, for the metric and the callback: their types and their documentation."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

Mode = Literal["correlation", "mostafa2021"]
Weight = Literal["correlation", "correlation_squared", "phi", "coactivation"]
Score = Literal["mean", "frequency"]

MODES: tuple[str, ...] = get_args(Mode)
WEIGHTS: tuple[str, ...] = get_args(Weight)
SCORES: tuple[str, ...] = get_args(Score)


class CommunityOptions(TypedDict, total=False):
    """Options of `NeuronModularity`, which `NeuronCommunities` passes on.

    Args:
        mode: `"correlation"`, or `"mostafa2021"` for the graphs of the paper, one per class (needs class labels).
            Default: `"correlation"`.
        weight: Edge weight in mode `"correlation"`: `"correlation"` (positive part of Pearson's r),
            `"correlation_squared"`, `"phi"` (r of the on/off states) or `"coactivation"` (fraction of samples in which
            both units are on). Default: `"correlation"`.
        algorithm: `"louvain"`, or the name of any crisp algorithm of `cdlib.algorithms`. Default: `"louvain"`.
        algorithm_options: Further arguments of a cdlib algorithm. Default: none.
        resolution: Resolution of the modularity; above 1: more and smaller communities. Default: 1.
        num_runs: Number of runs of the detection on the graph; the best one is reported. Default: 5.
        num_null_samples: Number of graphs of shuffled activations, with one run each; 0 for no null. Default: 5.
        max_units: Maximum number of units; of wider layers a fixed random choice of units is used, because time grows
            with its square. Of 2,048 units, 1,024 give `modularity` and `modularity_excess` to .01. Default: 1,024.
        score: Level above which a unit counts as active in mode `"mostafa2021"`: the `"mean"` of its positive
            activations, or its `"frequency"`, the fraction of samples in which it is on. Default: `"mean"`.
        seed: Seed of the private generators for the null and for `max_units`. Default: 0.
    """

    mode: Mode
    weight: Weight
    algorithm: str
    algorithm_options: Mapping[str, Any] | None
    resolution: float
    num_runs: int
    num_null_samples: int
    max_units: int
    score: Score
    seed: int
