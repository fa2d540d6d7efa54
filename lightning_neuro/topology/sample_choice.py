"""The choice and order of the samples, the same throughout the run and on any number of ranks."""

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.identity import content_hash, number_in_group


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 outside of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def number_hashes(numbers: Tensor, draw: int = 0) -> Tensor:
    """A reproducible pseudo-random number for each sample number; a different one for each value of `draw`."""
    return content_hash(torch.stack([numbers, torch.full_like(numbers, draw)], dim=1))


def random_order(samples: Tensor, labels: Tensor, draw: int = 0) -> Tensor:
    """A reproducible permutation of the samples in which every prefix is as class-balanced as possible."""
    order = torch.argsort(number_hashes(samples, draw), stable=True)
    return order[torch.argsort(number_in_group(labels[order]), stable=True)] if len(order) else order


def content_order(points: Tensor) -> Tensor:
    """A permutation of the rows that depends only on their content: the order of their bytes."""
    rows = np.ascontiguousarray(points.cpu().numpy())
    if len(rows) == 0:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel().argsort(kind="stable"))
