"""The cost of taking activations in the validation loop: its time with hooks, relative to the same loop without.

    python benchmarks/riding.py                 # on the CPU
    python benchmarks/riding.py --busy          # while other processes keep all cores busy
    python benchmarks/riding.py --device cuda

Validation loops with and without the callbacks alternate in one process, and the analysis at the end of a loop is not
counted: the ratio is that of the loops themselves. The bound is 1.01.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from busy import busy_cores
from data import load_images
from networks import Classifier, resnet18, small_cnn
from torch.utils.data import DataLoader, Subset

from lightning_neuro import NeuronCommunities, Probe


class Clock(pl.Callback):
    """Seconds of each validation loop, without what happens at its end."""

    begin = 0.0

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        """Start the clock."""
        self.begin = self._now()

    def on_validation_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop the clock."""
        if not trainer.sanity_checking:
            self.seconds.append(self._now() - self.begin)


class EverySecond(NeuronCommunities):
    """Is due at every second validation only, so that loops with and without hooks alternate in one run."""

    def is_due(self, event: Any) -> bool:
        """Whether this loop is one with hooks."""
        return event.epoch % 2 == 1 if event.kind == "validation" else super().is_due(event)


def measure(network: str, samples: int, rounds: int, device: str) -> list[float]:
    """The ratio of each loop with hooks to the loop before it, without."""
    _, train, test = load_images()
    side = 32 if network == "resnet18" else None
    model = Classifier(resnet18() if network == "resnet18" else small_cnn(train.tensors[0].shape[-1]), side)
    clock = Clock(device)
    trainer = pl.Trainer(
        max_epochs=2 * rounds,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=[clock, EverySecond(Probe(num_samples=512), num_runs=1, num_null_samples=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=1,
    )
    data = Subset(test, [number % len(test) for number in range(samples)])
    trainer.fit(model, DataLoader(train, batch_size=8), DataLoader(data, batch_size=128))
    return [on / off for off, on in zip(clock.seconds[::2], clock.seconds[1::2], strict=True)][1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--busy", action="store_true", help="keep all cores busy with other processes")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with busy_cores(options.busy):
        for network, samples in (("small", 10_000), ("resnet18", 10_000 if options.device == "cuda" else 1_024)):
            ratios = measure(network, samples, options.rounds, options.device)
            median = statistics.median(ratios)
            print(
                f"{network:<10} {samples:>6} samples: {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True
            )


if __name__ == "__main__":
    main()
