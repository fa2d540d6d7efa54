"""The cost of the figures of one evaluation of the demo: drawing, pixels and the PNG that TensorBoard stores.

    python benchmarks/figures.py [--repeats 9] [--pictures FOLDER] [--profile plot_entropy]

Trains the demo's network for 2 epochs with all callbacks, keeps the last arguments of every function that draws, and
calls it again with them. Times are process times, so another process on the machine disturbs them little: medians of
warm runs, with their range. Two columns are of single calls in the run: `first`, at its first evaluation (with imports,
fonts and an empty cache of words), and `new`, at its last evaluation, whose numbers were never drawn before.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import image as image_summary

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    RepresentationRefinement,
    figures,
)
from lightning_neuro.demo import DigitsNet, digits_loaders

Calls = dict[str, Callable[[], Any]]
Times = dict[str, list[float]]
PARTS = ("draw", "pixels", "png", "free")
AT_THE_END = "plot_samples"  # drawn once a run


def watch(module: ModuleType, calls: Calls, single: Times) -> None:
    """Keep the last call of every `plot_` function that a module imports, as `method: function`, and time all calls."""
    method = module.__name__.split(".")[1]
    for name, function in list(vars(module).items()):
        if name.startswith("plot_"):
            setattr(module, name, _keeper(f"{method}: {name}", function, calls, single))


def _keeper(name: str, function: Callable[..., Any], calls: Calls, single: Times) -> Callable[..., Any]:
    def keep(*args: Any, **kwargs: Any) -> Any:
        calls[name] = lambda: function(*args, **kwargs)
        single.setdefault(name, []).append(sum(written(calls[name], name)[0]))
        return function(*args, **kwargs)

    return keep


def trained(folder: str) -> tuple[Calls, Times]:
    """The last calls of all functions that draw, in a run of two epochs, and the seconds of each call in it."""
    calls: Calls = {}
    single: Times = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_neuro.") and name.endswith((".callback", ".sample_tracking")):
            watch(module, calls, single)
    pl.seed_everything(0, verbose=False)
    probe = Probe()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[
            NeuronCommunities(probe),
            ActivationEntropy(probe),
            RepresentationRefinement(probe, layers=["fc1", "fc2"], influence_every_n_steps=20),
            ObserverProbes(probe),
            ActivationTopology(probe),
            ConceptPaths(probe),
        ],
        logger=TensorBoardLogger(folder),
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitsNet(), *digits_loaders())
    return calls, single


def written(call: Callable[[], Any], name: str, pictures: Path | None = None) -> tuple[list[float], int]:
    """Seconds of each part, for all figures of one call, and their bytes."""
    spent, size = [0.0] * len(PARTS), 0
    begin = time.process_time()
    drawn = call()
    spent[0] = time.process_time() - begin
    for tag, figure in drawn.items() if isinstance(drawn, dict) else [("", drawn)]:
        begin = time.process_time()
        image = figures.pixels(figure)
        middle = time.process_time()
        encoded = image_summary("tag", image, dataformats="HWC").value[0].image
        written_at = time.process_time()
        figures.free(figure)
        spent[1] += middle - begin
        spent[2] += written_at - middle
        spent[3] += time.process_time() - written_at
        size += len(encoded.encoded_image_string)
        if pictures is not None:
            file = f"{name}_{tag}".replace(": plot", "").rstrip("_")
            (pictures / f"{file}.png").write_bytes(encoded.encoded_image_string)
    return spent, size


def main() -> None:
    """Print a row per function that draws, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pictures", type=Path, help="folder to write the figures to")
    parser.add_argument("--profile", help="end of the name of a function to profile")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        calls, single = trained(folder)
        if options.profile:
            _profile(next(call for name, call in calls.items() if name.endswith(options.profile)))
            return
        for name, call in calls.items():
            written(call, name, options.pictures)
        runs: dict[str, list[tuple[list[float], int]]] = {name: [] for name in calls}
        for _ in range(options.repeats):
            for name, call in calls.items():
                runs[name].append(written(call, name))
    _print(runs, single)


def _print(runs: dict[str, list[tuple[list[float], int]]], single: Times) -> None:
    columns = "".join(f"{part:>8}" for part in (*PARTS, "all", "first", "new"))
    print(f"\nms of process time{'':<17}{columns}{'range':>14}{'kB':>7}")
    totals = [0.0] * (len(PARTS) + 3)
    for name, found in runs.items():
        spent = [[1e3 * seconds for seconds in parts] for parts, _ in found]
        medians = [statistics.median(part) for part in zip(*spent, strict=True)]
        sums = [sum(parts) for parts in spent]
        row = [*medians, statistics.median(sums), 1e3 * single[name][0], 1e3 * single[name][-1]]
        extent = f"{min(sums):.0f} - {max(sums):.0f}"
        print(f"{name:<35}{''.join(f'{value:>8.1f}' for value in row)}{extent:>14}{found[0][1] / 1e3:>7.0f}")
        if not name.endswith(AT_THE_END):
            totals = [total + value for total, value in zip(totals, row, strict=True)]
    print(f"{'one evaluation':<35}{''.join(f'{value:>8.1f}' for value in totals)}")


def _profile(call: Callable[[], Any]) -> None:
    """Where the time of ten warm calls goes."""
    written(call, "")
    with cProfile.Profile() as profile:
        for _ in range(10):
            written(call, "")
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
