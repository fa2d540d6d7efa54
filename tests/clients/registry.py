"""Clients: small projects as users of this package write them, each built afresh from a seed."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

FAMILIES = (
    "plain",
    "generative",
    "vision",
    "text",
    "detection",
    "forecasting",
    "tabular",
    "graphs",
    "segmentation",
    "self_supervised",
)
"""The modules of this folder that register clients."""

TRAINER: dict[str, Any] = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""What every trainer here has; all else, the sanity check too, is as Lightning sets it."""


@dataclass
class Project:
    """What a user hands to Lightning.

    Attributes:
        module: The LightningModule.
        fit: Keyword arguments of `trainer.fit`: loaders or a datamodule.
        trainer: Keyword arguments of the trainer, beside those of `TRAINER`.
        namespace: Which of the two names of Lightning the project imports.
    """

    module: Any
    fit: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    namespace: str = "pytorch_lightning"

    def train(self, callbacks: list[Any]) -> None:
        """Fit the module, as the project does."""
        lightning = importlib.import_module(self.namespace)
        lightning.Trainer(callbacks=callbacks, **(TRAINER | self.trainer)).fit(self.module, **self.fit)


@dataclass
class OwnFit(Project):
    """A project whose library makes the trainer: it is given the callbacks and fits.

    Attributes:
        run: Fits with these callbacks.
    """

    module: Any = None
    fit: dict[str, Any] = field(default_factory=dict)
    run: Callable[[list[Any]], Any] = lambda callbacks: None

    def train(self, callbacks: list[Any]) -> None:
        """Fit through the library."""
        self.run(callbacks)


@dataclass(frozen=True)
class Client:
    """A registered project.

    Attributes:
        name: Its name in the tables.
        family: The module that registers it.
        needs: Packages that it imports, beside those that this package needs.
        build: Makes the project; all random numbers come from the seed that the harness sets before.
    """

    name: str
    family: str
    needs: tuple[str, ...]
    build: Callable[[], Project]

    def missing(self) -> list[str]:
        """The packages that are not installed here."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


CLIENTS: dict[str, Client] = {}
"""Every client by its name."""


def client(name: str, *needs: str, **options: Any) -> Callable[[Callable[..., Project]], Callable[..., Project]]:
    """Register the decorated function as the builder of a client, called with the given options."""

    def register(build: Callable[..., Project]) -> Callable[..., Project]:
        assert name not in CLIENTS, name
        CLIENTS[name] = Client(name, build.__module__.rsplit(".", 1)[-1], needs, lambda: build(**options))
        return build

    return register


def load_clients() -> dict[str, Client]:
    """All clients; their third-party packages are imported only when one is built."""
    for family in FAMILIES:
        importlib.import_module(f"tests.clients.{family}")
    return CLIENTS


class Rows(Dataset[Any]):
    """A dataset of rows computed beforehand."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def loaders(train: Any, val: Any, batch_size: int = 32, **options: Any) -> dict[str, Any]:
    """Arguments of `trainer.fit`: shuffled training batches; validation batches of which the last is smaller."""
    assert len(val) % batch_size, "the last validation batch is smaller than the others"
    return {
        "train_dataloaders": DataLoader(train, batch_size, shuffle=True, **options),
        "val_dataloaders": DataLoader(val, batch_size, **options),
    }


def images(num_samples: int, classes: int = 4, size: int = 16, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images, each class with a bright stripe of its own place and colour."""
    y = torch.arange(num_samples) % classes
    x = 0.5 * torch.randn(num_samples, channels, size, size)
    width = max(size // classes, 1)
    for row, label in enumerate(y.tolist()):
        start = label * width % size
        x[row, label % channels, start : start + width] += 2
    return x, y


def sentences(num_samples: int, classes: int = 3, vocabulary: int = 30) -> list[tuple[list[int], int]]:
    """Sentences of 4 to 12 tokens (1 and above), each with a token that tells its class."""
    rows = []
    for number in range(num_samples):
        tokens = torch.randint(classes + 1, vocabulary, (int(torch.randint(4, 13, ())),))
        tokens[torch.randint(len(tokens), ())] = 1 + number % classes
        rows.append((tokens.tolist(), number % classes))
    return rows
