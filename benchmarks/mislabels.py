"""Which labels are wrong: how well the scores of a training run find flipped labels, and what they cost.

    python benchmarks/mislabels.py [--data digits snips fashion] [--seeds 3] [--epochs 60]

10 % of the training labels are replaced by another class, drawn at random. Ranked against the flips, in one run per
seed: the columns of `RepresentationRefinement(track_samples="*").samples`; the loss of the finished network; TracIn's
self-influence, the sum over checkpoints (one per epoch) of learning rate x squared gradient norm of the last layer; and
cleanlab, from probabilities of three more networks, each trained on two thirds of the data and predicting the rest.

AUROC (chance .5), and precision at k with k the number of flipped labels (chance .1). "Found" is the set of cleanlab's
`find_label_issues`, which decides itself how many there are. "Suggested" is how often the suggested class of a flipped
sample is its true class. Seconds of the processor are those beyond the training; those of the
callback are its own count, with the norms of all layers (the default tracks only the head).

Digits: 1,437 images, MLP 64-128-64-10, SGD with momentum, 20 epochs. Snips: 13,784 commands, mean of embeddings and two
linear layers, Adam, 10 epochs. Fashion-MNIST: all 60,000 images, small CNN, SGD with momentum, 3 epochs. Batches of 128
(digits: 32). Snips and Fashion-MNIST are read from LIGHTNING_NEURO_DATA. cleanlab must be installed.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from cleanlab.filter import find_label_issues
from data import load_images
from networks import Classifier, small_cnn
from refinement_samples import digits, mlp
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import RepresentationRefinement

FLIPPED, FOLDS = 0.1, 3


@dataclass
class Task:
    """A data set, and how a network is trained on it."""

    train: TensorDataset
    test: TensorDataset
    network: Callable[[], nn.Module]
    epochs: int
    batch: int = 128
    adam: bool = False


class Module(Classifier):
    """SGD with momentum, or Adam."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.network())
        self.adam = task.adam

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the task."""
        return torch.optim.Adam(self.parameters(), lr=1e-3) if self.adam else super().configure_optimizers()


class Bag(nn.Module):
    """Mean of the embeddings of the words, and two linear layers."""

    def __init__(self, words: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.fc1, self.relu, self.fc2 = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of token numbers, 0 being padding."""
        there = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return self.fc2(self.relu(self.fc1(self.embedding(tokens).sum(1) / there)))


class Checkpoints(pl.Callback):
    """Keeps, at the end of each epoch, the squared gradient norms of the last layer for all training samples."""

    def __init__(self, train: TensorDataset) -> None:
        self.train, self.sum, self.seconds = train, torch.zeros(len(train)), 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add those of this epoch."""
        start = time.process_time()
        self.sum += trainer.optimizers[0].param_groups[0]["lr"] * squared_norms(pl_module, *self.train.tensors)
        self.seconds += time.process_time() - start


@torch.no_grad()
def squared_norms(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Squared norm of the gradient of the last linear layer, for each sample."""
    features: list[Tensor] = []
    head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    logits = outputs(module, x)
    handle.remove()
    gradients = logits.softmax(1) - torch.nn.functional.one_hot(labels, logits.shape[1])
    return gradients.square().sum(1) * (torch.cat(features).square().sum(1) + 1)


