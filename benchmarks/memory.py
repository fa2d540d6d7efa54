"""The memory of each callback: the peak of a fit with it, less that of the same fit without, in processes of their own.

    python benchmarks/memory.py
    python benchmarks/memory.py --csv docs/benchmarks/memory.csv

One thing grows at a time: samples of the probe set, units of three hidden layers, classes, or the rows of a layer with
`reduction="tokens"`.
"""

import argparse
import csv
import json
import logging
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cost import SIX, Classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import Probe

# Samples, units, classes, positions of each sample.
CASES: dict[str, tuple[int, int, int, int]] = {
    "base": (512, 256, 10, 1),
    "8,192 samples": (8_192, 256, 10, 1),
    "2,048 units": (512, 2_048, 10, 1),
    "8,192 units": (512, 8_192, 10, 1),
    "1,000 classes": (512, 256, 1_000, 1),
    "100,000 rows": (2_048, 256, 10, 49),
}


class Tokens(Classifier):
    """The same layers on every position of a sample."""

    def __init__(self, units: int, classes: int, positions: int) -> None:
        super().__init__(units, classes)
        self.positions = positions
        self.embed = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Any:
        """Logits, averaged over the positions."""
        return self.net(self.embed(x)).mean(1)


def peak(name: str, case: str) -> float:
    """Peak memory of a fit in MiB; `name` may be "plain". To be called in a process of its own."""
    warnings.filterwarnings("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    samples, units, classes, positions = CASES[case]
    pl.seed_everything(0, verbose=False)
    labels = torch.arange(max(4_000, 20 * classes, samples)) % classes
    x = torch.randn(classes, 64)[labels] + 0.5 * torch.randn(len(labels), 64)
    if positions > 1:
        x = x[:, None].expand(-1, positions, -1)
    model = Classifier(units, classes) if positions == 1 else Tokens(units, classes, positions)
    probe = Probe(num_samples=samples, reduction="tokens" if positions > 1 else "mean")
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[] if name == "plain" else [SIX[name](probe)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=5,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, labels), 64), DataLoader(TensorDataset(x, labels), 256))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("CALLBACK", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak(*options.one)))
        return
    rows = []
    print(f"| {'added peak, MiB':<16} | {' | '.join(CASES)} |")
    print("|" + "---|" * (len(CASES) + 1))
    plain = {case: _measured("plain", case) for case in CASES}
    for name in SIX:
        added = {case: _measured(name, case) - plain[case] for case in CASES}
        rows.append({"callback": name} | {case: round(value) for case, value in added.items()})
        print(f"| {name:<16} | {' | '.join(f'{value:+.0f}' for value in added.values())} |", flush=True)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _measured(name: str, case: str) -> float:
    command = [sys.executable, __file__, "--one", name, case]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(found.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
