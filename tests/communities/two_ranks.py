"""What one of two processes does: its part of the samples, and the result of both."""

import sys

import torch
import torch.distributed as dist

from lightning_neuro.communities import NeuronModularity
from tests.helpers import planted


def main(folder: str, rank: int) -> None:
    dist.init_process_group("gloo")
    x, targets = planted(), torch.arange(300) % 3
    for mode in ("correlation", "mostafa2021"):
        metric = NeuronModularity(mode=mode)
        if mode == "correlation" and rank == 0:  # the other rank has seen nothing
            metric.update(x, targets)
        elif mode == "mostafa2021":
            part = slice(0, 90) if rank == 0 else slice(90, 300)
            metric.update(x[part], targets[part])
        result = metric.compute()
        torch.save([result.labels.tolist(), result.scalars(), result.num_samples], f"{folder}/{mode}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
