"""From activations to a weighted graph of units, through statistics that are additive over batches and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.checks import ArrayLike, as_activations, check_choice, finite_rows
from lightning_neuro.communities.options import WEIGHTS, Weight

STATE_WEIGHTS = ("phi", "coactivation")
"""Weights that depend only on whether a unit is on (> 0), not on how strongly."""

CONSTANT_BELOW = 1e-6
"""A unit whose standard deviation is below this fraction of its root mean square varies only by float32 rounding."""


@dataclass(frozen=True, eq=False)
class ActivationGraph:
    """A weighted graph over the units of one layer.

    Attributes:
        adjacency: float64 (k, k), exactly symmetric with a zero diagonal: the edge weight of each pair of kept units.
        units: int64 (k,), the indices of the kept units in the layer.
        num_units: Number of units in the data, kept or not.
        num_constant: Number of units dropped because they do not vary (for on/off weights: always on).
        num_dead: Number of units dropped because they are never above zero.
        num_samples: Number of samples used.
        num_nonfinite: Number of samples left out because of NaN or infinite activations.
    """

    adjacency: Tensor
    units: Tensor
    num_units: int
    num_constant: int
    num_dead: int
    num_samples: int
    num_nonfinite: int


def activation_graph(activations: ArrayLike, *, weight: Weight = "correlation") -> ActivationGraph:
    """Build a graph of units, with edges weighted by how much the units are active together.

    Perfectly correlated units have an edge of weight 1; by default, uncorrelated and anticorrelated units have no edge.
    Units that never vary carry no information about this; they are dropped and counted.

    Args:
        activations: (N, units) of any real dtype, one row per sample.
        weight: `"correlation"` (Pearson's r, negative values set to 0), `"correlation_squared"` (r^2, which also joins
            anticorrelated units), `"phi"` (r of the on/off states, negative values set to 0) or `"coactivation"`
            (fraction of the samples in which both are on). A unit is on if its activation is above zero.

    Returns:
        The graph; empty if there are fewer than three samples or no varying units.

    Raises:
        ArgumentError: If `activations` is not a real matrix or `weight` is unknown.

    Source:
        S. Mostafa, D. Mondal, "On the Evolution of Neuron Communities in a Deep Learning Architecture",
        arXiv 2106.04693 (2021), for the idea; correlation instead of co-activation counts is this package's choice.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 0.0]])
        >>> graph = activation_graph(x)
        >>> graph.units.tolist(), graph.num_dead, round(graph.adjacency[0, 1].item(), 6)
        ([0, 1], 1, 1.0)
    """
    check_choice("weight", weight, WEIGHTS)
    values = as_activations(activations)
    finite = finite_rows(values)
    packed = moments(values[finite], weight=weight)
    return graph_of_moments(packed, weight=weight, num_nonfinite=int((~finite).sum()))


# The sufficient statistics of a set of samples are packed into one (2 + d, 1 + d) float64 tensor, so that a metric can
# hold them as a single state with a single reduction:
#   [0, 0] n    [0, 1:] mean    [1, 1:] samples in which the unit is on
#   [2:, 1:] centred scatter, the sum of (x - mean)(x - mean)^T
# An all-zero tensor of any width represents "no samples".


def moments(values: Tensor, *, weight: str) -> Tensor:
    """Packed statistics of finite (N, d) values, or of their on/off states if `weight` depends only on those."""
    packed = torch.zeros(2 + values.shape[1], 1 + values.shape[1], dtype=torch.float64, device=values.device)
    return add_samples(packed, values, weight=weight)


def add_samples(packed: Tensor, values: Tensor, *, weight: str) -> Tensor:
    """Add samples to packed statistics in place, as `merge_moments` would: one product, and no copy of the scatter."""
    if len(values) == 0:
        return packed
    on = values > 0
    x = on.double() if weight in STATE_WEIGHTS else values.double()
    n_before, n = packed[0, 0].clone(), packed[0, 0] + len(x)
    mean = x.mean(dim=0)
    shift = mean - packed[0, 1:]
    centred = x - mean
    packed[2:, 1:].addmm_(centred.T, centred).addr_(shift * (n_before * len(x) / n), shift)
    packed[1, 1:] += on.sum(dim=0)
    packed[0, 1:] += shift * (len(x) / n)
    packed[0, 0] = n
    return packed


def merge_moments(stacked: Tensor) -> Tensor:
    """Merge packed statistics, (parts, 2 + d, 1 + d), into those of all samples together.

    Uses the update of Chan, Golub and LeVeque: only differences of means are squared, so a large common offset costs no
    precision.
    """
    total = stacked[0].clone()
    for part in stacked[1:]:
        n_total, n_part = total[0, 0].clone(), part[0, 0]
        if n_part == 0:
            continue
        n = n_total + n_part
        shift = part[0, 1:] - total[0, 1:]
        total[2:, 1:] += part[2:, 1:] + torch.outer(shift, shift) * (n_total * n_part / n)
        total[1] += part[1]
        total[0, 1:] += shift * (n_part / n)
        total[0, 0] = n
    return total


def graph_of_moments(packed: Tensor, *, weight: str, num_nonfinite: int = 0) -> ActivationGraph:
    """The graph that packed statistics describe."""
    packed = packed.cpu()
    n, mean, scatter = packed[0, 0], packed[0, 1:], packed[2:, 1:]
    variance = scatter.diagonal() / n.clamp(min=1)
    dead = packed[1, 1:] == 0
    constant = (variance <= CONSTANT_BELOW**2 * (variance + mean**2)) & ~dead
    units = torch.nonzero(~dead & ~constant).flatten() if n >= 3 else torch.zeros(0, dtype=torch.int64)

    scatter = scatter[units][:, units]
    if weight == "coactivation":  # mean of b_i b_j, from the centred second moments of b
        similarity = scatter / n.clamp(min=1) + torch.outer(mean[units], mean[units])
    else:
        scale = scatter.diagonal().rsqrt()
        similarity = scatter * scale[:, None] * scale[None, :]
    return ActivationGraph(
        adjacency=_rounded(edge_weights(similarity, weight=weight)),
        units=units,
        num_units=mean.numel(),
        num_constant=int(constant.sum()),
        num_dead=int(dead.sum()),
        num_samples=int(n),
        num_nonfinite=num_nonfinite,
    )


def edge_weights(similarity: Tensor, *, weight: str) -> Tensor:
    """Edge weights from a (k, k) matrix of r, phi or co-activation: symmetric, non-negative, zero diagonal."""
    return weights_in_place((similarity + similarity.T) / 2, weight=weight)


def weights_in_place(symmetric: Tensor, *, weight: str) -> Tensor:
    """Turn an exactly symmetric matrix of r, phi or co-activation into edge weights, and return it."""
    edges = symmetric.square_() if weight == "correlation_squared" else symmetric
    return edges.clamp_(min=0, max=1).fill_diagonal_(0)


def _rounded(adjacency: Tensor) -> Tensor:
    # Sums in another order (shards, ranks) differ in the last bits, and a tie broken the other way would give other
    # communities. After rounding to 2^-40 both orders give the same numbers.
    return adjacency.mul(2.0**40).round().div(2.0**40)
