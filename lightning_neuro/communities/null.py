"""The null model: what the same units would give if they did not act together.

Modularity is never zero by chance, and how high chance goes depends on the number of samples and on how sparse the
units are. So each unit's activations are permuted over the samples, independently of the other units: every unit keeps
its own distribution, and all that is left of their acting together is accident.

Only each unit's distribution is needed for that. It is exact up to ``KEPT_ROWS`` samples, and estimated from that many
kept samples beyond; the permuted data always have the full number of samples, because the null depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.communities.graph import STATE_WEIGHTS, edge_weights
from lightning_neuro.communities.louvain import Floats

Values = npt.NDArray[np.float32]

KEPT_ROWS = 2048
_FRESH_UP_TO = 1024


def keep_rows(stacked: Tensor) -> Tensor:
    """Reduce samples to at most ``KEPT_ROWS``, the same ones whatever the order and the parts.

    Each sample has a key computed from its values, and the smallest keys stay. Rows of zeros are padding: a sample in
    which no unit acts is not kept but counted (they would share one key, and be kept all or none).

    Args:
        stacked: float32 ``(rows, d)``, or ``(parts, rows, d)`` of several shards or ranks padded with rows of zeros.

    Returns:
        ``(at most KEPT_ROWS, d)`` float32.
    """
    rows = stacked.flatten(0, -2)
    acting = (rows != 0).any(dim=1)
    rows = rows if acting.all() else rows[acting]
    if len(rows) <= KEPT_ROWS:
        return rows
    return rows[_keys(rows).sort(stable=True).indices[:KEPT_ROWS]]


def _keys(rows: Tensor) -> Tensor:
    """A pseudo-random int64 for each sample, a function of its bits alone: multilinear hashing, then a bit mixer."""
    generator = torch.Generator().manual_seed(20210604)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
    bits = (rows + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 and 0.0 the same bits
    key = (bits * factors.to(rows.device)).sum(dim=1)
    key = (key ^ (key >> 31)) * 0x7FB5D329728EA185
    return key ^ (key >> 29)


def stretch(rows: Values, num_samples: int, num_silent: int) -> Values:
    """Each unit's distribution as ``(d, num_samples)`` values: its kept ones, repeated evenly, and the silent zeros."""
    values = np.zeros((rows.shape[1], num_samples), dtype=np.float32)
    num_acting = num_samples - num_silent
    if num_acting and len(rows):
        sources = ((np.arange(num_acting) + 0.5) * (len(rows) / num_acting)).astype(np.int64)
        values[:, :num_acting] = np.sort(rows.T, axis=1)[:, sources]
    return values


def shuffles(values: Values, draws: int, rng: np.random.Generator) -> Iterator[Values]:
    """Draw ``(d, n)`` data in which every unit's values are permuted independently.

    Permuting 1,024 units of 10,000 samples takes 0.25 s, so beyond a thousand samples all draws share one permutation
    and turn every unit by its own random offset. Each draw by itself is still a uniform independent permutation; what
    the draws share is spread over all offsets, and no pair of units meets twice in the same position but by accident.
    """
    d, n = values.shape
    fresh = n <= _FRESH_UP_TO
    base = values if fresh else rng.permuted(values, axis=1)
    for _ in range(draws):
        if fresh:
            yield rng.permuted(values, axis=1)
            continue
        turned = np.empty_like(base)
        offsets: list[int] = rng.integers(n, size=d).tolist()  # type: ignore[assignment]
        for unit, offset in enumerate(offsets):
            turned[unit, offset:] = base[unit, : n - offset]
            turned[unit, :offset] = base[unit, n - offset :]
        yield turned


def null_graphs(values: Values, weight: str, draws: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Adjacency matrices of permuted data.

    Args:
        values: ``(d, n)`` float32, each unit's distribution over the samples.
        weight: the edge weight.
        draws: how many graphs.
        rng: a private generator.
    """
    x = (values > 0).astype(np.float32) if weight in STATE_WEIGHTS else values
    if weight == "coactivation":
        x = x / np.float32(np.sqrt(x.shape[1]))
    else:  # with each row centred and of length 1, the matrix of products holds the correlations
        x = x - x.mean(axis=1, keepdims=True, dtype=np.float64)
        length = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
        x = np.divide(x, length, out=np.zeros_like(x), where=length > 0).astype(np.float32)
    for shuffled in shuffles(x, draws, rng):
        products = torch.from_numpy(shuffled @ shuffled.T)  # numpy computes only half of a product with itself
        yield edge_weights(products, weight=weight).double().numpy()
