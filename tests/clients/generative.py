"""Clients that generate: a GAN with manual optimisation, a VAE, an autoencoder without labels."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.registry import Project, client, images, loaders


def pictures(num_samples: int, classes: int = 4) -> TensorDataset:
    """Labelled pictures of 8 x 8 pixels between 0 and 1."""
    x, y = images(num_samples, classes, size=8, channels=1)
    return TensorDataset(x.sigmoid(), y)


class GAN(pl.LightningModule):
    """Two optimisers, manual optimisation; the labels of the batch are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(32, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).view(-1, 1, 8, 8)

    def realness(self, x: Tensor, real: bool) -> Tensor:
        scores = self.discriminator(x.flatten(1))
        return functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, _ = batch
        first, second = self.optimizers()
        fake = self(torch.randn(len(x), 8))
        loss_g = self.realness(fake, True)
        first.zero_grad()
        self.manual_backward(loss_g)
        first.step()
        loss_d = self.realness(x, True) + self.realness(fake.detach(), False)
        second.zero_grad()
        self.manual_backward(loss_d)
        second.step()
        return {"g": loss_g.detach(), "d": loss_d.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        loss = self.realness(x, True) + self.realness(self(torch.randn(len(x), 8)), False)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.discriminator)], []


@client("gan")
def gan() -> Project:
    return Project(GAN(), loaders(pictures(96), pictures(72)))


class VAE(pl.LightningModule):
    """Draws random numbers in `forward`, which returns (reconstruction, mean, log variance)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU())
        self.mean, self.log_var = nn.Linear(24, 5), nn.Linear(24, 5)
        self.decoder = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * log_var).exp()), mean, log_var

    def step(self, batch: Any) -> Tensor:
        x, _ = batch
        reconstruction, mean, log_var = self(x)
        divergence = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
        return functional.binary_cross_entropy(reconstruction, x.flatten(1)) + 0.01 * divergence

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@client("vae")
def vae() -> Project:
    return Project(VAE(), loaders(pictures(96), pictures(72)))


class Autoencoder(pl.LightningModule):
    """`forward` is the encoder alone; batches are plain tensors without labels; loaders come from the module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 64))
        self.data = {True: pictures(96).tensors[0], False: pictures(72).tensors[0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def step(self, x: Tensor) -> Tensor:
        return functional.mse_loss(self.decoder(self(x)), x.flatten(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data[True], batch_size=32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.data[False], batch_size=32)


@client("autoencoder")
def autoencoder() -> Project:
    return Project(Autoencoder(), {})
