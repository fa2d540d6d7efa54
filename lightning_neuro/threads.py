"""How many threads the analysis uses: one for small work, because several would wait for each other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

# From this number of values in one layer on (512 samples of 2,048 units), the work is worth more than one thread.
LARGE = 2**20


@contextmanager
def threads_for(num_values: int) -> Iterator[None]:
    """Use one thread inside the block if the work is small, and as many as before for large work.

    Small operations on several threads wait for each other: with all cores busy, an evaluation took six times as long
    on two threads as on one. The setting is restored at the end, also after an exception. It holds for torch and for
    the libraries that NumPy, SciPy and scikit-learn use.

    Args:
        num_values: Number of values in the largest matrix of activations.
    """
    if num_values >= LARGE:
        yield
        return
    before = torch.get_num_threads()
    with _controller(len(sys.modules)).limit(limits=1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _controller(num_modules: int) -> Any:
    """The thread pools of all libraries; they are looked up anew, in 3 ms, if modules were imported meanwhile."""
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()
