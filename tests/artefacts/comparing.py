"""Whether a result that was read is the one that was saved, up to the precision that docs/artefacts.md states."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEFT_OUT = ("drift_distances",)
MANY = 16_384


def assert_same(read: Any, saved: Any) -> None:
    assert type(read) is type(saved) or isinstance(saved, Mapping), (type(read), type(saved))
    if is_dataclass(saved):
        for field in fields(saved):
            if field.name not in LEFT_OUT:
                assert_same(getattr(read, field.name), getattr(saved, field.name))
    elif isinstance(saved, Mapping):
        assert list(read) == list(saved)
        for key in saved:
            assert_same(read[key], saved[key])
    elif isinstance(saved, (tuple, list)):
        assert len(read) == len(saved)
        for one, other in zip(read, saved, strict=True):
            assert_same(one, other)
    elif isinstance(saved, Tensor):
        assert read.dtype == saved.dtype and read.device.type == "cpu"
        _assert_close(read.double().numpy(), saved.detach().double().cpu().numpy())
    elif isinstance(saved, np.ndarray):
        assert read.dtype == saved.dtype
        _assert_close(read, saved)
    elif isinstance(saved, float):
        assert read == saved or (read != read and saved != saved)
    else:
        assert read == saved


def _assert_close(read: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    assert read.shape == saved.shape
    if saved.dtype.kind in "biu":
        assert np.array_equal(read, saved)
        return
    many = saved.size > MANY
    largest = np.abs(saved[np.isfinite(saved)]).max(initial=0.0)
    np.testing.assert_allclose(
        read, saved, rtol=2**-11 if many else 2**-24, atol=max(1.5e-45, 2**-24 * largest if many else 0)
    )


def is_exact(tensor: Tensor) -> bool:
    """Whether it is stored without loss: integers, truth values, single precision."""
    return not tensor.is_floating_point() or bool(torch.equal(tensor, tensor.float().to(tensor.dtype)))
