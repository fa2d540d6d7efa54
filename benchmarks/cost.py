"""What the six callbacks cost, on an idle machine and with all cores busy, against the same fit without them.

    python benchmarks/cost.py                    # the demo's fit, and single evaluations
    python benchmarks/cost.py --part growth      # evaluations against samples, units and classes
    python benchmarks/cost.py --csv docs/benchmarks/cost.csv

Idle and busy alternate, and so do fits with and without the callbacks. "Busy" means that one process per core loads and
augments images, as the workers of data loaders do. An evaluation is measured in a real fit by the callbacks themselves
(`callback.cost`), without drawing, after a first fit that pays the imports.
"""

import argparse
import csv
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from busy import busy_cores
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    RepresentationRefinement,
)
from lightning_neuro.demo import DigitsNet, digits_loaders

SIX: dict[str, Callable[..., Any]] = {
    "communities": NeuronCommunities,
    "entropy": ActivationEntropy,
    "refinement": RepresentationRefinement,
    "observers": ObserverProbes,
    "topology": ActivationTopology,
    "paths": ConceptPaths,
}
# Samples, units of each of three layers, classes, bound in seconds for all six: idle, busy.
EVALUATIONS = (
    (512, 256, 10, 0.5, 0.8),
    (512, 256, 100, 1.0, None),
    (512, 256, 1_000, 2.5, None),
    (512, 2_048, 10, 3.0, None),
)
GROWTH: dict[str, Sequence[tuple[int, int, int]]] = {
    "samples": [(n, 128, 10) for n in (128, 512, 2_048, 8_192)],
    "units": [(512, units, 10) for units in (64, 256, 1_024, 4_096, 8_192)],
    "classes": [(512, 128, classes) for classes in (2, 10, 100, 1_000)],
}


def demo_fit(callbacks: Sequence[Any], epochs: int) -> float:
    """Seconds of the demo's fit."""
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(epochs, callbacks, pl.loggers.TensorBoardLogger(folder), log_every_n_steps=5)
        model, loaders = DigitsNet(), digits_loaders()
        start = time.perf_counter()
        trainer.fit(model, *loaders)
        return time.perf_counter() - start


def demo_callbacks(**options: Any) -> list[Any]:
    """The six callbacks of the demo."""
    probe = Probe()
    own = {"refinement": {"layers": ["fc1", "fc2"], "influence_every_n_steps": 20}}
    return [make(probe, **own.get(name, {}), **options) for name, make in SIX.items()]


class Classifier(pl.LightningModule):
    """Three hidden layers, on random classes."""

    def __init__(self, units: int, classes: int) -> None:
        super().__init__()
        widths = (64, units, units, units)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(units, classes))

    def forward(self, x: Tensor) -> Any:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The forward pass, in which activations are taken."""
        self(batch[0])

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def evaluation(samples: int, units: int, classes: int, *, epochs: int = 3) -> dict[str, float]:
    """Seconds of one evaluation of each callback without drawing, and of the passes they share."""
    pl.seed_everything(0, verbose=False)
    labels = torch.arange(max(4_000, 20 * classes, samples)) % classes
    data = TensorDataset(torch.randn(classes, 64)[labels] + 0.5 * torch.randn(len(labels), 64), labels)
    callbacks = [make(Probe(num_samples=samples), figures="never") for make in SIX.values()]
    trainer = _trainer(epochs, callbacks, False, limit_train_batches=10, num_sanity_val_steps=0)
    trainer.fit(Classifier(units, classes), DataLoader(data, 64, shuffle=True), DataLoader(data, 500))
    found = {one.name: one.cost.seconds.get("compute", 0.0) / (epochs + 1) for one in callbacks}
    found["pass"] = callbacks[0].cost.seconds["pass"] / (epochs + 1)
    return found | {"all": sum(found.values())}


def _trainer(epochs: int, callbacks: Sequence[Any], logger: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def measure_demo(rounds: int, epochs: int, rows: list[dict[str, Any]]) -> None:
    """The demo's fit with all six callbacks, relative to without."""
    demo_fit(demo_callbacks(), 1)
    ratios: dict[bool, list[float]] = {False: [], True: []}
    parts: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for busy in (False, True):
            with busy_cores(busy):
                plain = demo_fit([], epochs)
                callbacks = demo_callbacks()
                ratios[busy].append(demo_fit(callbacks, epochs) / plain)
            rows.append({"part": "demo", "round": number, "busy": busy, "ratio": ratios[busy][-1], "plain": plain})
            for one in callbacks if not busy else ():
                for part, seconds in one.cost.seconds.items():
                    if part != "pass":
                        parts.setdefault((one.name, part), []).append(seconds / plain)
    for busy, values in ratios.items():
        print(f"demo, {epochs} epochs, {'busy' if busy else 'idle'}: {_spread(values)} of the plain fit (bound 2.5)")
    for (name, part), shares in parts.items():
        print(f"    {name:<12} {part:<8} {statistics.median(shares):.2f} of the plain fit")


