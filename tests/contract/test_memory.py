"""After a hundred evaluations the process is no larger than after five."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_neuro import Probe
from tests.contract.callbacks import Make
from tests.models import fit, loader, mlp

MEGABYTE = 2**20


class Measure(pl.Callback):
    """The resident memory after some evaluations, one a step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.sizes: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step in self.steps:
            gc.collect()
            if sys.platform == "linux":
                # What was freed and kept by the allocator is no leak.
                ctypes.CDLL(None).malloc_trim(0)
            self.sizes.append(psutil.Process().memory_info().rss / MEGABYTE)


def growth(make: Make, evaluations: int, **options: Any) -> float:
    measure = Measure(5, evaluations)
    callback = make(Probe(every_n_steps=1, num_samples=16, layers="net.4"))
    fit(mlp(), callback, measure, train=loader(), max_epochs=-1, max_steps=evaluations, **options)
    assert callback.last_step == evaluations
    before, after = measure.sizes
    return after - before


@pytest.mark.slow
def test_memory_does_not_grow(make: Make) -> None:
    assert growth(make, 100) < 10


@pytest.mark.slow
def test_memory_does_not_grow_with_figures(make: Make, tmp_path: Path) -> None:
    assert growth(make, 30, logger=TensorBoardLogger(tmp_path)) < 20


def test_no_pyplot_figure_is_left_open(make: Make, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    fit(mlp(), make(), logger=TensorBoardLogger(tmp_path))
    assert plt.get_fignums() == before
