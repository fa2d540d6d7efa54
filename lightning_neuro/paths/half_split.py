"""Two halves of the samples of each concept: paths are found on the first and evaluated on the second.

The half of a sample depends on its content alone (a hash), and not on the order of the samples or on the ranks that
hold them, so any number of processes gives the same result.
"""

import torch
from torch import Tensor

from lightning_neuro.identity import canonical_order, number_in_group


def numbers_in_concept(hashes: Tensor, concepts: Tensor, per_concept: int) -> Tensor:
    """The number of each chosen sample within its concept; even numbers are the first half, odd ones the second.

    Args:
        hashes: int64 (N,), as `lightning_neuro.identity.sample_hashes` returns them.
        concepts: (N,) integers, negative for none.
        per_concept: Number of samples of each concept that are chosen: those with the smallest hashes.

    Returns:
        int64 (N,), -1 for samples that are not chosen.

    Example:
        >>> numbers_in_concept(torch.tensor([30, 10, 20, 5]), torch.tensor([0, 0, 0, 1]), per_concept=2).tolist()
        [-1, 0, 1, 0]
    """
    order = canonical_order(concepts, hashes)
    numbers = torch.empty_like(order)
    numbers[order] = number_in_group(concepts[order])
    return torch.where((concepts >= 0) & (numbers < per_concept), numbers, -1)
