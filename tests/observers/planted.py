"""Activations in which the truth is known."""

import torch
from torch import Tensor


def halfspaces(samples: int = 400, units: int = 12, attributes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise, and attributes that are halfspaces of it: (N, units) and (N, attributes)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, units, generator=generator, dtype=torch.float64)
    w = torch.randn(units, attributes, generator=generator, dtype=torch.float64)
    return x, (x @ w > 0).double()


def classes(samples: int = 300, units: int = 12, number: int = 5, noise: float = 1.0, seed: int = 0):
    """ReLU units around a centre for each class, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % number
    labels = labels[torch.randperm(samples, generator=generator)]
    centres = 2 * torch.randn(number, units, generator=generator)
    return (centres[labels] + noise * torch.randn(samples, units, generator=generator)).relu(), labels
