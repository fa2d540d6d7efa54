"""Stop training when a network learns a shortcut, and predict an attribute that it was not trained on.

    python examples/shortcut.py

In the training pictures of handwritten digits, a faint mark in a corner nearly always occurs with the digits below 5: a
shortcut. At each epoch a linear classifier (an observer) predicts the mark from the last hidden layer, on pictures in
which mark and digit are independent. Even an untrained layer shows the mark to some degree, so training stops when the
balanced accuracy is surely above that before training: the lower 95 % bound of the difference exceeds .1. A second
observer predicts whether a digit has a hole (0, 6, 8, 9), which is not part of the labels.
"""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ObserverProbes, Probe
from lightning_neuro.demo import DigitsNet, digits_loaders

HOLES = torch.tensor([0, 6, 8, 9])


def marked(images: Tensor, digits: Tensor, agreement: float, seed: int) -> TensorDataset:
    """Noisy pictures, whether the digit is below 5, the digit, and the mark, which equals the label for `agreement`."""
    generator = torch.Generator().manual_seed(seed)
    small = (digits < 5).long()
    agrees = torch.rand(len(digits), generator=generator) < agreement
    mark = torch.where(agrees, small, 1 - small)
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    images[:, :, :2, :2] += 0.5 * mark[:, None, None, None]
    return TensorDataset(images, small, digits, mark)


class SmallOrLarge(DigitsNet):
    """Predicts whether a digit is below 5."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(64, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy on pictures in which the mark does not help."""
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def main(max_epochs: int = 30) -> pl.Trainer:
    """Train until the mark can be predicted from the last hidden layer."""
    pl.seed_everything(0, verbose=False)
    loaders = digits_loaders()
    train, val = (
        marked(*loader.dataset.tensors, agreement, seed)
        for loader, agreement, seed in zip(loaders, (0.98, 0.5), (0, 1), strict=True)
    )
    observers = ObserverProbes(
        Probe(layers="relu3", num_samples=360),
        attributes={"mark": 3, "hole": lambda batch: torch.isin(batch[2].cpu(), HOLES)},
    )
    stop = EarlyStopping("observers/gain_over_initial_low/mark/relu3", mode="max", patience=100, stopping_threshold=0.1)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[observers, stop],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(SmallOrLarge(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=64))
    print(f"Stopped after {trainer.current_epoch} epochs; accuracy without the shortcut", end=" ")
    print(f"{float(trainer.callback_metrics['val/accuracy']):.3f}.")
    for name in ("mark", "hole"):
        key = f"observers/balanced_accuracy/{name}/relu3"
        start, end, raw = observers.initial[key], observers.scalars[key], observers.from_input[name]
        print(f"{name}: balanced accuracy {end:.3f}, before training {start:.3f}, from the raw picture {raw:.3f}")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=30)
    main(parser.parse_args().max_epochs)