@torch.no_grad()
def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Logits in evaluation mode."""
    training = module.training
    module.eval()
    found = torch.cat([module(part) for part in x.split(1000)])
    module.train(training)
    return found


def fit(task: Task, train: TensorDataset, *callbacks: pl.Callback) -> tuple[Module, float]:
    """Train from one seed; returns the network and the seconds of the processor."""
    torch.manual_seed(0)
    module = Module(task)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(train, batch_size=task.batch, shuffle=True, generator=generator)
    trainer = pl.Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(module, loader, DataLoader(task.test, batch_size=1000))
    return module, time.process_time() - start


def flip(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The labels after flips, and which are flipped."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    flipped = torch.rand(len(labels), generator=generator) < FLIPPED
    other = torch.randint(1, classes, (len(labels),), generator=generator)
    return torch.where(flipped, (labels + other) % classes, labels), flipped


def held_out(task: Task, x: Tensor, labels: Tensor) -> Tensor:
    """Probabilities of each sample by a network that was not trained on it."""
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)) % FOLDS
    found = torch.zeros(len(x), int(labels.max()) + 1)
    for number in range(FOLDS):
        out = fold == number
        module, _ = fit(task, TensorDataset(x[~out], labels[~out]))
        found[out] = outputs(module, x[out]).softmax(1)
    return found


def measure(task: Task, seed: int) -> dict[str, tuple[float, ...]]:
    """Score -> AUROC, precision at k, and seconds beyond the training."""
    x, true = task.train.tensors
    labels, flipped = flip(true, seed)
    train = TensorDataset(x, labels)
    callback = RepresentationRefinement(track_samples="*", figures="never", on_error="raise")
    checkpoints = Checkpoints(train)
    module, seconds = fit(task, train, callback, checkpoints)
    start = time.process_time()
    logits = outputs(module, x)
    passed = time.process_time() - start
    accuracy = float((outputs(module, task.test.tensors[0]).argmax(1) == task.test.tensors[1]).float().mean())
    start = time.process_time()
    probabilities = held_out(task, x, labels)
    folds = time.process_time() - start
    issues = find_label_issues(labels.numpy(), probabilities.numpy(), n_jobs=1)

    def row(scores: Tensor | np.ndarray, cost: float) -> tuple[float, ...]:
        scores = torch.as_tensor(scores)
        top = scores.argsort(descending=True)[: int(flipped.sum())]
        return roc_auc_score(flipped, scores), float(flipped[top].float().mean()), cost

    samples = callback.samples
    order = np.argsort(samples["sample_id"])
    layers = [name for name in samples if name.startswith("refinement/")]
    head = next(name for name in layers if name.removeprefix("refinement/") in callback.ledger)
    ours = sum(callback.cost.seconds.values())

    def suggested(predicted: Tensor) -> tuple[float]:
        return (float((predicted == true)[flipped].float().mean()),)

    issues = torch.as_tensor(issues)
    hits = float((flipped & issues).sum())
    return {
        "`loss` (mean over visits)": row(samples["loss"][order], ours),
        "`score`, head only": row(samples[head][order], ours),
        '`score`, `track_samples="*"`': row(samples["score"][order], ours),
        "loss of the finished network": row(cross_entropy(logits, labels, reduction="none"), passed),
        "TracIn self-influence, last layer": row(checkpoints.sum, checkpoints.seconds),
        "cleanlab, self-confidence": row(1 - probabilities[range(len(x)), labels], folds),
        "cleanlab, found: precision, recall": (hits / float(issues.sum()), hits / float(flipped.sum())),
        "suggested: `suggested`": suggested(torch.as_tensor(samples["suggested"][order])),
        "suggested: finished network": suggested(logits.argmax(1)),
        "suggested: cleanlab's probabilities": suggested(probabilities.argmax(1)),
        "test accuracy; seconds of training": (accuracy, seconds),
    }


def snips() -> tuple[TensorDataset, TensorDataset, int]:
    """Commands as token numbers, padded to 32 words, with their intents; and the number of words."""
    folder = Path(os.environ["LIGHTNING_NEURO_DATA"]) / "snips"
    parts = [
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "validate")
    ]
    known = sorted({word.lower() for row in parts[0] for word in row["tokens"]})
    words = {word: number for number, word in enumerate(known, 2)}
    intents = sorted({row["intent"] for row in parts[0]})

    def tensors(rows: list[dict]) -> TensorDataset:
        tokens = torch.zeros(len(rows), 32, dtype=torch.long)
        for row, line in zip(rows, tokens, strict=True):
            numbers = [words.get(word.lower(), 1) for word in row["tokens"]][:32]
            line[: len(numbers)] = torch.tensor(numbers)
        return TensorDataset(tokens, torch.tensor([intents.index(row["intent"]) for row in rows]))

    return tensors(parts[0]), tensors(parts[1]), len(words) + 2


def task_of(name: str) -> Task:
    """The task of a data set."""
    if name == "digits":
        return Task(*digits(), mlp, epochs=20, batch=32)
    if name == "snips":
        train, test, words = snips()
        return Task(train, test, lambda: Bag(words, 7), epochs=10, adam=True)
    _, train, test = load_images()
    return Task(train, test, small_cnn, epochs=3)


def main() -> None:
    """Parse the choices and print a table per data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits", "snips", "fashion"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="instead of those of the task")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in args.data:
        task = task_of(name)
        task.epochs = args.epochs or task.epochs
        runs = [measure(task, seed) for seed in range(args.seeds)]
        print(f"\n{name}: {len(task.train):,} samples, {task.epochs} epochs, {args.seeds} seeds: AUROC, P@k, seconds")
        for score in runs[0]:
            means = np.mean([run[score] for run in runs], axis=0)
            print(f"  {score:<40}" + "".join(f"{value:>10.4f}" for value in means), flush=True)


if __name__ == "__main__":
    main()
