"""Forbids the host to read tensors: each read would make it wait for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero")
_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")


class _NoReads(TorchDispatchMode):
    """Raises at operations whose result, or its shape, depends on values that the host must know."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _READS or (name.startswith("index") and _has_mask(args)):
            raise AssertionError(f"the host reads a tensor by aten::{name}")
        return func(*args, **(kwargs or {}))


def _has_mask(args) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


def _forbidden(name: str):
    def read(*_, **__):
        raise AssertionError(f"the host reads a tensor by Tensor.{name}")

    return read


@contextmanager
def no_host_reads() -> Iterator[None]:
    """No tensor may be read on the host inside the block."""
    with _NoReads():
        patches = [patch.object(torch.Tensor, name, _forbidden(name)) for name in _METHODS]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()
