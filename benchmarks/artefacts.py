"""What the files of results take: bytes and time of one evaluation of all six callbacks, and of reading a run.

    python benchmarks/artefacts.py

The times are measured by the callbacks themselves (`callback.cost`), in a real fit without figures: the median of all
evaluations but the first, in which the samples are saved, once in a run. An evaluation is the pass over the samples,
the computation and the saving.
"""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cost import SIX, Classifier, demo_callbacks
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import Probe, load_run
from lightning_neuro.artefacts.locations import result_path
from lightning_neuro.artefacts.results_file import packed, read_header, write_file
from lightning_neuro.demo import DigitsNet, digits_loaders

KILOBYTE = 1_000


class Seconds(pl.Callback):
    """Notes what each part of each evaluation took; listed after the callbacks that it watches."""

    def __init__(self, watched: Sequence[Any]) -> None:
        self.watched = watched
        self.evaluations: list[dict[tuple[str, str], float]] = []
        self._before: dict[tuple[str, str], float] = {}

    def note(self) -> None:
        """Note the difference to the last time."""
        now = {(one.name, part): sum_ for one in self.watched for part, sum_ in one.cost.seconds.items()}
        now["all", "pass"] = self.watched[0].probe_pass.cost.total
        self.evaluations.append({key: value - self._before.get(key, 0.0) for key, value in now.items()})
        self._before = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the first evaluation."""
        self.note()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After each of the others."""
        if not trainer.sanity_checking:
            self.note()

    def median(self, part: str, name: str | None = None) -> float:
        """Seconds of a part, of one callback or of all."""
        return statistics.median(
            sum(value for (owner, own), value in one.items() if own == part and name in (None, owner))
            for one in self.evaluations[1:]
        )


def run_demo(folder: Path, epochs: int) -> Seconds:
    """The demo's fit; returns what its evaluations took."""
    pl.seed_everything(0, verbose=False)
    callbacks = demo_callbacks(figures="never")
    return fit(folder, callbacks, DigitsNet(), digits_loaders(), epochs)


def run_classifier(folder: Path, epochs: int, *, samples: int, units: int, classes: int) -> Seconds:
    """A fit of three layers on random classes, all of which the probe covers; returns what its evaluations took."""
    pl.seed_everything(0, verbose=False)
    labels = torch.arange(max(4_000, 20 * classes)) % classes
    data = TensorDataset(torch.randn(classes, 64)[labels] + 0.5 * torch.randn(len(labels), 64), labels)
    probe = Probe(num_samples=samples, classes=range(classes))
    callbacks = [make(probe, figures="never") for make in SIX.values()]
    loaders = DataLoader(data, 64, shuffle=True), DataLoader(data, 500)
    return fit(folder, callbacks, Classifier(units, classes), loaders, epochs, limit_train_batches=10)


def fit(folder: Path, callbacks: Sequence[Any], model: Any, loaders: Any, epochs: int, **options: Any) -> Seconds:
    """Train with a logger that writes next to nothing."""
    seconds = Seconds(callbacks)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, seconds],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, *loaders)
    return seconds


def report(what: str, folder: Path, seconds: Seconds) -> None:
    """Print bytes and shares of the time."""
    names = [callback.name for callback in seconds.watched]
    start = time.perf_counter()
    run = load_run(folder)
    listed = time.perf_counter() - start
    sizes = {name: statistics.median(one.path.stat().st_size for one in run[name].values()) for name in names}
    samples = sum(path.stat().st_size for path in (run.folder / "probe_samples").glob("*.zip"))
    save = seconds.median("save")
    whole = save + seconds.median("compute") + seconds.median("pass")
    print(f"{what}: {sum(sizes.values()) / KILOBYTE:,.0f} kB an evaluation, samples {samples / KILOBYTE:,.0f} kB once")
    print(
        f"    saved in {save * 1e3:.1f} ms, {save / whole:.1%} of {whole * 1e3:.0f} ms an evaluation;"
        f" listed in {listed / len(run[names[0]]) * 1e3:.1f} ms"
    )
    for name in names:
        start = time.perf_counter()
        dict(run[name][max(run[name])])
        read = time.perf_counter() - start
        print(
            f"    {name:<12} {sizes[name] / KILOBYTE:>8,.1f} kB, saved in"
            f" {seconds.median('save', name) * 1e3:>6.1f} ms, read in {read * 1e3:>6.1f} ms"
        )


def measure_listing(folder: Path, evaluations: int) -> None:
    """The time to list a long run."""
    run = load_run(folder)
    for name, found in run.items():
        last = found[max(found)]
        header, values = read_header(last.path, "results"), packed(dict(last))
        for step in range(1_000_000, 1_000_000 + evaluations):
            write_file(result_path(run.folder, name, step), "results", header | {"step": step}, values)
    start = time.perf_counter()
    found = load_run(folder)
    print(
        f"listed {6 * evaluations} more files in {time.perf_counter() - start:.2f} s ({len(found.problems)} problems)"
    )


def main() -> None:
    """Measure the demo, and layers of 1,024 units with 100 classes."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder) / "warm", 1)  # pays for imports
        seconds = run_demo(Path(folder) / "demo", 20)
        report("demo", Path(folder) / "demo", seconds)
        large = {"samples": 512, "units": 1_024, "classes": 100}
        seconds = run_classifier(Path(folder) / "large", 3, **large)
        report("3 layers of 1,024 units, 512 samples, 100 classes", Path(folder) / "large", seconds)
        measure_listing(Path(folder) / "demo", 500)


if __name__ == "__main__":
    main()