def measure_evaluations(rounds: int, rows: list[dict[str, Any]]) -> None:
    """One evaluation of all six callbacks in seconds, against the bounds."""
    evaluation(*EVALUATIONS[0][:3], epochs=1)
    for samples, units, classes, idle_bound, busy_bound in EVALUATIONS:
        for busy in (False, True):
            found = []
            for number in range(rounds):
                with busy_cores(busy):
                    found.append(evaluation(samples, units, classes))
                rows.append(
                    {
                        "part": "evaluation",
                        "round": number,
                        "busy": busy,
                        "samples": samples,
                        "units": units,
                        "classes": classes,
                    }
                    | found[-1]
                )
            bound = busy_bound if busy else idle_bound
            where = f"{samples} samples, 3 x {units} units, {classes} classes, {'busy' if busy else 'idle'}"
            print(f"{where}: {_spread([one['all'] for one in found])} s{'' if bound is None else f' (bound {bound})'}")
            medians = {name: statistics.median(one[name] for one in found) for name in found[0] if name != "all"}
            print("    " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in medians.items()), flush=True)


def measure_growth(rounds: int, rows: list[dict[str, Any]]) -> None:
    """Seconds of an evaluation against samples, units and classes, and the slope in log-log axes."""
    evaluation(*EVALUATIONS[0][:3], epochs=1)
    for name, cases in GROWTH.items():
        table: dict[str, list[float]] = {}
        for samples, units, classes in cases:
            found = [evaluation(samples, units, classes, epochs=1) for _ in range(rounds)]
            case = {"part": name, "samples": samples, "units": units, "classes": classes}
            rows.extend(case | one for one in found)
            for family in found[0]:
                table.setdefault(family, []).append(statistics.median(one[family] for one in found))
        sizes = [case[list(GROWTH).index(name)] for case in cases]
        print(f"{name}: {', '.join(map(str, sizes))}")
        for family, seconds in table.items():
            slope = _slope(sizes[-3:], seconds[-3:])
            print(f"    {family:<12} {', '.join(f'{one:.3f}' for one in seconds)} s, slope {slope:.2f}", flush=True)


def _slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the regression line through the points in log-log axes."""
    x, y = [math.log(size) for size in sizes], [math.log(max(one, 1e-6)) for one in seconds]
    return statistics.linear_regression(x, y).slope


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("demo", "evaluations", "growth"), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    parts = options.part or ["demo", "evaluations"]
    try:
        if "demo" in parts:
            measure_demo(options.rounds, options.epochs, rows)
        if "evaluations" in parts:
            measure_evaluations(options.rounds, rows)
        if "growth" in parts:
            measure_growth(options.rounds, rows)
    finally:  # also what was measured before an interruption
        _write(options.csv, rows)


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None and rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
