"""Which statistic of a ledger reads as a share: three ways to divide the same exact contributions.

    python benchmarks/refinement_shares.py [--epochs 8] [--seeds 3]

The demo's network on scikit-learn's digits, with Adam and with SGD. Per layer: the share of a sample's own class, its
value with shuffled labels, the smallest and the largest cell of the matrix of classes, and for how many of the 10
classes the own class has the largest share. "raw" divides by |p|^2, "centred" first subtracts the means over the
samples and divides by |p - mean p|^2, "share" divides by the sum of the absolute values instead (the package's).
"""

import argparse
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro import RepresentationRefinement
from lightning_neuro.demo import DigitsNet, digits_loaders
from lightning_neuro.refinement import RefinementResult


class Net(DigitsNet):
    """The demo's network with a choice of optimizer."""

    def __init__(self, adam: bool) -> None:
        super().__init__()
        self.adam = adam

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, or SGD with momentum."""
        return super().configure_optimizers() if self.adam else torch.optim.SGD(self.parameters(), 0.05, 0.9)


def trained(adam: bool, seed: int, epochs: int) -> dict[str, RefinementResult]:
    """Layer -> result."""
    pl.seed_everything(seed, verbose=False)
    callback = RepresentationRefinement(layers=["conv2", "fc1", "fc2"], track_samples=False, figures="never")
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(adam), *digits_loaders())
    return callback.result


def numbers(matrix: Tensor, weights: Tensor) -> list[float]:
    """Own class, null, smallest and largest cell, and for how many classes the own one is the largest."""
    weights = weights / weights.sum()
    own, null = float(weights @ matrix.diagonal()), float(weights @ matrix.mean(1))
    largest = int((matrix.argmax(1) == torch.arange(len(matrix))).sum())
    return [own, null, float(matrix.min()), float(matrix.max()), largest]


def main() -> None:
    """Print one line per optimizer, layer and statistic, means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{'':<24}{'own':>8}{'null':>8}{'min':>8}{'max':>8}{'largest':>9}")
    for adam in (True, False):
        runs = [trained(adam, seed, args.epochs) for seed in range(args.seeds)]
        for layer in runs[0]:
            for statistic in ("raw", "centred", "share"):
                rows = []
                for run in runs:
                    found = run[layer]
                    centred = found.shares * found.gross[:, None]
                    matrix = {"raw": found.raw_shares, "centred": centred, "share": found.shares}[statistic]
                    rows.append(numbers(matrix[:-1, :-1], found.squares[:-1]))
                means = torch.tensor(rows).mean(0).tolist()
                label = f"{'Adam' if adam else 'SGD':<6}{layer:<7}{statistic}"
                print(f"{label:<24}" + "".join(f"{value:>8.2f}" for value in means), flush=True)


if __name__ == "__main__":
    main()
