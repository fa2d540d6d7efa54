"""Which samples are held out together: folds that depend neither on the samples' order nor on ranks or batches."""

import torch
from torch import Tensor


def row_hashes(values: Tensor) -> Tensor:
    """A number for each row that depends on its content alone, so that it is the same on every rank, all run long.

    Args:
        values: (N, ...) of any dtype; floating values are compared in float32, and zeros at the end count nothing, so
            that texts may be padded to any length.

    Returns:
        int64 (N,), pseudo-random.

    Example:
        >>> import torch
        >>> one, same, other = row_hashes(torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])).tolist()
        >>> one == same, one == other
        (True, False)
    """
    rows = values.detach().flatten(1) if values.ndim > 1 else values.detach()[:, None]
    # Adding 0 makes -0 the same as 0.
    bits = (rows.float() + 0.0).view(torch.int32) if rows.is_floating_point() else rows.to(torch.int32)
    weights = (torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x9E3779B1).to(torch.int32)
    hashes = (bits * weights).sum(1)
    for shift in (31, 29, 32):  # neighbouring sums must not become neighbours in order
        hashes = (hashes ^ (hashes >> shift)) * -0x40A7B892E31B1A47
    return hashes


def canonical_order(attributes: Tensor, *keys: Tensor) -> Tensor:
    """An order of the samples that does not depend on the one they came in: by attributes, then by the keys.

    Args:
        attributes: (N, A), NaN where missing.
        keys: int64 (N,) each, the most important first.

    Returns:
        (N,) positions.
    """
    profile = torch.zeros(len(attributes), dtype=torch.int64, device=attributes.device)
    if attributes.numel():
        profile = torch.unique(attributes.nan_to_num(nan=2.0), dim=0, return_inverse=True)[1]
    order = torch.arange(len(attributes), device=attributes.device)
    for key in (*reversed(keys), profile):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def stratified_folds(groups: Tensor, folds: int) -> Tensor:
    """Deal samples, in their canonical order, to folds: each kind of sample evenly, and no group to two folds.

    Args:
        groups: int64 (N,); samples of one group stay together.
        folds: How many.

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
    return turn[inverse] % folds
