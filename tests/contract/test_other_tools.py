"""Beside Lightning's own callbacks and loaders of every kind: curves, and the training is bit-identical."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_neuro import MetricCallback
from tests.contract.callbacks import SIX
from tests.models import Module, images, loader, mlp

Callbacks = Sequence[Callback]


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(64), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(64), batch_size=self.batch_size)


class Tuned(Module):
    lr = 0.01

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=self.lr)


class Combined(Module):
    """Its batches are made of those of two loaders, or come from two loaders in turn."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[1])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[1], optimizer)


def trainer_of(callbacks: Callbacks, epochs: int = 3) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def beside(*others: Callable[[], Callback]) -> Callable[[Module, Callbacks], None]:
    return lambda module, ours: trainer_of([*(make() for make in others), *ours]).fit(module, datamodule=Data())


def on(train: Callable[[], Any], val: Callable[[], Any] | None) -> Callable[[Module, Callbacks], None]:
    return lambda module, ours: trainer_of(ours).fit(module, train(), None if val is None else val())


def two(mode: str | None = None) -> Any:
    loaders = {"a": loader(32), "b": loader(16)}
    return loaders if mode is None else CombinedLoader(loaders, mode)


def tuned(module: Module, ours: Callbacks) -> None:
    trainer, data = trainer_of(ours), Data()
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    Tuner(trainer).lr_find(module, datamodule=data, num_training=10)
    trainer.fit(module, datamodule=data)


SITUATIONS: dict[str, tuple[type[Module], Callable[[Module, Callbacks], None]]] = {
    "batch size finder": (Tuned, beside(lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1))),
    "learning rate finder": (Tuned, beside(lambda: LearningRateFinder(num_training_steps=10))),
    "tuner": (Tuned, tuned),
    "weight averaging": (Tuned, beside(lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1))),
    "pruning": (Tuned, beside(lambda: ModelPruning("l1_unstructured", amount=0.3))),
    "fine-tuning": (Tuned, beside(Unfreeze)),
    "accumulation": (Tuned, beside(lambda: GradientAccumulationScheduler({0: 2, 1: 1}))),
    "two validation loaders": (Combined, on(loader, lambda: [loader(32), loader(16)])),
    "validation loaders in turn": (Combined, on(loader, lambda: two("sequential"))),
    "combined, the longest": (Combined, on(lambda: two("max_size_cycle"), lambda: two("max_size_cycle"))),
    "combined, the shortest": (Combined, on(lambda: two("min_size"), lambda: two("min_size"))),
    "combined in training": (Combined, on(two, lambda: loader(32))),
    "combined without validation": (Combined, on(two, None)),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_training_is_the_same_and_all_have_curves(situation: str) -> None:
    kind, run = SITUATIONS[situation]
    weights, callbacks, told = [], [make() for make in SIX.values()], []
    for ours in ([], callbacks):
        torch.manual_seed(0)
        module = kind(mlp().net)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(module, ours)
        weights.append([weight.detach().clone() for weight in module.parameters()])
        told = [str(warning.message) for warning in caught if "lightning_neuro" in warning.filename]
    assert all(map(torch.equal, *weights))
    silent = {callback.name for callback in callbacks if not callback.scalars}
    # The gradient of a pruned layer reaches a weight that is made anew in every step.
    assert silent == ({"refinement"} if situation == "pruning" else set())
    assert len(told) <= 1, told


def test_what_is_watched_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for situation, expected in {
        "two validation loaders": "32 samples of the first of 2 validation loaders",
        "combined, the longest": "32 validation samples",
    }.items():
        kind, run = SITUATIONS[situation]
        caplog.clear()
        with caplog.at_level("INFO"):
            run(kind(mlp().net), [MetricCallback(SIX["entropy"]().metric, name="own")])
        assert f"own: {expected}" in caplog.text
