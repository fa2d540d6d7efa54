"""Run by test_two_ranks.py in two processes: all six callbacks in one fit, and a probe set of an odd size."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy

from lightning_neuro import SaveResults
from lightning_neuro.artefacts import run_files
from tests.contract.callbacks import CALLBACKS
from tests.models import MemoryLogger, loader, mlp

written: list[str] = []


def texts(batch: Any) -> list[str]:
    return [f"{float(x.sum()):.3f}" for x in batch[0]]


def train(logger: Any, **options: Any) -> list[Any]:
    callbacks = [make() for make in CALLBACKS.values()]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)),
        callbacks=[*callbacks, SaveResults(**options)],
        logger=logger,
        max_epochs=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(mlp(), loader(), loader(31))
    return callbacks


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    original = run_files.write_file

    def counted(path: Path, *args: Any) -> int:
        written.append(str(path))
        return original(path, *args)

    run_files.write_file = counted  # type: ignore[assignment]
    callbacks = train(CSVLogger(folder / "run", name="", version=""), describe_fn=texts)
    torch.save({"results": {one.name: one.result for one in callbacks}, "written": written}, folder / f"{rank}.pt")
    (folder / "unwritable").mkdir(exist_ok=True)
    (folder / "unwritable" / "lightning_neuro").touch()
    train(CSVLogger(folder / "unwritable", name="", version=""))
    train(MemoryLogger())
    train(CSVLogger(folder / "wrong", name="", version=""), describe_fn="missing")
    (folder / f"{rank}.end").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
