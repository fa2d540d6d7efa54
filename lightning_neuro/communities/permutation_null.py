"""The null model: the modularity of the same units if they were independent.

Modularity is positive by chance alone, and its level depends on the number of samples and on the sparsity of the units.
So each unit's activations are permuted over the samples, independently of the other units: every unit keeps its own
distribution, and only chance correlations between units remain.

Only each unit's distribution is needed for that. It is exact for up to `KEPT_ROWS` samples, and beyond that estimated
from this number of kept samples; the permuted data always have the full number of samples, because the null depends on
it.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.communities.dense_louvain import Floats
from lightning_neuro.communities.unit_graph import STATE_WEIGHTS, weights_in_place
from lightning_neuro.identity import content_hash

Values = npt.NDArray[np.float32]

KEPT_ROWS = 2048
_FRESH_UP_TO = 1024


def keep_rows(stacked: Tensor) -> Tensor:
    """Reduce samples to at most `KEPT_ROWS`, independent of their order and of how they are sharded.

    Each sample has a hash of its values, and the samples with the smallest hashes are kept. Rows of zeros are padding:
    samples in which no unit is active are counted instead (they share one hash: all or none would be kept).

    Args:
        stacked: float32 (rows, d), or (parts, rows, d) of several shards or ranks padded with rows of zeros.

    Returns:
        float32 (at most `KEPT_ROWS`, d).
    """
    rows = stacked.flatten(0, -2)
    acting = (rows != 0).any(dim=1)
    rows = rows if acting.all() else rows[acting]
    if len(rows) <= KEPT_ROWS:
        return rows
    return rows[content_hash(rows).sort(stable=True).indices[:KEPT_ROWS]]


def stretch(rows: Values, num_samples: int, num_silent: int) -> Values:
    """Each unit's distribution as n values: the kept ones, repeated evenly, and zeros.

    Args:
        rows: (rows, d), the kept samples.
        num_samples: n, the number of all samples.
        num_silent: Number of samples in which no unit is active.

    Returns:
        float32 (d, n).
    """
    values = np.zeros((rows.shape[1], num_samples), dtype=np.float32)
    num_acting = num_samples - num_silent
    if num_acting and len(rows):
        sources = ((np.arange(num_acting) + 0.5) * (len(rows) / num_acting)).astype(np.int64)
        values[:, :num_acting] = np.sort(rows.T, axis=1)[:, sources]
    return values


def shuffles(values: Values, num_null_samples: int, rng: np.random.Generator) -> Iterator[Values]:
    """Generate (d, n) data in which every unit's values are permuted independently.

    Permuting 1,024 units of 10,000 samples takes 0.25 s. So beyond a thousand samples all null samples share one
    permutation per unit, and each of them rotates every unit by a random offset. A single null sample is still a
    uniform independent permutation, and two units rarely have the same relative offset twice.
    """
    d, n = values.shape
    fresh = n <= _FRESH_UP_TO
    base = values if fresh else rng.permuted(values, axis=1)
    for _ in range(num_null_samples):
        if fresh:
            yield rng.permuted(values, axis=1)
            continue
        turned = np.empty_like(base)
        offsets: list[int] = rng.integers(n, size=d).tolist()  # type: ignore[assignment]
        for unit, offset in enumerate(offsets):
            turned[unit, offset:] = base[unit, : n - offset]
            turned[unit, :offset] = base[unit, n - offset :]
        yield turned


def null_graphs(values: Values, weight: str, num_null_samples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Adjacency matrices of permuted data.

    Args:
        values: float32 (d, n), each unit's distribution over the samples.
        weight: The edge weight.
        num_null_samples: Number of graphs.
        rng: A private generator.

    Yields:
        float64 (d, d), the edge weights of one graph.
    """
    x = (values > 0).astype(np.float32) if weight in STATE_WEIGHTS else values
    if weight == "coactivation":
        x = x / np.float32(np.sqrt(x.shape[1]))
    else:  # with each row centred and of length 1, the matrix of products holds the correlations
        x = x - x.mean(axis=1, keepdims=True, dtype=np.float64)
        length = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
        x = np.divide(x, length, out=np.zeros_like(x), where=length > 0).astype(np.float32)
    for shuffled in shuffles(x, num_null_samples, rng):
        products = torch.from_numpy(shuffled @ shuffled.T)  # exactly symmetric: NumPy computes one half
        yield weights_in_place(products, weight=weight).double().numpy()
