"""The cost of refinement per training step: steps with and without it, taken in turn in one process.

    python benchmarks/refinement.py                    # a ResNet-18 at 32 x 32, batch 128
    python benchmarks/refinement.py --network small --repeats 60

Each variant is a separate network with the same weights and the same batch. One step of each is taken in turn, and the
table lists the median over the rounds of the ratio to the plain step. "vmap(grad)" computes the gradient of every
sample with torch.func, of which only the norms are kept. It cannot train a network with BatchNorm, so it runs the
network in evaluation mode. Memory is the growth of the peak of the process, with each variant in its own process.
"""

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from networks import resnet18, small_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_neuro.refinement import RefinementLedger, SampleTable, Sources
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.traced_layers import find_layers
from lightning_neuro.refinement.training_steps import TrainBatch, TrainingSteps

CLASSES, BATCH, DATASET = 10, 128, 60_000
# Variant -> layers with a ledger, layers whose samples are tracked.
VARIANTS: dict[str, tuple[str | None, str | None]] = {
    "plain": (None, None),
    "default: ledger and samples of the head": ("head", "head"),
    "ledger of the head": ("head", None),
    "samples of every Linear and Conv": ("head", "*"),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network and a batch for it."""
    torch.manual_seed(0)
    if name == "small":
        return small_cnn(28), torch.randn(BATCH, 1, 28, 28)
    return resnet18(), torch.randn(BATCH, 1, 32, 32)


def stepper(name: str, variant: str) -> Callable[[], None]:
    """A function that makes one training step of a variant, as with the callback."""
    model, images = network(name)
    model.train()
    labels = torch.arange(BATCH) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = record(model, optimizer, *VARIANTS[variant])
    batch, sources = TrainBatch(ids=torch.arange(BATCH), targets=labels), Sources(labels, CLASSES + 1)

    def step() -> None:
        optimizer.zero_grad()
        if steps is not None:
            steps.begin(batch, Sources(sources.rows, sources.num))
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        if steps is not None:
            steps.end()

    return step


def record(model: nn.Module, optimizer: Any, ledgers: str | None, samples: str | None) -> TrainingSteps | None:
    """Follow the steps of a network as the callback does."""
    if ledgers is None:
        return None
    head = find_layers(model, None)
    watched = head | (find_layers(model, "*") if samples == "*" else {})

    def raised(layer: str, error: Exception) -> None:
        raise error

    table = [SampleTable(list(watched), DATASET)] if samples else []
    opened = {layer: RefinementLedger(owners[0], num_sources=CLASSES) for layer, owners in head.items()}
    return TrainingSteps(GradientHooks(watched), opened, table, [optimizer], raised)


def vmap_step(name: str) -> Callable[[], None]:
    """A function that computes every sample's gradient with `vmap(grad)`."""
    from torch.func import functional_call, grad, vmap

    model, images = network(name)
    model.eval()
    labels = torch.arange(BATCH) % CLASSES
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, (weights, buffers), (image[None],)), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> None:
        for first in range(0, BATCH, 16):  # in parts, because the whole batch does not fit into memory
            part = slice(first, first + 16)
            for gradient in per_sample(parameters, images[part], labels[part]).values():
                gradient.flatten(1).norm(dim=1)

    return step


def timed(step: Callable[[], None]) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def peak(name: str, variant: str, threads: int) -> float:
    """Peak memory of a process of three steps, in MiB; Linux only."""
    torch.set_num_threads(threads)
    step = stepper(name, variant)
    for _ in range(3):
        step()
    # Not `resource.getrusage`, in which a process inherits the peak of its parent.
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("small", "resnet18"), default="resnet18")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-vmap", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {variant: stepper(options.network, variant) for variant in VARIANTS}
    if not options.no_vmap:
        steps["torch.func vmap(grad), norms only"] = vmap_step(options.network)
    for step in steps.values():
        step()
    rounds = []
    for number in range(options.repeats):
        order = list(steps) if number % 2 == 0 else list(steps)[::-1]
        rounds.append({variant: timed(steps[variant]) for variant in order})
    context = multiprocessing.get_context("spawn")
    plain = 1e3 * statistics.median(found["plain"] for found in rounds)
    print(f"{options.network}, batch {BATCH}, {options.repeats} rounds; plain step {plain:.0f} ms")
    print("| variant | step / plain step: median (quartiles) | peak memory over plain |\n|---|---|---|")
    base = 0.0
    for variant in steps:
        ratios = sorted(found[variant] / found["plain"] for found in rounds)
        low, middle, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.25, 0.5, 0.75))
        memory = "-"
        if variant in VARIANTS:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                size = pool.submit(peak, options.network, variant, options.threads).result()
            base = size if variant == "plain" else base
            memory = f"{size - base:+.0f} MiB"
        print(f"| {variant} | {middle:.3f} ({low:.3f} to {high:.3f}) | {memory} |")


if __name__ == "__main__":
    main()
