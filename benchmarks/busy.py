"""Other processes that keep all cores busy, as on a shared machine."""

import itertools
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def busy_cores(busy: bool) -> Iterator[None]:
    """Keep all cores busy with other processes inside the block."""
    processes = [
        multiprocessing.Process(target=_spin, daemon=True) for _ in range(torch.get_num_threads() if busy else 0)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()


def _spin() -> None:
    for _ in itertools.count():
        pass
