"""Do clusters hold one class each, and more so than if the labels were dealt out at random?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

NULL_DRAWS = 20

Incidence = npt.NDArray[np.float64]
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Purity:
    """Three views of how pure the nodes of a graph are, each 1 where every node holds one class, with its null.

    Attributes:
        node_wise: Mean over nodes of 1 / (number of classes in the node).
        class_wise: The same, point by point: of each class the mean over its clustered points of the mean over the
            nodes that hold the point; then the mean over classes.
        majority_share: Share of points in their node's largest class, nodes weighted by size.
        node_wise_null: Mean of `node_wise` when the labels are permuted over the points; so for the next two.
        class_wise_null: See `node_wise_null`.
        majority_share_null: See `node_wise_null`.
    """

    node_wise: float
    class_wise: float
    majority_share: float
    node_wise_null: float
    class_wise_null: float
    majority_share_null: float


def purity(members: Sequence[Tensor], labels: Tensor, *, draws: int = NULL_DRAWS, seed: int = 0) -> Purity | None:
    """How pure nodes are, beside what the same nodes show when labels are permuted.

    Large nodes are impure by chance alone, and small ones pure: so read each number against its null.

    Args:
        members: The points of each node.
        labels: int64 (N,), the class of each point; negative where there is none.
        draws: Permutations for the null.
        seed: Of their private generator.

    Returns:
        None where no node holds a labelled point.

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
    by_chance = np.mean([measure(rng.permutation(dense)) for _ in range(draws)], axis=0)
    return Purity(*measure(dense).tolist(), *by_chance.tolist())


def _three(incidence: Incidence, counts: Counts, one_hot: Counts) -> tuple[float, float, float]:
    per_node = 1 / (counts > 0).sum(axis=1)
    memberships = np.asarray(incidence.sum(axis=0)).ravel()
    held = memberships > 0
    per_point = (incidence.T @ per_node)[held] / memberships[held]
    sizes = one_hot[held].sum(axis=0)
    per_class = (one_hot[held].T @ per_point)[sizes > 0] / sizes[sizes > 0]
    return float(per_node.mean()), float(per_class.mean()), float(counts.max(axis=1).sum() / counts.sum())
