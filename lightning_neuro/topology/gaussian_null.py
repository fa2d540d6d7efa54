"""The null model for loops, branches and bars: a Gaussian cloud with the same mean and covariance."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


def gaussian_like(points: Tensor, generator: torch.Generator, count: int = 1) -> Iterator[Tensor]:
    """Sample clouds of as many points as given from the Gaussian with their mean and covariance.

    Args:
        points: (N, units), finite, at least 2.
        generator: Random generator on the CPU.
        count: Number of clouds.

    Yields:
        (N, units), in the dtype and on the device of the points.
    """
    x = points.detach().cpu().double()
    mean = x.mean(dim=0)
    centred = x - mean
    if len(x) <= x.shape[1]:
        # Random combinations of the centred points have their covariance, and need no (units x units) matrix.
        root = centred
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    for _ in range(count):
        draw = torch.randn(len(x), len(root), generator=generator, dtype=torch.float64)
        yield (mean + draw @ root / (len(x) - 1) ** 0.5).to(points)


def null_measures(
    points: Tensor, measure: Callable[[Tensor], Mapping[str, float]], *, num_null_samples: int, seed: int = 0
) -> dict[str, float]:
    """Mean measures of Gaussian clouds like the points: measure + `_null` -> value; empty for fewer than 2 points."""
    if len(points) < 2:
        return {}
    generator = torch.Generator().manual_seed(seed)
    found = [measure(cloud) for cloud in gaussian_like(points, generator, num_null_samples)]
    return {f"{name}_null": float(np.mean([one[name] for one in found])) for name in found[0]}
