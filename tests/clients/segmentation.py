"""Segmentation: one label a pixel, 255 where it is not known."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tests.clients.plain import Supervised
from tests.clients.registry import Project, client, loaders

IGNORED = 255


def masks(num_samples: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Two bright rectangles of different colours; a border of unknown pixels."""
    x = 0.4 * torch.randn(num_samples, 3, size, size)
    y = torch.zeros(num_samples, size, size, dtype=torch.long)
    for number in range(num_samples):
        for label in (1, 2):
            top, left = (int(torch.randint(0, size - 6, ())) for _ in range(2))
            x[number, label, top : top + 6, left : left + 6] += 2
            y[number, top : top + 6, left : left + 6] = label
    y[:, :, 0] = IGNORED
    return x, y


def pixel_loss(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, ignore_index=IGNORED)


def data(size: int) -> dict[str, Any]:
    return loaders(TensorDataset(*masks(64, size)), TensorDataset(*masks(40, size)), batch_size=16)


@client("fcn")
def fcn() -> Project:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return Project(Supervised(nn.Sequential(*net, nn.Conv2d(8, 3, 1)), pixel_loss), data(16))


@client("smp_unet", "segmentation_models_pytorch")
def unet() -> Project:
    import segmentation_models_pytorch as smp

    decoder = {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}
    net = smp.Unet("mobilenet_v2", encoder_weights=None, classes=3, **decoder)
    return Project(Supervised(net, pixel_loss), data(32))
