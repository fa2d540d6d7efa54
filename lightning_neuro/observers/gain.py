"""How much better an attribute can be predicted than from a reference, with a lower bound.

The reference is the same layer before training, or the raw input. A level alone says little about training: an
untrained layer may predict a watermark with a balanced accuracy of .78.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DECISIVE = 0.95


def gain(score: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The difference between two balanced accuracies, and its one-sided lower 95 % bound.

    The bound follows from those of the two scores by adding the squares of their distances (Newcombe, 1998, method 10;
    Zou and Donner, 2008). Both scores are of the same samples, which the bound does not use: if they are positively
    correlated, as they usually are, it is too low.

    Args:
        score: (A, 3), balanced accuracy, its lower and its upper bound.
        reference: (A, 3), the same for the reference.

    Returns:
        (A,) and (A,); NaN where a score is undefined.

    Example:
        >>> now, before = torch.tensor([[0.90, 0.86, 0.93]]), torch.tensor([[0.70, 0.65, 0.74]])
        >>> difference, low = gain(now, before)
        >>> round(difference.item(), 3), round(low.item(), 3)
        (0.2, 0.143)
    """
    (value, low, _), (other, _, high) = score.unbind(1), reference.unbind(1)
    return value - other, value - other - ((value - low).square() + (high - other).square()).sqrt()


def captured(score: Tensor, reference: Tensor, control: Tensor | None = None) -> Tensor:
    """Which attributes a layer has captured decisively.

    The lower 95 % bound of the balanced accuracy is at least .95, and above the upper bound of the reference and the
    mean of the controls, where these are known.

    Args:
        score: (A, 3), balanced accuracy, its lower and its upper bound.
        reference: (A, 3), the same for the layer before training.
        control: (A,), the mean balanced accuracy of the controls.

    Returns:
        bool (A,).
    """
    low, before = score[:, 1], reference[:, 2]
    found = (low >= DECISIVE) & ((low > before) | before.isnan())
    return found if control is None else found & ((low > control) | control.isnan())


def undefined(count: int) -> Tensor:
    """(count, 3), a reference that was not measured."""
    return torch.full((count, 3), torch.nan, dtype=torch.float64)


def references(names: Sequence[str], scores: Mapping[str, Sequence[float]]) -> Tensor:
    """(A, 3), the scores of some attributes with their bounds, NaN for those that were not measured."""
    missing = [torch.nan] * 3
    return torch.tensor([list(scores.get(name, missing)) for name in names], dtype=torch.float64).reshape(-1, 3)
