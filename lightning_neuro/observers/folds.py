"""Folds of the cross-validation, which do not depend on the samples' order, on ranks or on batches."""

from typing import Any

import torch
from torch import Tensor

from lightning_neuro.identity import canonical_order, content_hash, sample_hashes


def fold_groups(groups: Tensor | None, inputs: Any, num_samples: int, *, num_before: int) -> Tensor:
    """A number for each sample of a batch; samples with the same number are held out together.

    Args:
        groups: int64 (num_samples,), the user's groups, if any. Otherwise samples are numbered by the content of their
            input, so that a sample is in the same fold throughout the run and on any rank; or by their position if no
            tensor in the inputs holds the samples, because their order is the same in every pass.
        inputs: The model's inputs, a tensor or nested tensors.
        num_samples: Number of samples.
        num_before: Number of samples in earlier batches of the pass.

    Returns:
        int64 (num_samples,), on the CPU.
    """
    if groups is not None:
        return content_hash(groups)
    hashes = sample_hashes(inputs, num_samples)
    return torch.arange(num_samples) + num_before if hashes is None else hashes


def attribute_order(attributes: Tensor, *keys: Tensor) -> Tensor:
    """A permutation of the samples that does not depend on their order: by attributes, then by the keys.

    Args:
        attributes: (N, A), NaN where missing.
        keys: int64 (N,) each, the most important first.

    Returns:
        (N,) positions.
    """
    profile = torch.zeros(len(attributes), dtype=torch.int64, device=attributes.device)
    if attributes.numel():
        profile = torch.unique(attributes.nan_to_num(nan=2.0), dim=0, return_inverse=True)[1]
    return canonical_order(profile, *keys)


def stratified_folds(groups: Tensor, num_folds: int) -> Tensor:
    """Assign samples, in the order of `attribute_order`, to folds: stratified by attributes, without splitting groups.

    Args:
        groups: int64 (N,); samples of one group stay together.
        num_folds: Number of folds.

    Returns:
        int64 (N,), the fold of each sample.

    Example:
        >>> stratified_folds(torch.tensor([7, 3, 7, 5, 9]), 2).tolist()
        [0, 1, 0, 0, 1]
    """
    _, inverse = torch.unique(groups, return_inverse=True)
    positions = torch.arange(len(groups), device=groups.device)
    num_groups = int(inverse.max()) + 1 if len(groups) else 0
    first = positions.new_full((num_groups,), len(groups)).scatter_reduce(0, inverse, positions, "amin")
    turn = torch.argsort(torch.argsort(first))
    return turn[inverse] % num_folds
