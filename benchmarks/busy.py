"""Busy cores, as on the machines of users: the workers of data loaders keep them busy while the network trains."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset


@contextmanager
def busy_cores(busy: bool) -> Iterator[None]:
    """Keep all cores busy inside the block: one process per core loads and augments images without end."""
    count = os.cpu_count() or 1
    processes = [multiprocessing.Process(target=_load, daemon=True) for _ in range(count if busy else 0)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


class _Augmented(Dataset[Any]):
    """Images that are flipped, cropped and normalised, as in a training on photographs."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8).astype(np.float32)
        row, column = rng.integers(0, 8, 2)
        return ((image[::-1][row : row + 56, column : column + 56] - 128) / 64).transpose(2, 0, 1).copy()


def _load() -> None:
    # A worker's loop without a worker: daemons may have no children.
    for _ in DataLoader(_Augmented(), batch_size=64):
        pass
