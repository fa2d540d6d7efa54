"""The cost of one evaluation of refinement, without drawing: three hidden layers, 512 samples, all layers divided.

    python benchmarks/refinement_evaluation.py

Processor seconds of one process on one thread. "All" includes the pass over the probe set; the bounds are .1 at 10
classes and .3 at 1,000.
"""

import argparse
import itertools
import logging
import statistics
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement import RefinementSummary
from lightning_neuro.session import Session

STEPS, BATCH, INPUTS = 20, 64, 64


class Mlp(pl.LightningModule):
    """Three hidden layers and a head."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        sizes = [INPUTS, width, width, width]
        hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, whose ledgers also hold a running mean."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def clocked(owner: Any, name: str, seconds: list[float]) -> None:
    """Collect the processor seconds of each call of a method."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        found = method(*args, **kwargs)
        seconds.append(time.process_time() - begin)
        return found

    setattr(owner, name, timed)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--memory-limit", default="8GB")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    whole: list[float] = []
    update: list[float] = []
    compute: list[float] = []
    clocked(Session, "evaluate", whole)
    clocked(RefinementSummary, "update", update)
    clocked(RefinementSummary, "compute", compute)
    print("| units | classes | sources | all | division | scalars |\n|---|---|---|---|---|---|")
    for width in options.widths:
        for classes in options.classes:
            for seconds in (whole, update, compute):
                seconds.clear()
            torch.manual_seed(0)
            labels = torch.arange(STEPS * BATCH) * 7919 % classes
            data = TensorDataset(torch.randn(len(labels), INPUTS), labels)
            callback = RepresentationRefinement(
                Probe(num_samples=512, every_n_steps=STEPS // 5),
                layers=["net.0", "net.2", "net.4"],
                memory_limit=options.memory_limit,
            )
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
                callbacks=[callback],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Mlp(width, classes), DataLoader(data, batch_size=BATCH))
            sources = len(next(iter(callback.ledger.values())).names) - 1
            times = len(compute) // 3
            # The first one also loads the samples.
            everything = statistics.median(sorted(whole)[-times:-1])
            own = sum(update + compute) / times
            print(
                f"| {width} | {classes} | {sources} | {everything:.3f} | {own:.3f} | {len(callback.scalars)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
