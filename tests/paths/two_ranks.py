"""Run by test_distributed_paths.py in two processes: options of `ConceptPaths` that need all ranks to work together."""

import sys
from pathlib import Path
from typing import Any

import torch

from lightning_neuro import ConceptPaths, Probe
from tests.contract.two_ranks import fit
from tests.models import images, mlp

OPTIONS: dict[str, dict[str, Any]] = {
    "refined": {"num_refinement_steps": 4},
    "minimal": {"density": "minimal"},
    "mean": {"ablation": "mean"},
    "few a class": {"samples_per_class": 3},
}


def callback(name: str) -> ConceptPaths:
    return ConceptPaths(Probe(source=images(31)), on_error="raise", **OPTIONS[name])


def main(directory: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for name in OPTIONS:
        watching = callback(name)
        fit(mlp(), watching, max_epochs=1)
        masks = {layer: result.paths for layer, result in watching.result.items()}
        facts = {"initial": watching.initial, "scalars": watching.scalars, "masks": masks}
        torch.save(facts, directory / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
