"""The cost of the callbacks: the ratio of an epoch with them to an epoch without, in alternating runs on one machine.

    python benchmarks/overhead.py                      # small CNN, whole epochs of 60,000 images
    python benchmarks/overhead.py --network resnet18   # a ResNet-18 at 32 x 32, on part of an epoch, see below

Every fit runs in a separate process (to measure its peak memory), and fits with and without a callback alternate.
Absolute times are not meaningful on a shared machine; the ratio of two consecutive runs is, if the machine is idle. If
it is not, use the second ratio: the time of the epoch, divided by this time without the callbacks' evaluations, both
from the same run. (Between evaluations the callbacks do nothing, except RepresentationRefinement, which follows the
training steps: see benchmarks/refinement.py.) The ResNet is too slow for whole epochs on a CPU: a part of an epoch is
run, and the cost of the evaluation at its end is related to 60,000 samples at the pace of the same fit.
"""

import argparse
import csv
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

EPOCH = 60_000


def callbacks(name: str) -> list[Any]:
    """The callbacks of a variant, at their defaults."""
    from lightning_neuro import (
        ActivationEntropy,
        ActivationTopology,
        ConceptPaths,
        NeuronCommunities,
        ObserverProbes,
        RepresentationRefinement,
    )

    methods: dict[str, Callable[[], Any]] = {
        "NeuronCommunities": NeuronCommunities,
        "ActivationEntropy": ActivationEntropy,
        "RepresentationRefinement": RepresentationRefinement,
        "ObserverProbes": ObserverProbes,
        "ActivationTopology": ActivationTopology,
        "ConceptPaths": ConceptPaths,
    }
    if name == "plain":
        return []
    return [make() for make in methods.values()] if name == "all" else [methods[name]()]


VARIANTS = (
    "NeuronCommunities",
    "ActivationEntropy",
    "RepresentationRefinement",
    "ObserverProbes",
    "ActivationTopology",
    "ConceptPaths",
    "all",
)


def fit(network: str, variant: str, samples: int, batch_size: int) -> dict[str, float]:
    """One epoch of training and validation; seconds of the epoch, of what came before it, and peak memory."""
    import logging
    import tempfile
    import warnings

    import pytorch_lightning as pl
    import torch
    from data import load_images
    from networks import Classifier, resnet18, small_cnn
    from pytorch_lightning.loggers import TensorBoardLogger
    from torch.utils.data import DataLoader, Subset

    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(2)
    pl.seed_everything(0, verbose=False)
    _, train, test = load_images()
    train_loader = DataLoader(Subset(train, range(min(samples, len(train)))), batch_size=batch_size, shuffle=True)
    test_loader = DataLoader(Subset(test, range(min(samples // 6, len(test)))), batch_size=batch_size)
    side = 32 if network == "resnet18" else None
    model = Classifier(resnet18() if network == "resnet18" else small_cnn(train.tensors[0].shape[-1]), side)

    class Clock(pl.Callback):
        """Last in the list, so that the work of the others at the end of an epoch is included."""

        start = end = 0.0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.end = time.perf_counter()

    clock, ours, inside = Clock(), callbacks(variant), [0.0]
    time_evaluations(inside)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[*ours, clock],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        begin = time.perf_counter()
        trainer.fit(model, train_loader, test_loader)
    return {
        "epoch_seconds": clock.end - clock.start,
        "inside_seconds": inside[0],
        "before_seconds": clock.start - begin,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "samples": len(train_loader.dataset),
    }


def time_evaluations(inside: list[float]) -> None:
    """Add up the seconds of all evaluations after the one before training."""
    from lightning_neuro.session import Session

    evaluate = Session.evaluate

    def timed(session: Any, trainer: Any, pl_module: Any, kind: Any) -> None:
        begin = time.perf_counter()
        evaluate(session, trainer, pl_module, kind)
        if kind != "start":
            inside[0] += time.perf_counter() - begin

    Session.evaluate = timed  # type: ignore[method-assign]


def import_seconds(statement: str) -> float:
    """Seconds that a new interpreter takes for some imports."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


def measure(network: str, variants: Sequence[str], samples: int, rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """Run, for each variant in each round, one plain fit and one with the variant."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for number in range(rounds):
        for variant in variants:
            for name in ("plain", variant):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    result = pool.submit(fit, network, name, samples, batch_size).result()
                rows.append({"network": network, "round": number, "pair": variant, "variant": name, **result})
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print median and range of the ratios of consecutive runs."""
    ratios_of = f"{'epoch of 60,000: ratio (range)':>34}{'within one run (range)':>30}"
    print(f"\n{'callback':<26}{ratios_of}{'before training':>20}{'peak memory':>14}")
    for variant in dict.fromkeys(row["pair"] for row in rows):
        pairs = [row for row in rows if row["pair"] == variant]
        plain, ours = pairs[::2], pairs[1::2]
        ratios, within, starts, memory = [], [], [], []
        for a, b in zip(plain, ours, strict=True):
            whole = a["epoch_seconds"] * EPOCH / a["samples"]
            ratios.append(1 + (b["epoch_seconds"] - a["epoch_seconds"]) / whole)
            own = (b["epoch_seconds"] - b["inside_seconds"]) * EPOCH / b["samples"]
            within.append(1 + b["inside_seconds"] / own)
            starts.append((b["before_seconds"] - a["before_seconds"]) / whole)
            memory.append(b["peak_mib"] - a["peak_mib"])
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        inner = f"{statistics.median(within):.3f} ({min(within):.3f} to {max(within):.3f})"
        start = f"{statistics.median(starts):+.1%} of an epoch"
        print(f"{variant:<26}{spread:>34}{inner:>30}{start:>20}{statistics.median(memory):>+10.0f} MiB")
    if rows[0]["samples"] < EPOCH:
        print(
            f"Extrapolated: {rows[0]['samples']} samples were run, and an epoch is taken as 60,000 at the plain pace."
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("small", "resnet18"), default="small")
    parser.add_argument("--callbacks", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--samples", type=int, help="training samples a fit (default: 60,000; resnet18: 1,920)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results"), help="folder for the raw numbers")
    options = parser.parse_args()
    samples = options.samples or (EPOCH if options.network == "small" else 1920)

    rows = measure(options.network, options.callbacks, samples, options.rounds, options.batch_size)
    options.csv.mkdir(parents=True, exist_ok=True)
    with (options.csv / f"overhead_{options.network}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    report(rows)

    both = "import pytorch_lightning, lightning_neuro"
    pairs = [(import_seconds("import pytorch_lightning"), import_seconds(both)) for _ in range(5)]
    added = [with_ours - without for without, with_ours in pairs]
    ratio = statistics.median(with_ours / without for without, with_ours in pairs)
    print(f"\nimport lightning_neuro adds {statistics.median(added):.2f} s ({ratio:.2f} times pytorch_lightning alone)")


if __name__ == "__main__":
    main()
