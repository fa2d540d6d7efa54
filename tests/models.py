"""Small networks and data that the tests train on."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric


class Module(pl.LightningModule):
    """A classifier around any network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Encoder(nn.Module):
    """A transformer encoder over the rows of an 8 x 8 image."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.flatten(1).reshape(-1, 8, 8)).mean(1))


class Attention(nn.Module):
    """Self-attention as timm writes it; some positions may be left out."""

    def __init__(self, size: int = 8, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        allowed = None if mask is None else mask[:, None, None]
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.proj(x.transpose(1, 2).flatten(2))


class Attentive(nn.Module):
    """Two attention layers over the rows of an 8 x 8 image."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(8), "attn": Attention()}) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 8, 8)
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return self.head(x.mean(1))


def mlp() -> Module:
    torch.manual_seed(0)
    hidden = (nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    return Module(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 4)))


def convnet() -> Module:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout2d(0.2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(216, 12), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(12, 4))
    return Module(nn.Sequential(conv, head))


def transformer() -> Module:
    torch.manual_seed(0)
    return Module(Encoder())


NETWORKS = {"mlp": mlp, "convnet": convnet, "transformer": transformer}


def images(num_samples: int = 64, classes: int = 4, seed: int = 0) -> TensorDataset:
    """Noisy 8 x 8 images, each class with a bright patch of its own."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_samples) % classes
    x = torch.randn(num_samples, 1, 8, 8, generator=generator)
    for c in range(classes):
        x[y == c, :, 2 * c : 2 * c + 2] += 2
    return TensorDataset(x, y)


def loader(num_samples: int = 64, *, shuffle: bool = False, batch_size: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(images(num_samples), batch_size=batch_size, shuffle=shuffle, **options)


class MemoryLogger(Logger):
    """Remembers every scalar: `logger.curves[key]` is a list of (step, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, list[tuple[int | None, float]]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.curves.setdefault(key, []).append((step, float(value)))


HIDDEN = ("net.2", "net.4")
"""The layers of `mlp` that a probe looks at by default."""


class MeanActivation(Metric):
    """A metric as a user would write it."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        self.total += activations.double().sum()
        self.count += activations.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


def fit(module: pl.LightningModule, *callbacks: pl.Callback, val: Any = True, **options: Any) -> pl.Trainer:
    """Train quietly, two epochs of four batches unless told otherwise; `val` may be a loader."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    ckpt_path = options.pop("ckpt_path", None)
    train = options.pop("train", None)
    train = loader(shuffle=True) if train is None else train  # a loader without a length has no truth value
    trainer = pl.Trainer(callbacks=list(callbacks), **(defaults | options))
    val = {True: loader(32), False: None}[val] if isinstance(val, bool) else val
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer
