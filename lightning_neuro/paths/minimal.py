"""The smallest path that still does what the network does for a concept."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_neuro.paths.evaluation import PathEvaluation, evaluate_paths
from lightning_neuro.paths.selection import Paths, Scores, concept_paths, smallest_densities
from lightning_neuro.paths.sites import Layers

RETENTION = 0.9
SELECTIVITY = 0.5


def minimal_paths(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    scores: Scores,
    *,
    layers: Layers = None,
    ablation: str = "zero",
    retention: float = RETENTION,
    selectivity: float = SELECTIVITY,
    steps: int = 7,
    others: int | None = None,
) -> tuple[Paths, Tensor]:
    """For each class the path of the smallest density that keeps its answers and tells it from the others.

    Found by bisection over nested paths, all classes in one batch a step. Judge the paths on other samples than these.

    Args:
        model: As for `attribution_scores`.
        inputs: What the model takes, for N samples.
        targets: (N,) class labels.
        scores: Layer -> (classes, units), as `attribution_scores` gives them.
        layers: Which modules the scores' layers are, where they are not found by their names.
        ablation: `"zero"` or `"mean"`; that of the scores.
        retention: The least share of the network's own right answers that the path must give.
        selectivity: The least difference between the path's answers on the class's samples and on others.
        steps: Halvings: densities are right to 2^-steps.
        others: How many other classes' paths each sample is shown to; default: all.

    Returns:
        Layer -> bool (classes, units), and the float64 (classes,) densities; 1 for a class for which no smaller path
        was enough.

    Example:
        >>> import torch
        >>> from lightning_neuro.paths import attribution_scores
        >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> minimal_paths(net, x, y, attribution_scores(net, x, y))[0]["1"].diagonal().tolist()
        [True, True, True, True]
    """

    def judge(paths: Mapping[str, Tensor]) -> PathEvaluation:
        return evaluate_paths(model, inputs, targets, paths, layers=layers, ablation=ablation, others=others)

    densities = minimal_densities(scores, judge, retention=retention, selectivity=selectivity, steps=steps)
    return concept_paths(scores, densities), densities


def minimal_densities(
    scores: Scores,
    judge: Callable[[Paths], PathEvaluation],
    *,
    retention: float = RETENTION,
    selectivity: float = SELECTIVITY,
    steps: int = 7,
) -> Tensor:
    """The densities of `minimal_paths`, with any way to judge paths."""

    def passes(densities: Tensor) -> Tensor:
        found = judge(concept_paths(scores, densities))
        return (found.retention >= retention) & (found.selectivity >= selectivity)

    return smallest_densities(passes, len(next(iter(scores.values()))), steps=steps)
