"""The null model of loops, branches and bars: a Gaussian cloud with the same mean and covariance."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor


def gaussian_like(points: Tensor, generator: torch.Generator) -> Tensor:
    """As many points as given, drawn from the Gaussian with their mean and covariance.

    Args:
        points: (N, units), finite, at least 2.
        generator: Draws on the CPU, in float64.
    """
    x = points.detach().cpu().double()
    centred = x - x.mean(dim=0)
    if len(x) <= x.shape[1]:
        # Random combinations of the points themselves have their covariance, and need no matrix of units x units.
        root = centred
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    draw = torch.randn(len(x), len(root), generator=generator, dtype=torch.float64)
    cloud: Tensor = x.mean(dim=0) + draw @ root / (len(x) - 1) ** 0.5
    return cloud.to(points)


def null_measures(
    points: Tensor, measure: Callable[[Tensor], Mapping[str, float]], *, num_null_samples: int, seed: int = 0
) -> dict[str, float]:
    """Measures of Gaussian clouds like the points, as measure + `_null` -> mean; nothing for fewer than 2 points."""
    if len(points) < 2:
        return {}
    generator = torch.Generator().manual_seed(seed)
    found = [measure(gaussian_like(points, generator)) for _ in range(num_null_samples)]
    return {f"{name}_null": float(np.mean([one[name] for one in found])) for name in found[0]}
