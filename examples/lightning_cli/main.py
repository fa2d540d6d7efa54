"""LightningCLI with two callbacks of this package added by a YAML file.

    python examples/lightning_cli/main.py fit --config examples/lightning_cli/config.yaml

Needs `pip install "jsonargparse[signatures]"`.
"""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_neuro.demo import DigitsNet, digits_loaders


class Digits(pl.LightningDataModule):
    """Scikit-learn's handwritten digits."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """1,437 images."""
        return digits_loaders(self.batch_size)[0]

    def val_dataloader(self) -> DataLoader[Any]:
        """360 images."""
        return digits_loaders(self.batch_size)[1]


if __name__ == "__main__":
    LightningCLI(DigitsNet, Digits)
