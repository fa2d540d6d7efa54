"""Which samples are held out together: folds that do not depend on the samples' order, on ranks or on batches."""

from typing import Any

import torch
from torch import Tensor

from lightning_neuro.batches import samples_first, tensors_in
from lightning_neuro.identity import canonical_order


def row_hashes(values: Tensor) -> Tensor:
    """A number for each row that depends on its content alone, so that it is the same on every rank, all run long.

    Args:
        values: (N, ...) of any dtype. Floating values are compared in float32; zeros at the end of a row do not count,
            so texts may be padded to any length.

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


def fold_groups(groups: Tensor | None, inputs: Any, num_samples: int, *, num_before: int) -> Tensor:
    """A number for each sample of a batch; samples with the same number are held out together.

    Args:
        groups: int64 (num_samples,), the user's groups, if there are any. Otherwise samples are numbered by the content
            of their input, so that a sample is in the same fold throughout the run, on whatever rank; and by their
            position if the inputs hold no tensor with them, because they come in the same order in every pass.
        inputs: The model's inputs, a tensor or nested tensors.
        num_samples: Number of samples.
        num_before: Number of samples in earlier batches of the pass.

    Returns:
        int64 (num_samples,), on the CPU.
    """
    if groups is not None:
        return row_hashes(groups[:, None])
    rows = (samples_first(tensor, num_samples) for tensor in tensors_in(inputs))
    hashes = [row_hashes(part).cpu() for part in rows if part is not None]
    if not hashes:
        return torch.arange(num_samples) + num_before
    # All tensors together: the mask of a text alone would group all texts of one length.
    return hashes[0] if len(hashes) == 1 else row_hashes(torch.stack([part >> 32 for part in hashes], 1))


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
    """Assign samples, in the order of `attribute_order`, to folds: each kind evenly, and no group to two folds.

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
