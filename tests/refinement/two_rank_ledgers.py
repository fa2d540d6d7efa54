"""Run by test_ledger_ranks.py in two processes, and by its single process: whole fits, and one that is resumed."""

import os
import sys
from datetime import timedelta

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.optim import SGD, AdamW
from torch.utils.data import DistributedSampler

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement.result import RefinementResult
from tests.models import Module, fit, images, loader, mlp
from tests.refinement.following import by_id

LAYERS = ["net.1", "net.5"]
CASES = {
    "adamw": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), {"precision": "64-true"}),
    "adamw in single precision": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), {}),
    "sgd, clipped": (lambda p: SGD(p, lr=0.1, momentum=0.9), {"gradient_clip_val": 0.3}),
    "clipped by value": (lambda p: SGD(p, lr=0.1), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulated": (lambda p: AdamW(p, lr=0.01), {"accumulate_grad_batches": 2}),
}


def run(case, ranks, folder, *, epochs=2, ckpt_path=None):
    """The same global batches of 16 samples, in order, however many ranks share them."""
    make, options = CASES[case]
    module = mlp()
    module.configure_optimizers = lambda: make(module.parameters())
    # Eight steps are planned in any case, so that phases are the same in a run that is stopped half way.
    probe = Probe(num_samples=32, source="train")
    callback = RepresentationRefinement(probe, layers=LAYERS, phases=[2, 5], on_error="raise")
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30)) if ranks > 1 else "auto"
    # Lightning's own sampler would shuffle.
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(images(), ranks, rank, shuffle=False)
    train = loader(64, batch_size=16 // ranks, sampler=sampler)
    options = options | {"use_distributed_sampler": False, "devices": ranks, "strategy": strategy, "max_epochs": epochs}
    trainer = fit(module, callback, train=train, val=False, ckpt_path=ckpt_path, **options)
    found = {
        "parts": {layer: ledger.weights() for layer, ledger in callback.ledger.items()},
        "phases": {layer: ledger.by_phase() for layer, ledger in callback.ledger.items()},
        "samples": {key: torch.as_tensor(column) for key, column in by_id(callback.samples).items()},
        "scalars": callback.scalars,
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
    }
    path = f"{folder}/{case}-{ranks}.ckpt"
    trainer.save_checkpoint(path)
    return found, path


def runs(ranks, folder):
    """Case -> what was found, "resumed": by a run that was stopped half way."""
    found = {case: run(case, ranks, folder)[0] for case in CASES}
    _, path = run("adamw", ranks, folder, epochs=1)
    return found | {"resumed": run("adamw", ranks, folder, ckpt_path=path)[0]}


class TwoOptimizers(Module):
    """Each optimizer moves one of the layers; the ledger of the first layer fails on rank 0 in its second step."""

    def __init__(self):
        super().__init__(mlp().net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [SGD(self.net[number].parameters(), lr=0.1) for number in (1, 5)]


class Breaks(pl.Callback):
    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 0 and trainer.global_step == 2:
            ledger = self.callback.ledger[LAYERS[0]]
            step = ledger.step

            def failing(*args, **options):
                step(*args, **options)
                raise RuntimeError("on this rank")

            ledger.step = failing


def broken():
    """What the ledgers of both layers end with, if one of them fails on one of two ranks."""
    callback, module = RepresentationRefinement(Probe(num_samples=32, source="train"), layers=LAYERS), TwoOptimizers()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30))
    fit(module, callback, Breaks(callback), train=loader(64, batch_size=8), val=False, devices=2, strategy=strategy)
    return {
        "parts": {layer: ledger.weights()["weight"] for layer, ledger in callback.ledger.items()},
        "weights": {layer: module.get_submodule(layer).weight.detach() for layer in LAYERS},
        "results": [layer for layer, result in callback.result.items() if isinstance(result, RefinementResult)],
    }


if __name__ == "__main__":
    results = runs(2, sys.argv[1]) | {"broken": broken()}
    torch.save(results, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
