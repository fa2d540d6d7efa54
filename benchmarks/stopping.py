"""Record the curves by which training could be stopped, together with the test accuracy of every epoch.

    OMP_NUM_THREADS=1 python benchmarks/stopping.py
    python benchmarks/stopping_table.py

Two networks (an MLP on scikit-learn's digits as 64 columns, a CNN on 2,000 images of Fashion-MNIST at 14 x 14 pixels),
four settings, eight seeds: half an hour on one core of a busy machine. No run is stopped: `stopping_table.py` asks
where each rule would have stopped it.

| setting | training and validation data | test data |
|---|---|---|
| clean | as they are | as they are |
| noisy | 40 % of the labels are replaced by another class | clean labels |
| shortcut | in 95 % of the images, a mark is at a position that stands for the class | the mark is at any position |
| small | a tenth of the training images | as they are |
"""

import argparse
import csv
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from data import load_images
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    MetricCallback,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    RepresentationRefinement,
)

SETTINGS = ("clean", "noisy", "shortcut", "small")
NOISE, AGREEMENT = 0.4, 0.95


class Task(NamedTuple):
    """One data set with the network that learns it."""

    num_train: int
    num_val: int
    num_test: int
    batch_size: int
    max_epochs: int
    learning_rate: float
    brightness: float  # of the mark; the MLP does not use a faint one


TASKS = {"mlp": Task(700, 300, 797, 32, 40, 3e-3, 1.0), "cnn": Task(2000, 500, 4000, 64, 30, 3e-3, 0.5)}


def load(task: str) -> tuple[Tensor, Tensor]:
    """Grey images, (N, 1, height, width), and labels."""
    if task == "cnn":
        name, train, _ = load_images()
        if name != "Fashion-MNIST":
            raise SystemExit("The CNN needs Fashion-MNIST: set LIGHTNING_NEURO_DATA to the folder that holds it.")
        images, labels = train.tensors
        return avg_pool2d(images[:12_000], 2), labels[:12_000]
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.as_tensor(digits.images).float().unsqueeze(1) / 16, torch.as_tensor(digits.target)


