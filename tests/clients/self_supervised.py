"""Contrastive clients: SimCLR written by hand, with and without labels in the batch, and with lightly."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tests.clients.registry import Project, client, images, loaders


class TwoViews(Dataset[Any]):
    """Two noisy views of each picture, with its label or without."""

    def __init__(self, num_samples: int, labelled: bool) -> None:
        self.x, self.y = images(num_samples)
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        views = [self.x[index] + 0.3 * torch.randn(self.x[index].shape) for _ in range(2)]
        return (views, self.y[index]) if self.labelled else views


class SimCLR(pl.LightningModule):
    """An encoder and a projection head; the loss compares the two views of a picture with all others."""

    def __init__(self, labelled: bool, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
        self.labelled = labelled
        self.contrast = loss or self.nt_xent

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    @staticmethod
    def nt_xent(one: Tensor, other: Tensor) -> Tensor:
        z = functional.normalize(torch.cat([one, other]), dim=1)
        similarity = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        return functional.cross_entropy(similarity, torch.arange(len(z)).roll(len(one)))

    def step(self, batch: Any) -> Tensor:
        one, other = batch[0] if self.labelled else batch
        return self.contrast(self(one), self(other))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.log("val_loss", loss, batch_size=32)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


@client("simclr", labelled=True)
@client("simclr_unlabelled", labelled=False)
def simclr(labelled: bool) -> Project:
    return Project(SimCLR(labelled), loaders(TwoViews(96, labelled), TwoViews(72, labelled)))


@client("lightly_simclr", "lightly", "torchvision")
def lightly_simclr() -> Project:
    """lightly's projection head, loss and transform; its batches are (views, labels, file names)."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image

    transform = SimCLRTransform(input_size=16, gaussian_blur=0.0)

    class Views(Dataset[Any]):
        def __init__(self, num_samples: int) -> None:
            x, self.y = images(num_samples)
            self.pictures = [to_pil_image(picture.sigmoid()) for picture in x]

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, index: int) -> Any:
            return transform(self.pictures[index]), int(self.y[index]), f"{index}.png"

    module = SimCLR(labelled=True, loss=NTXentLoss(temperature=0.5))
    module.head = SimCLRProjectionHead(32, 24, 16)
    return Project(module, loaders(Views(96), Views(72)))
