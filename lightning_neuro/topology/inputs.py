"""What the functions of this room are given: points as a matrix of finite real numbers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_points(points: Any, name: str = "points") -> Tensor:
    """A NumPy array or tensor as a detached (N, units) tensor of float32 or float64, on its own device.

    Raises:
        ValueError: If it is not a real matrix with at least one unit.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(points)) if isinstance(points, np.ndarray) else points
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.shape[1] == 0 or tensor.is_complex():
        seen = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(points).__name__
        raise ValueError(f"{name} must be a real matrix of shape (N, units) with at least one unit, but got {seen}.")
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def finite_rows(points: Tensor) -> Tensor:
    """Indices of the rows without NaN or infinity, int64 on the points' device."""
    if points.sum().isfinite():  # then all are; only if not is it worth looking where
        return torch.arange(len(points), device=points.device)
    return torch.nonzero(points.isfinite().all(dim=1)).flatten()


def as_labels(targets: Any, num_points: int) -> Tensor | None:
    """Class labels as an int64 tensor on the CPU; None stays None.

    Raises:
        ValueError: If they are not one whole number for each point.
    """
    if targets is None:
        return None
    labels = torch.as_tensor(targets).detach().cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (num_points,):
        raise ValueError(
            f"targets must be integer classes of shape ({num_points},), but got {labels.dtype} {tuple(labels.shape)}."
        )
    return labels.long()


def check_whole(name: str, value: Any, *, at_least: int) -> None:
    """Refuse what is not a whole number of at least so much.

    Raises:
        ValueError: Naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, but it is {value!r}.")
