"""From scores to paths: which units a concept's path keeps in each layer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Scores = Mapping[str, Tensor]
Paths = dict[str, Tensor]


def concept_paths(scores: Scores, density: float | Tensor = 0.3) -> Paths:
    """The units with the highest scores, for each concept and layer.

    A path keeps the share `density` of a layer's units (at least one), those that score highest, as far as their score
    is positive: a unit that does nothing for a concept, or works against it, is never part of its path. Paths of one
    concept are nested: one of lower density lies inside one of higher.

    Args:
        scores: Layer -> (concepts, units), as `attribution_scores` gives them.
        density: Share of the units of each layer, above 0 and at most 1; or (concepts,) of them.

    Returns:
        Layer -> bool (concepts, units); no unit for a concept whose scores are NaN.

    Raises:
        ValueError: For a density outside of this.

    Example:
        >>> concept_paths({"fc": torch.tensor([[3.0, 1.0, 2.0, -1.0]])}, density=0.5)["fc"].tolist()
        [[True, False, True, False]]
    """
    if isinstance(density, Tensor):
        if not bool(((density > 0) & (density <= 1)).all()):
            raise ValueError(f"density must be above 0 and at most 1, got {density.tolist()}.")
    else:
        check_density(density)
    return {layer: _highest(values, density) for layer, values in scores.items()}


def check_density(density: Any) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: Saying what is allowed.
    """
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or not math.isfinite(density) or not 0 < density <= 1:
        raise ValueError(f"density must be a number above 0 and at most 1, got {density!r}.")


def _highest(scores: Tensor, density: float | Tensor) -> Tensor:
    values = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    units = scores.shape[1]
    share = torch.as_tensor(density, dtype=torch.float64).to(scores.device).expand(len(scores))
    kept = (share * units).round().clamp(min=1, max=units)
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < kept[:, None]) & (values > 0)


def smallest_densities(passes: Callable[[Tensor], Tensor], num_concepts: int, *, steps: int = 7) -> Tensor:
    """For each concept the smallest density that passes, by bisection, all concepts in step.

    Args:
        passes: Says of (concepts,) densities which of them are enough, bool (concepts,). Taken to stay true from some
            density on, as the paths are nested.
        num_concepts: K.
        steps: Halvings: the result is right to 2^-steps.

    Returns:
        float64 (concepts,): the smallest density that was seen to pass; 1 where none did.
    """
    low, high = torch.zeros(num_concepts, dtype=torch.float64), torch.ones(num_concepts, dtype=torch.float64)
    for _ in range(steps):
        middle = (low + high) / 2
        enough = passes(middle).cpu()
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high
