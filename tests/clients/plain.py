"""Clients that need nothing but Lightning: classifiers of many kinds, regression, recurrent and masked networks."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tests.clients.registry import Project, client, images, loaders, sentences


class Supervised(pl.LightningModule):
    """A network and a loss over (input, target) batches."""

    def __init__(self, net: nn.Module, loss: Any = functional.cross_entropy) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("val_loss", loss, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def convnet(outputs: int) -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(4))
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, outputs))


def table(num_samples: int) -> tuple[Tensor, Tensor]:
    """Rows of ten numbers, and a score that three of them make."""
    x = torch.randn(num_samples, 10)
    return x, x[:, 0] + 0.5 * x[:, 1] * x[:, 2] + 0.1 * torch.randn(num_samples)


def mlp(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, outputs))


@client("classifier")
def classifier() -> Project:
    return Project(Supervised(convnet(4)), loaders(TensorDataset(*images(96)), TensorDataset(*images(72))))


@client("multi_label")
def multi_label() -> Project:
    """Float targets (N, 3): what is in the picture, any number of things."""

    def data(num_samples: int) -> TensorDataset:
        x, y = table(num_samples)
        return TensorDataset(x, torch.stack([y > 0, x[:, 3] > 0.3, x[:, 4] + x[:, 5] > 0], 1).float())

    module = Supervised(mlp(3), functional.binary_cross_entropy_with_logits)
    return Project(module, loaders(data(128), data(104)))


@client("binary_logit")
def binary_logit() -> Project:
    """One logit and a float target (N,)."""

    def data(num_samples: int) -> TensorDataset:
        x, y = table(num_samples)
        return TensorDataset(x, (y > 0).float())

    def loss(logit: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logit[:, 0], y)

    return Project(Supervised(mlp(1), loss), loaders(data(128), data(104)))


@client("regression")
def regression() -> Project:
    def data(num_samples: int) -> TensorDataset:
        x, y = table(num_samples)
        return TensorDataset(x, y[:, None])

    return Project(Supervised(mlp(1), functional.mse_loss), loaders(data(128), data(104)))


class StatefulRNN(pl.LightningModule):
    """Keeps its hidden state from batch to batch, as in truncated backpropagation through time."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 16, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.out = nn.Linear(16, 3)
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = None if self.h is None or self.h.shape[1] != len(x) else self.h
        outputs, h = self.rnn(x, before)
        self.h = h.detach()
        return self.out(self.hidden(outputs[:, -1]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def waves(num_samples: int) -> TensorDataset:
    """Sequences of eight steps in three frequencies."""
    y = torch.arange(num_samples) % 3
    phases = torch.rand(num_samples, 1, 4) * 6
    steps = torch.arange(8)[None, :, None]
    return TensorDataset(torch.sin(phases + steps * (0.4 + 0.6 * y[:, None, None])), y)


@client("stateful_rnn")
def stateful_rnn() -> Project:
    return Project(StatefulRNN(), loaders(waves(96), waves(72)))


class MaskedEncoder(pl.LightningModule):
    """A text classifier over `nn.TransformerEncoder`; padding is token 0 and is masked."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        kept = (~padding[..., None]).float()
        if hidden.shape[1] < kept.shape[1]:
            kept = kept[:, : hidden.shape[1]]
        return self.head((hidden * kept).sum(1) / kept.sum(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, batch_size=len(batch[1]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def padded(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Sentences padded with 0 to the longest of the batch."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
    return tokens, torch.tensor([label for _, label in rows])


@client("encoder_text")
def encoder_text() -> Project:
    return Project(MaskedEncoder(), loaders(sentences(96), sentences(72), collate_fn=padded))


class WithoutForward(pl.LightningModule):
    """All logic is in the steps; `forward` is Lightning's own, which raises."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 16), nn.ReLU()
        )
        self.classifier = nn.Linear(16, 4)

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        scores = self.classifier(self.backbone(batch["picture"] - 0.5))
        return functional.cross_entropy(scores, batch["species"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@client("no_forward")
def no_forward() -> Project:
    """The batch is a dict of names of the user's own."""

    def data(num_samples: int) -> list[dict[str, Tensor]]:
        return [{"picture": x, "species": y} for x, y in zip(*images(num_samples), strict=True)]

    return Project(WithoutForward(), loaders(data(96), data(72)))
