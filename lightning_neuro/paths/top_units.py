"""From scores to paths: the units with the highest scores in each layer."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_neuro.checks import check_number, require
from lightning_neuro.paths.options import DEFAULT_DENSITY

Scores = Mapping[str, Tensor]
Paths = dict[str, Tensor]


def concept_paths(scores: Scores, density: float | Tensor = DEFAULT_DENSITY) -> Paths:
    """The path of each concept: the units with the highest scores in each layer.

    A path keeps the fraction `density` of a layer's units (at least one), those that score highest, as long as their
    score is positive: a unit without effect on a concept, or with a negative one, is never part of its path. Paths of
    one concept are nested: one of lower density lies inside one of higher density.

    Args:
        scores: Layer -> (concepts, units), as `attribution_scores` returns them.
        density: Fraction of the units of each layer, above 0 and at most 1; or a tensor of them, (concepts,).

    Returns:
        Layer -> bool (concepts, units); no unit for a concept whose scores are NaN.

    Raises:
        ArgumentError: If a density is outside of this range.

    Example:
        >>> concept_paths({"fc": torch.tensor([[3.0, 1.0, 2.0, -1.0]])}, density=0.5)["fc"].tolist()
        [[True, False, True, False]]
    """
    if isinstance(density, Tensor):
        require(bool(((density > 0) & (density <= 1)).all()), "density", _FRACTION, str(density.tolist()))
    else:
        check_density(density)
    return {layer: _highest(values, density) for layer, values in scores.items()}


_FRACTION = "be a number above 0 and at most 1"


def check_density(density: Any) -> None:
    """Require a fraction above 0 and at most 1.

    Raises:
        ArgumentError: If it is not.
    """
    check_number("density", density, _FRACTION, lambda value: 0 < value <= 1)


def _highest(scores: Tensor, density: float | Tensor) -> Tensor:
    values = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    units = scores.shape[1]
    fraction = torch.as_tensor(density, dtype=torch.float64).to(scores.device).expand(len(scores))
    kept = (fraction * units).round().clamp(min=1, max=units)
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < kept[:, None]) & (values > 0)
