"""The demo: a small network on real handwritten digits with every callback of the package."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy

from lightning_neuro.callback import MetricCallback
from lightning_neuro.communities.callback import NeuronCommunities
from lightning_neuro.entropy.callback import ActivationEntropy
from lightning_neuro.observers.callback import ObserverProbes
from lightning_neuro.paths.callback import ConceptPaths
from lightning_neuro.print_summary import summary_of
from lightning_neuro.probe import Probe
from lightning_neuro.refinement.callback import RepresentationRefinement
from lightning_neuro.topology.callback import ActivationTopology


class DigitsNet(pl.LightningModule):
    """Two convolutions and two fully connected layers for 8 x 8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.relu3 = nn.Linear(32 * 4 * 4, 64), nn.ReLU()
        self.dropout = nn.Dropout(0.2)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, 10), of images, (N, 1, 8, 8)."""
        maps = self.pool(self.relu2(self.conv2(self.relu1(self.conv1(images)))))
        logits: Tensor = self.fc2(self.dropout(self.relu3(self.fc1(maps.flatten(1)))))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.log("val/loss", cross_entropy(logits, labels))
        self.log("val/accuracy", accuracy(logits, labels, task="multiclass", num_classes=10), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digits_loaders(batch_size: int = 64) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation loaders of the 1,797 handwritten digits that ship with scikit-learn (from UCI)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[360:], order[:360]
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(images[val], labels[val]), batch_size=batch_size),
    )


def run_demo(logdir: str = "runs/demo", *, max_epochs: int = 12) -> dict[str, float]:
    """Train, log to TensorBoard and print a table of the measures.

    Args:
        logdir: Folder for the logs; every run gets its own folder in it.
        max_epochs: Maximum number of epochs; EarlyStopping may stop training earlier.

    Returns:
        Key -> last value of everything that was logged.
    """
    pl.seed_everything(0, verbose=False)
    probe = Probe()
    callbacks: list[MetricCallback[Any]] = [
        NeuronCommunities(probe, prog_bar="communities/modularity"),
        ActivationEntropy(probe, prog_bar="entropy/class_information"),
        RepresentationRefinement(probe, layers=["fc1", "fc2"], influence_every_n_steps=20),
        ObserverProbes(probe),
        ActivationTopology(probe, prog_bar="topology/purity"),
        ConceptPaths(probe, prog_bar="paths/auroc"),
    ]
    path = Path(logdir)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[*callbacks, EarlyStopping("val/loss", mode="min", patience=3)],
        logger=TensorBoardLogger(path.parent, name=path.name),
        log_every_n_steps=5,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(DigitsNet(), *digits_loaders())
    _print_summary(callbacks, trainer, logdir)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def _print_summary(callbacks: Sequence[MetricCallback[Any]], trainer: "pl.Trainer", logdir: str) -> None:
    accuracy_reached = float(trainer.callback_metrics["val/accuracy"])
    print(f"\nValidation accuracy {accuracy_reached:.3f} after {trainer.current_epoch} epochs.")
    print("The measures of the last layer that each callback uses:\n")
    print(summary_of(callbacks))
    print(f"\nTo see the curves and figures of all layers:\n\n    {_tensorboard_command()} --logdir {logdir}\n")


def _tensorboard_command() -> str:
    """The command that starts TensorBoard from the current folder."""
    beside = Path(sys.executable).with_name("tensorboard")
    if beside.exists() and beside.is_relative_to(Path.cwd()):
        return str(beside.relative_to(Path.cwd()))
    return "tensorboard"
