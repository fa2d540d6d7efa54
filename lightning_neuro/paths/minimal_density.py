"""The smallest path that preserves the network's predictions for a concept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.paths.evaluation import PathEvaluation, evaluate_paths
from lightning_neuro.paths.options import Ablation, Layers
from lightning_neuro.paths.top_units import Paths, Scores, concept_paths

RETENTION = 0.9
INFORMEDNESS = 0.5
NUM_STEPS = 7


def minimal_paths(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    scores: Scores,
    *,
    layers: Layers = None,
    ablation: Ablation = "zero",
    retention: float = RETENTION,
    informedness: float = INFORMEDNESS,
    num_steps: int = NUM_STEPS,
    num_others: int | None = None,
) -> tuple[Paths, Tensor]:
    """Find, for each class, the smallest path that retains its predictions and separates it from the others.

    The densities are found by bisection over nested paths, all classes in one batch per step. Evaluate the paths on
    other samples.

    Args:
        model: As for `attribution_scores`.
        inputs: The model's input, for N samples.
        targets: (N,) class labels, integers.
        scores: Layer -> (classes, units), as `attribution_scores` returns them.
        layers: As for `evaluate_paths`.
        ablation: `"zero"` or `"mean"`, as for the scores.
        retention: Minimum accuracy with only the path active, relative to the full network's.
        informedness: Minimum difference between the true and the false positive rate of the path.
        num_steps: Number of bisections: densities are exact to 2^-num_steps.
        num_others: Number of other classes' paths with which each sample is run; default: all.

    Returns:
        Layer -> bool (classes, units), and the float64 (classes,) densities; 1 for a class for which no smaller path
        was sufficient.

    Raises:
        ArgumentError: As in `evaluate_paths`.

    Example:
        >>> from lightning_neuro.paths import attribution_scores
        >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> minimal_paths(net, x, y, attribution_scores(net, x, y))[0]["1"].diagonal().tolist()
        [True, True, True, True]
    """

    def evaluate(paths: Paths) -> PathEvaluation:
        return evaluate_paths(model, inputs, targets, paths, layers=layers, ablation=ablation, num_others=num_others)

    densities = minimal_densities(scores, evaluate, retention=retention, informedness=informedness, num_steps=num_steps)
    return concept_paths(scores, densities), densities


def minimal_densities(
    scores: Scores,
    evaluate: Callable[[Paths], PathEvaluation],
    *,
    retention: float = RETENTION,
    informedness: float = INFORMEDNESS,
    num_steps: int = NUM_STEPS,
) -> Tensor:
    """The densities of `minimal_paths`, with any function that evaluates paths."""

    def sufficient(densities: Tensor) -> Tensor:
        found = evaluate(concept_paths(scores, densities))
        return (found.retention >= retention) & (found.informedness >= informedness)

    return smallest_densities(sufficient, len(next(iter(scores.values()))), num_steps=num_steps)


def smallest_densities(
    sufficient: Callable[[Tensor], Tensor], num_concepts: int, *, num_steps: int = NUM_STEPS
) -> Tensor:
    """The smallest sufficient density of each concept, by bisection for all concepts at once.

    Args:
        sufficient: Returns which of (concepts,) densities are sufficient, bool (concepts,). Assumed to be monotonic,
            because the paths are nested.
        num_concepts: K.
        num_steps: Number of bisections: the result is exact to 2^-num_steps.

    Returns:
        float64 (concepts,): the smallest density found to be sufficient; 1 if none was.
    """
    low, high = torch.zeros(num_concepts, dtype=torch.float64), torch.ones(num_concepts, dtype=torch.float64)
    for _ in range(num_steps):
        middle = (low + high) / 2
        enough = sufficient(middle).cpu()
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high