def with_other_labels(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a share is replaced by one of the nine other classes."""
    wrong = torch.rand(len(labels), generator=generator) < share
    other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return torch.where(wrong, other, labels)


def with_marks(images: Tensor, marks: Tensor, brightness: float) -> Tensor:
    """Images with a brighter pixel in the first or last row, at the position that stands for the mark, 0 .. 9."""
    images = images.clone()
    rows, columns = torch.where(marks < 5, 0, images.shape[2] - 1), 1 + marks % 5
    images[torch.arange(len(images)), 0, rows, columns] += brightness
    return images


class Parts(NamedTuple):
    """The data of a run: (images, labels, marks) each. `fair` is validation data that resembles the test data."""

    train: TensorDataset
    val: TensorDataset
    fair: TensorDataset
    test: TensorDataset


def make_parts(task: str, setting: str, seed: int) -> Parts:
    """The data of one setting; another seed draws other samples, labels and marks."""
    sizes, generator = TASKS[task], torch.Generator().manual_seed(seed)
    images, labels = load(task)
    order = torch.randperm(len(labels), generator=generator)
    num_train = sizes.num_train // 10 if setting == "small" else sizes.num_train
    counts = (num_train, sizes.num_val, sizes.num_test)
    train, val, test = order[: sum(counts)].split(counts)
    free = torch.randint(10, labels.shape, generator=generator)
    agrees = torch.rand(len(labels), generator=generator) < AGREEMENT
    tied = torch.where(agrees, labels, free)
    given = with_other_labels(labels, NOISE if setting == "noisy" else 0, generator)

    def part(samples: Tensor, targets: Tensor, marks: Tensor) -> TensorDataset:
        seen = (
            with_marks(images[samples], marks[samples], sizes.brightness) if setting == "shortcut" else images[samples]
        )
        return TensorDataset(seen, targets[samples], marks[samples])

    return Parts(part(train, given, tied), part(val, given, tied), part(val, labels, free), part(test, labels, free))


def network(task: str) -> nn.Sequential:
    """An MLP, or a CNN of two convolutions; the last hidden layer is called `hidden`, the classifier `head`."""
    net = nn.Sequential()
    if task == "mlp":
        parts: dict[str, nn.Module] = {"flat": nn.Flatten(), "fc1": nn.Linear(64, 256), "relu1": nn.ReLU()}
        width, last = 256, 128
    else:
        parts = {"conv1": nn.Conv2d(1, 16, 3, padding=1), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2)}
        parts |= {"conv2": nn.Conv2d(16, 32, 3, padding=1), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2)}
        parts |= {"flat": nn.Flatten()}
        width, last = 32 * 9, 128
    parts |= {"fc2": nn.Linear(width, last), "hidden": nn.ReLU(), "head": nn.Linear(last, 10)}
    for name, module in parts.items():
        net.add_module(name, module)
    return net


class Model(pl.LightningModule):
    """Cross-entropy training with Adam."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.net, self.learning_rate = network(task), TASKS[task].learning_rate

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        scores = self(batch[0])
        values = {"val/loss": cross_entropy(scores, batch[1])}
        values["val/accuracy"] = (scores.argmax(1) == batch[1]).float().mean()
        self.log_dict(values, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Recorder(pl.Callback):
    """Keeps all curves, and what the network achieves on data that no rule may see."""

    def __init__(self, callbacks: list[MetricCallback[Any]], parts: Parts) -> None:
        self.callbacks, self.parts = callbacks, parts
        self.rows: list[tuple[int, str, float]] = []

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Note the values of this epoch; it is called after the validation loop."""
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if "loss" in key or "acc" in key}
        for callback in self.callbacks:
            values |= callback.scalars
        pl_module.eval()
        with torch.no_grad():
            for name in ("fair", "test"):
                images, labels, _ = getattr(self.parts, name).tensors
                scores = pl_module(images)
                values[f"{name}/loss"] = float(cross_entropy(scores, labels))
                values[f"{name}/accuracy"] = float((scores.argmax(1) == labels).float().mean())
        pl_module.train()
        for key, value in values.items():
            parts = key.split("/")
            if len(parts) == 2 or parts[0] == "mark":
                self.rows.append((trainer.current_epoch + 1, key, value))


def make_callbacks(setting: str, parts: Parts) -> list[MetricCallback[Any]]:
    """All callbacks at the last hidden layer; the last one asks for the mark on data in which it means nothing."""
    probe = Probe("hidden", num_samples=300)
    common: dict[str, Any] = {"figures": "never", "log_scalars": ()}
    callbacks: list[MetricCallback[Any]] = [
        NeuronCommunities(probe, **common),
        ActivationEntropy(probe, **common),
        ActivationEntropy(Probe("hidden", num_samples=300, source="train"), name="train_entropy", **common),
        RepresentationRefinement(probe, layers="head", **common),
        ObserverProbes(probe, **common),
        ActivationTopology(probe, **common),
        ConceptPaths(probe, **common),
    ]
    if setting == "shortcut":
        fair = Probe("hidden", num_samples=300, source=DataLoader(parts.fair, batch_size=100))
        callbacks.append(ObserverProbes(fair, attributes={"mark": lambda batch: batch[2] < 5}, name="mark", **common))
    return callbacks


def record(task: str, setting: str, seed: int, max_epochs: int | None = None) -> list[tuple[int, str, float]]:
    """Train once, to the end; returns (epoch, key, value)."""
    parts = make_parts(task, setting, seed)
    pl.seed_everything(seed, verbose=False)
    callbacks = make_callbacks(setting, parts)
    recorder = Recorder(callbacks, parts)
    trainer = pl.Trainer(
        max_epochs=max_epochs or TASKS[task].max_epochs,
        accelerator="cpu",
        callbacks=[*callbacks, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    batch_size = TASKS[task].batch_size // (4 if setting == "small" else 1)
    loaders = DataLoader(parts.train, batch_size, shuffle=True), DataLoader(parts.val, batch_size=100)
    trainer.fit(Model(task), *loaders)
    untrained = [(0, key, value) for callback in callbacks for key, value in callback.initial.items()]
    return [row for row in untrained if row[1].count("/") == 1 or row[1].startswith("mark")] + recorder.rows


def combinations(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Seed by seed, so that an interrupted session has all settings."""
    return ((task, setting, seed) for seed in args.seeds for task in args.tasks for setting in args.settings)


def main() -> None:
    """Record all runs; each goes into a file of its own, and those that exist are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    parser.add_argument("--max-epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stopping")
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|litlogger|LeafSpec).*")
    args.out.mkdir(parents=True, exist_ok=True)
    for task, setting, seed in combinations(args):
        path = args.out / f"{task}_{setting}_{seed}.csv"
        if path.exists():
            continue
        start = time.perf_counter()
        rows = record(task, setting, seed, args.max_epochs)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("epoch", "key", "value"), *rows])
        print(f"{path.stem}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
