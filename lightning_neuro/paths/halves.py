"""Two halves of the samples of each concept: paths are found on one and judged on the other.

Which sample goes where depends on the samples alone, on a checksum of their content, and neither on their order nor on
how they are spread over ranks: shards give what a single process gives.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor


def sample_keys(inputs: Any, num_samples: int) -> Tensor:
    """A checksum of each sample's part of a model's inputs, int64 (N,), on the CPU."""
    keys = [0] * num_samples
    for tensor in _tensors(inputs):
        if num_samples not in tensor.shape[:2]:
            continue
        rows = tensor.detach().transpose(0, tensor.shape.index(num_samples)).cpu()
        # In float32 whatever the precision of the run.
        rows = rows.float() if rows.is_floating_point() else rows
        rows = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(num_samples, -1).contiguous()
        keys = [crc32(row.tobytes(), key) for row, key in zip(rows.numpy(), keys, strict=True)]
    return torch.tensor(keys, dtype=torch.int64)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    for part in parts:
        yield from _tensors(part)


def assign_turns(keys: Tensor, concepts: Tensor, per_concept: int) -> Tensor:
    """Each chosen sample's number within its concept; even numbers are the first half, odd ones the second.

    Args:
        keys: int64 (N,) checksums.
        concepts: (N,) whole numbers, negative for none.
        per_concept: How many samples of each concept are chosen, those of the smallest checksums.

    Returns:
        int64 (N,), -1 for samples that are not chosen.

    Example:
        >>> assign_turns(torch.tensor([30, 10, 20, 5]), torch.tensor([0, 0, 0, 1]), per_concept=2).tolist()
        [-1, 0, 1, 0]
    """
    by_key = torch.argsort(keys, stable=True)
    order = by_key[torch.argsort(concepts[by_key], stable=True)]
    counts = torch.unique_consecutive(concepts[order], return_counts=True)[1]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turns = torch.empty_like(order)
    turns[order] = torch.arange(len(order), device=order.device) - starts
    return torch.where((concepts >= 0) & (turns < per_concept), turns, -1)
