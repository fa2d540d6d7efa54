"""The cost of refinement per training step: a ResNet-18 at 32 x 32 in real trainers that take turns, step by step.

    python benchmarks/refinement.py                    # on the CPU, batch 64
    python benchmarks/refinement.py --busy             # while other processes keep all cores busy
    python benchmarks/refinement.py --network small --steps 60
    python benchmarks/refinement.py --device cuda --steps 100

Each variant is a fit with the same weights and batches. The table lists the median over the steps of the ratio to the
plain step of the same round: of wall time and, on a CPU, of the time of the process, in which other processes do not
count. These differ by several percent between equal steps, so the last column is the time of the process inside the
hooks of the callback, relative to the rest of the step: it leaves out only what the hooks do to the caches.
"vmap(grad)" computes the gradient of every sample with torch.func, of which only the norms are kept. It cannot train a
network with BatchNorm, so it runs the network in evaluation mode. Memory is the growth of the peak of the process (on a
GPU, of the device), with each variant in a process of its own.
"""

import argparse
import logging
import multiprocessing
import re
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from busy import busy_cores
from networks import Classifier, resnet18, small_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from turns import Steps, take_turns

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement.backward_passes import BackwardPasses
from lightning_neuro.refinement.training_hooks import TrainingHooksCallback
from lightning_neuro.refinement.training_steps import TrainingSteps

CLASSES = 10
EVERY: dict[str, Any] = {"track_samples": "*"}
# Variant -> options of the callback; None: no callback.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain, again": None,
    "default: ledger and samples of the head": {},
    "ledger of the head": {"track_samples": False},
    "samples of every Linear and Conv": EVERY,
    "the same in one of 4 steps": EVERY | {"sample_every_n_steps": 4},
    "ledger of a convolution (64 channels)": {"layers": "net.3.conv1", "track_samples": False},
    "ledger of a convolution (256 channels)": {"layers": "net.8.conv2", "track_samples": False},
}
SMALL_CONVOLUTIONS = {"net.3.conv1": "net.0", "net.8.conv2": "net.3"}


def network(name: str) -> tuple[nn.Module, int]:
    """A network and the side of its images."""
    torch.manual_seed(0)
    return (small_cnn(28), 28) if name == "small" else (resnet18(), 32)


def options_of(name: str, variant: str) -> dict[str, Any] | None:
    """The options of a variant for a network."""
    found = VARIANTS[variant]
    if found is not None and name == "small" and "layers" in found:
        return found | {"layers": SMALL_CONVOLUTIONS[found["layers"]]}
    return found


class OwnWork(pl.Callback):
    """The time of the process inside the methods that training steps call, by variant; only one fit runs at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.variants: dict[int, str] = {}
        self._inside = False
        for owner, names in (
            (TrainingHooksCallback, ("on_train_batch_start", "on_train_batch_end")),
            (TrainingSteps, ("_stepped",)),
            (BackwardPasses, ("hold", "_added")),
        ):
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget the first step."""
        if batch_idx == 1:
            self.seconds[self.variants[threading.get_ident()]] = 0.0

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside, begin = True, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._inside = False
                variant = self.variants[threading.get_ident()]
                self.seconds[variant] = self.seconds.get(variant, 0.0) + time.process_time() - begin

        return timed


def fit(name: str, variant: str, batch: int, steps: int, device: str, *callbacks: pl.Callback) -> None:
    """Train with a variant; nothing is evaluated after the first step."""
    net, side = network(name)
    options = options_of(name, variant)
    ours = []
    if options is not None:
        probe = Probe(num_samples=16, every_n_steps=10**9)
        ours = [RepresentationRefinement(probe, memory_limit="8GB", on_error="raise", **options)]
    images = torch.randn(batch, 1, side, side).repeat(steps, 1, 1, 1)
    labels = torch.arange(batch * steps) % CLASSES
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=[*callbacks, *ours],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net), DataLoader(TensorDataset(images, labels), batch_size=batch))


def vmap_step(name: str, batch: int, device: str) -> Callable[[], None]:
    """A function that computes every sample's gradient with `vmap(grad)`."""
    from torch.func import functional_call, grad, vmap

    net, side = network(name)
    net = net.to(device).eval()
    images, labels = torch.randn(batch, 1, side, side, device=device), torch.arange(batch, device=device) % CLASSES
    parameters = {key: value.detach() for key, value in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, (weights, buffers), (image[None],)), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> None:
        for first in range(0, batch, 16):  # in parts, because the whole batch does not fit into memory
            part = slice(first, first + 16)
            for gradient in per_sample(parameters, images[part], labels[part]).values():
                gradient.flatten(1).norm(dim=1)

    return step


def now(device: str) -> float:
    """Seconds; waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(step: Callable[[], None], device: str) -> float:
    """Seconds of one call, the fastest of three."""
    found = []
    for _ in range(3):
        begin = now(device)
        step()
        found.append(now(device) - begin)
    return min(found)


def quiet() -> None:
    """Say nothing but the table."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def peak(name: str, variant: str, batch: int, device: str, threads: int) -> float:
    """Peak memory of a process of three steps, in MiB; on a CPU under Linux only."""
    quiet()
    torch.set_num_threads(threads)
    fit(name, variant, batch, 3, device)
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not `resource.getrusage`, in which a process inherits the peak of its parent.
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def spread(ratios: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def row(variant: str, steps: Steps, plain: Steps, own: float) -> str:
    """One line of the table; `own` are the seconds of our work in all steps."""
    wall = spread([one / other for one, other in zip(steps.wall, plain.wall, strict=True)])
    cpu = spread([one / other for one, other in zip(steps.cpu, plain.cpu, strict=True)])
    mine = own / len(steps.cpu)
    return f"| {variant} | {wall} | {cpu} | {mine / (statistics.fmean(steps.cpu) - mine):.3f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("small", "resnet18"), default="resnet18")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--busy", action="store_true", help="keep all cores busy with other processes")
    parser.add_argument("--no-vmap", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    variants = list(dict.fromkeys(["plain", *options.variants]))
    shared = (options.batch, options.steps, options.device)
    with busy_cores(options.busy):
        own = OwnWork()

        def run(variant: str, turn: pl.Callback) -> None:
            own.variants[threading.get_ident()] = variant
            fit(options.network, variant, *shared, turn, own)

        fits = [partial(run, variant) for variant in variants]
        found = take_turns(fits, partial(now, options.device))
    plain = statistics.median(found[0].wall)
    load = "busy" if options.busy else "idle"
    print(f"{options.network}, batch {options.batch}, {len(found[0].wall)} rounds, {load}; plain {1e3 * plain:.0f} ms")
    print("| variant | step / plain step, wall: median (quartiles) | process | own |\n|---|---|---|---|")
    for variant, steps in zip(variants, found, strict=True):
        print(row(variant, steps, found[0], own.seconds.get(variant, 0.0)), flush=True)
    if not options.no_vmap:
        ratio = seconds(vmap_step(options.network, options.batch, options.device), options.device) / min(found[0].wall)
        print(f"| torch.func vmap(grad), norms only | {ratio:.2f} | | |")
    if not options.no_memory:
        context = multiprocessing.get_context("spawn")
        base = 0.0
        for variant in variants:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                shared_by_all = (options.network, variant, options.batch, options.device, options.threads)
                size = pool.submit(peak, *shared_by_all).result()
            base = size if variant == "plain" else base
            print(f"peak memory, {variant}: {size - base:+.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
