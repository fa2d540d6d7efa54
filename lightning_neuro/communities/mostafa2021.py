"""The graph of Mostafa and Mondal (2021): co-activation above each unit's own level, class by class.

Source: S. Mostafa, D. Mondal, "On the Evolution of Neuron Communities in a Deep Learning Architecture",
arXiv 2106.04693, with the graph as in the first author's later public code.
"""

import numpy as np
import numpy.typing as npt

from lightning_neuro.communities.dense_louvain import Floats
from lightning_neuro.communities.options import Score
from lightning_neuro.communities.permutation_null import Values

TOP_UNITS = 50
SMALLEST_MEAN = 5e-6


def class_graphs(
    values: Values, classes: npt.NDArray[np.int64], score: Score
) -> list[tuple[npt.NDArray[np.int64], Floats]]:
    """One graph per class, over the units that score highest in it.

    Args:
        values: (d, n) activations after the activation function.
        classes: (n,) class of each sample; negative if unlabelled.
        score: `"mean"` (of a unit's positive activations) or `"frequency"` (fraction of samples in which it is on). The
            latter is that of the first release of the authors' code: it compares an activation with a frequency, and is
            degenerate at initialisation.

    Returns:
        For each class, the indices of its top units and their (t, t) adjacency: the fraction of the class's samples in
        which both are above their score.
    """
    graphs = []
    for label in np.unique(classes[classes >= 0]):
        x = values[:, classes == label].astype(np.float64)
        level = _level(x, score)
        top = np.sort(np.argsort(-level, kind="stable")[:TOP_UNITS])
        above = (x[top] > level[top, None]).astype(np.float64)
        adjacency = above @ above.T / x.shape[1]
        np.fill_diagonal(adjacency, 0.0)
        graphs.append((top, adjacency))
    return graphs


def sum_graphs(num_units: int, graphs: list[tuple[npt.NDArray[np.int64], Floats]]) -> Floats:
    """The sum of the class graphs over all `num_units` units; its communities are groups of classes."""
    total = np.zeros((num_units, num_units))
    for top, adjacency in graphs:
        total[np.ix_(top, top)] += adjacency
    return total


def _level(x: Floats, score: Score) -> Floats:
    on = x > 0
    if score == "frequency":
        frequency: Floats = on.mean(axis=1)
        return frequency
    mean: Floats = np.where(on, x, 0.0).sum(axis=1) / np.maximum(on.sum(axis=1), 1)
    return np.where(mean < SMALLEST_MEAN, 0.0, mean)
