"""Run by test_distributed.py in two processes: every scenario for every callback, one after the other.

Each rank writes what it has after every scenario, so that a hang shows where it was.
"""

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import Dataset

from lightning_neuro import MetricCallback, Probe
from tests.contract.callbacks import CALLBACKS, MODES, Make
from tests.helpers import hooks_of
from tests.models import HIDDEN, MemoryLogger, Module, images, loader, mlp

Fact = dict[str, Any]


class FailsOnRankOne(Module):
    """Fails in the probe's pass, on one rank only."""

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.global_rank == 1 and not self.training:  # without validation: the probe's pass
            raise RuntimeError("boom")
        return super().forward(x)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, val: bool = True, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)),
        callbacks=list(callbacks),
        **(defaults | quiet | options),
    )
    trainer.fit(module, loader(), loader(31) if val else None)
    return trainer


def facts(callback: MetricCallback, module: Any, trainer: pl.Trainer) -> Fact:
    return {
        "initial": callback.initial,
        "scalars": callback.scalars,
        "state": callback.state_dict(),
        "weights": module.state_dict(),
        "step": trainer.global_step,
        "monitored": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "hooks": hooks_of(module),
    }


def trained(make: Make, directory: Path) -> Fact:
    """Monitors listed before ours, an uneven sample set (31), a logger on rank 0."""
    module, callback, logger = mlp(), make(log_scalars="*"), MemoryLogger()
    measures = {"communities": "modularity", "entropy": "dead_share", "observers": "balanced_accuracy"}
    measures |= {"refinement": "norm", "topology": "h0_total", "paths": "auroc", "dimension": "dimension"}
    monitor = f"{callback.name}/{measures.get(callback.name, 'value')}"
    monitors = [
        EarlyStopping(monitor, mode="max", patience=100),
        ModelCheckpoint(directory, monitor=monitor, mode="max"),
    ]
    trainer = fit(module, *monitors, callback, logger=logger, enable_checkpointing=True)
    stop, save = monitors
    best = {"stop": float(stop.best_score), "save": float(save.best_model_score)}  # type: ignore[attr-defined]
    return facts(callback, module, trainer) | {"best": best, "curves": logger.curves}


def every_n_steps(make: Make, directory: Path) -> Fact:
    module, callback = mlp(), make(Probe(every_n_steps=1, num_samples=20))
    return facts(callback, module, fit(module, callback, val=False))


def few_samples(make: Make, directory: Path) -> Fact:
    """Three samples: two on one rank, one on the other."""
    module, callback = mlp(), make(Probe(source=images(31), num_samples=3))
    return facts(callback, module, fit(module, callback))


def broken(where: str, ranks: int = 1) -> Callable[[Make, Path], Fact]:
    """Break one method of the callback's metric, on the last `ranks` ranks."""

    def scenario(make: Make, directory: Path) -> Fact:
        module, callback = mlp(), make()
        owner: Any = type(callback.metric)
        original = getattr(owner, where)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if torch.distributed.get_rank() >= 2 - ranks:
                raise RuntimeError("boom")
            return original(*args, **kwargs)

        setattr(owner, where, failing)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer = fit(module, callback)
        finally:
            setattr(owner, where, original)
        messages = [str(warning.message) for warning in caught if "failed" in str(warning.message)]
        return facts(callback, module, trainer) | {"warnings": messages}

    return scenario


class UnreadableOnRankOne(Dataset[Any]):
    """As where one machine cannot read a file."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if torch.distributed.get_rank() == 1:
            raise OSError("boom")
        return images(20)[index]


def failing_samples(make: Make, directory: Path) -> Fact:
    return told(mlp(), make(Probe(source=UnreadableOnRankOne())))


def failing_pass(make: Make, directory: Path) -> Fact:
    return told(FailsOnRankOne(mlp().net), make(Probe(layers=HIDDEN)), val=False)


def told(module: Module, callback: MetricCallback, **options: Any) -> Fact:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, callback, **options)
    messages = [str(warning.message) for warning in caught if "failed" in str(warning.message)]
    return facts(callback, module, trainer) | {"warnings": messages}


SCENARIOS: dict[str, Callable[[Make, Path], Fact]] = {
    "trained": trained,
    "every_n_steps": every_n_steps,
    "few_samples": few_samples,
    "failing_samples": failing_samples,
    "failing_pass": failing_pass,
    "failing_update": broken("update"),
    "failing_compute": broken("compute"),
    "failing_compute_on_both": broken("compute", ranks=2),
}


def main(directory: Path, rank: int, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    for scenario in scenarios:
        for name, make in (CALLBACKS | MODES).items():
            (directory / f"{rank}.now").write_text(f"{scenario}, {name}")
            found = SCENARIOS[scenario](make, directory / f"{scenario}-{name}")
            torch.save(found, directory / f"{scenario}-{name}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
