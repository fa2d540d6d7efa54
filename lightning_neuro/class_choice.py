"""Which classes the probe set holds enough samples of: those that class-based measures cover."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.identity import canonical_order, content_hash, number_in_group

# Fewer samples than this say little about a class ...
MIN_PER_CLASS = 16
# ... but even a small probe set tells so many classes apart.
MIN_CLASSES = 10


@dataclass(frozen=True)
class ClassChoice:
    """Which classes a probe set holds, if there are more than it can hold at least 16 samples of.

    Attributes:
        num_samples: Size of the set, over all ranks.
        seed: Seed by which classes are drawn.
        given: Labels of the classes that the user wants; None: as many as fit.
    """

    num_samples: int
    seed: int = 0
    given: tuple[int, ...] | None = None

    def among(self, labels: Tensor) -> Tensor | None:
        """Choose classes.

        Those with at least 16 samples come first. Among equals, a hash of the label and the seed decides, so that all
        ranks choose the same ones.

        Args:
            labels: (N,) labels of the samples to choose from; negative ones are no class.

        Returns:
            (K,) int64, sorted, with K = max(`num_samples` // 16, 10); None if there are no more classes than that.

        Example:
            >>> ClassChoice(512).among(torch.arange(1_000).repeat(20)).shape
            torch.Size([32])
        """
        if self.given is not None:
            return torch.tensor(sorted(self.given))
        present, counts = torch.unique(labels[labels >= 0], return_counts=True)
        limit = max(self.num_samples // MIN_PER_CLASS, MIN_CLASSES)
        if len(present) <= limit:
            return None
        drawn = content_hash(torch.stack([present, torch.full_like(present, self.seed)], dim=1))
        order = canonical_order(-counts.clamp(max=MIN_PER_CLASS), drawn)
        chosen: Tensor = present[order[:limit]].sort().values
        return chosen


def order_by_class(labels: Tensor, classes: Tensor | None) -> Tensor:
    """A permutation of the samples in which every prefix is balanced: first those of some classes, then the others.

    Args:
        labels: (N,) integer labels, themselves in random order.
        classes: The classes that come first; None: all.

    Returns:
        (N,) positions.

    Example:
        >>> order_by_class(torch.tensor([0, 2, 1, 0, 1]), torch.tensor([0, 1])).tolist()
        [0, 2, 3, 4, 1]
    """
    order = stratified(labels)
    if classes is None:
        return order
    first = torch.isin(labels[order], classes)
    return torch.cat([order[first], order[~first]])


def stratified(labels: Tensor) -> Tensor:
    """A permutation of the samples in which every prefix is as class-balanced as possible.

    Args:
        labels: (N,) integer labels, themselves in random order.

    Returns:
        (N,) positions: the first sample of each class, then the second of each, and so on.

    Example:
        >>> stratified(torch.tensor([0, 0, 0, 1, 2])).tolist()
        [0, 3, 4, 1, 2]
    """
    return torch.argsort(number_in_group(labels), stable=True)
