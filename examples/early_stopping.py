"""Stop training on wrong labels without a single validation label.

    python examples/early_stopping.py

40 % of the training labels of scikit-learn's digits are wrong, and the validation images have no labels. A network
first learns what most labels agree on, and later the wrong labels. In between, the activations of the last hidden layer
move least: `topology/drift`, how far they have moved since the previous evaluation, has its minimum. If you have
validation labels, monitor the validation loss instead; see docs/stopping.md.
"""

import argparse
import tempfile

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ActivationTopology, Probe
from lightning_neuro.demo import digits_loaders


class Mlp(pl.LightningModule):
    """Two hidden layers, large enough to learn every wrong label."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu1 = nn.Linear(64, 256), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(256, 128), nn.ReLU()
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.relu2(self.fc2(self.relu1(self.fc1(images.flatten(1))))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def with_wrong_labels(labels: Tensor, share: float) -> Tensor:
    """Labels of which a share is replaced by one of the nine other digits."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(labels), generator=generator) < share
    return torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)


def train(data: TensorDataset, *callbacks: pl.Callback, max_epochs: int) -> tuple[pl.Trainer, Mlp]:
    """Train a network from the same start on the same batches."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Mlp()
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    return trainer, model


def accuracy(model: Mlp, test: TensorDataset) -> float:
    """On images with correct labels."""
    images, labels = test.tensors
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main(max_epochs: int = 40) -> None:
    """Train with and without the stop, and compare."""
    known, test = (loader.dataset for loader in digits_loaders())
    images, labels = known.tensors
    data = TensorDataset(images[:1000], with_wrong_labels(labels[:1000], 0.4))
    unlabelled = DataLoader(TensorDataset(images[1000:]), batch_size=100)

    topology = ActivationTopology(Probe("relu2", source=unlabelled))
    stop = EarlyStopping("topology/drift", mode="min", patience=3)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="topology/drift", mode="min")
        trainer, model = train(data, topology, stop, best, max_epochs=max_epochs)
        checkpoint = torch.load(best.best_model_path, weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    print(f"Stopped after {trainer.current_epoch} epochs; kept the checkpoint of epoch {checkpoint['epoch'] + 1}.")
    print(f"Test accuracy of this checkpoint: {accuracy(model, test):.3f}")
    _, model = train(data, max_epochs=max_epochs)
    print(f"Test accuracy after {max_epochs} epochs without a stop: {accuracy(model, test):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=40)
    main(parser.parse_args().max_epochs)
