"""Purity of clusters, compared with its value for permuted labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

NUM_NULL_SAMPLES = 20

Incidence = npt.NDArray[np.float64]
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Purity:
    """Three measures of how pure the nodes of a graph are, each 1 if every node holds one class, with their nulls.

    Attributes:
        node_wise: Mean over nodes of 1 / (number of classes in the node).
        class_wise: The same per point: for each point the mean over the nodes that hold it, then the mean over the
            clustered points of each class, then the mean over classes.
        majority_share: Fraction of the nodes' points that belong to the largest class of their node.
        node_wise_null: Mean of `node_wise` over random permutations of the labels.
        class_wise_null: Mean of `class_wise` over random permutations of the labels.
        majority_share_null: Mean of `majority_share` over random permutations of the labels.
    """

    node_wise: float
    class_wise: float
    majority_share: float
    node_wise_null: float
    class_wise_null: float
    majority_share_null: float


def compute_purity(
    members: Sequence[Tensor], labels: Tensor, *, num_null_samples: int = NUM_NULL_SAMPLES, seed: int = 0
) -> Purity | None:
    """Measure how pure nodes are, and how pure the same nodes are with permuted labels.

    By chance alone, large nodes are impure and small ones pure, so compare each measure with its null.

    Args:
        members: The points of each node, as indices.
        labels: int64 (N,), the class of each point; negative if unlabelled.
        num_null_samples: Number of permutations for the null.
        seed: Seed of the private generator of the permutations.

    Returns:
        The measures and their nulls; None if no node holds a labelled point.

    Source:
        E. Purvine et al., "Experimental Observations of the Topology of Convolutional Neural Network Activations",
        arXiv 2212.00222 (AAAI 2023), for the node-wise and class-wise measures.
    """
    from scipy.sparse import csr_matrix

    all_labels = labels.cpu().numpy()
    labelled = all_labels >= 0
    position = np.cumsum(labelled) - 1
    kept = [own[labelled[own]] for own in (member.numpy() for member in members)]
    kept = [position[own] for own in kept if len(own)]
    if not kept:
        return None
    classes, dense = np.unique(all_labels[labelled], return_inverse=True)
    starts = np.cumsum([0, *(len(own) for own in kept)])
    incidence = csr_matrix((np.ones(starts[-1]), np.concatenate(kept), starts), shape=(len(kept), len(dense)))

    def measure(assigned: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        one_hot = np.zeros((len(dense), len(classes)))
        one_hot[np.arange(len(dense)), assigned] = 1
        return np.array(_three(incidence, incidence @ one_hot, one_hot))

    rng = np.random.default_rng(seed)
    null = np.mean([measure(rng.permutation(dense)) for _ in range(num_null_samples)], axis=0)
    return Purity(*measure(dense).tolist(), *null.tolist())


def _three(incidence: Incidence, counts: Counts, one_hot: Counts) -> tuple[float, float, float]:
    per_node = 1 / (counts > 0).sum(axis=1)
    memberships = np.asarray(incidence.sum(axis=0)).ravel()
    held = memberships > 0
    per_point = (incidence.T @ per_node)[held] / memberships[held]
    sizes = one_hot[held].sum(axis=0)
    per_class = (one_hot[held].T @ per_point)[sizes > 0] / sizes[sizes > 0]
    return float(per_node.mean()), float(per_class.mean()), float(counts.max(axis=1).sum() / counts.sum())
