"""Identity of samples: a hash of the content, an order that does not depend on arrival, the number within a group.

Samples arrive in a different order on every rank and in every sharding. A choice among them (a subsample, a fold, a
half) must not depend on this order, so it is made by content.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_neuro.batches import samples_first, tensors_in

_SEED = 20_210_604


def content_hash(rows: Tensor) -> Tensor:
    """A pseudo-random number for each row that depends only on the row's content.

    Multilinear hashing modulo 2^64 with random odd factors, then a bit mixer. Floating-point values are compared in
    float32 (-0 equals 0). Zeros at the end of a row are ignored, so texts may be padded to any length.

    Args:
        rows: (N, ...) of any dtype.

    Returns:
        int64 (N,), not negative (63 bits), on the device of the rows.

    Example:
        >>> import torch
        >>> one, same, other = content_hash(torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])).tolist()
        >>> one == same, one == other
        (True, False)
    """
    rows = torch.view_as_real(rows.detach()) if rows.is_complex() else rows.detach()
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    # Adding 0 turns -0 into 0.
    bits = (flat.float() + 0.0).view(torch.int32).long() if flat.is_floating_point() else flat.long()
    generator = torch.Generator().manual_seed(_SEED)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1
    key = (bits * factors.to(bits.device)).sum(dim=1)
    key = (key ^ (key >> 31)) * 0x7FB5D329728EA185
    return key ^ (key >> 29)


def sample_hashes(inputs: Any, num_samples: int) -> Tensor | None:
    """A hash of each sample's part of a model's inputs.

    Args:
        inputs: Tensors, or nested collections of them, with the samples in dimension 0 (or 1, after the time).
        num_samples: N.

    Returns:
        int64 (N,) on the CPU; None if no tensor holds the samples.
    """
    rows = (samples_first(tensor, num_samples) for tensor in tensors_in(inputs))
    hashes = [content_hash(part).cpu() for part in rows if part is not None]
    if not hashes:
        return None
    # All tensors are used, because the mask of a text alone would be the same for all texts of one length.
    return hashes[0] if len(hashes) == 1 else content_hash(torch.stack(hashes, dim=1))


def canonical_order(*keys: Tensor) -> Tensor:
    """The order that sorts samples by the keys, the most important first.

    Args:
        keys: (N,) each; ties in all keys keep their order.

    Returns:
        int64 (N,) positions.
    """
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def number_in_group(groups: Tensor) -> Tensor:
    """The number of each sample within its group, from 0, in the order of the samples.

    Args:
        groups: (N,) integers.

    Returns:
        int64 (N,).

    Example:
        >>> import torch
        >>> number_in_group(torch.tensor([5, 2, 5, 5, 2])).tolist()
        [0, 0, 1, 2, 1]
    """
    by_group = torch.argsort(groups, stable=True)
    counts = torch.unique_consecutive(groups[by_group], return_counts=True)[1]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    number = torch.empty_like(by_group)
    number[by_group] = torch.arange(len(groups), device=groups.device) - starts
    return number
