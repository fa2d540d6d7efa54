"""Run by test_ranks.py in two processes: sample ids under DDP, and the table of both ranks."""

import sys
from datetime import timedelta

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import WeightedRandomSampler

from lightning_neuro.refinement.influence_table import InfluenceTable
from lightning_neuro.refinement.sample_table import SampleTable
from lightning_neuro.refinement.training_steps import TrainBatch
from tests.models import mlp
from tests.refinement.test_sample_ids import N, Watch, data

LOADERS = {
    "shuffled": lambda: data(shuffle=True),
    "workers": lambda: data(shuffle=True, num_workers=2, persistent_workers=True),
    "sampler of one's own": lambda: data(sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), 30)),
}


class Tabled(Watch):
    """Watches, and gives each sample its id as the gradient norm of a layer with one weight."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.table = getattr(self, "table", None) or SampleTable(["a"], N)
        ids = torch.tensor(self.found[-1])
        layer = torch.nn.Linear(1, 1, bias=False)
        self.table.see("a", layer, ids[:, None].float(), torch.ones(len(ids), 1), TrainBatch(ids, ids % 4))
        self.table.commit("a", torch.tensor(0.5))

    def on_train_end(self, trainer, pl_module):
        self.whole = self.table.over_ranks(trainer).arrays()
        # One rank alone has seen something, then each something of its own.
        layer = torch.nn.Linear(1, 1, bias=False)
        live, self.scores = InfluenceTable("a", layer, 4, direction=torch.ones(1, 1)), []
        self.scores.append(live.over_ranks(trainer).scores().tolist())
        live.refresh(torch.ones(1, 1))
        for rank in range(2):
            if trainer.global_rank == rank:
                who = TrainBatch(torch.tensor([rank, 3]), torch.tensor([rank, 2]))
                live.see("a", layer, torch.ones(2, 1), -torch.ones(2, 1), who)
                live.commit("a", torch.tensor(1.0 + rank))
            whole = live.over_ranks(trainer)
            self.scores.append(
                [whole.scores().tolist(), whole.top(4).sample_ids.tolist(), whole.top(4).targets.tolist()]
            )


def main(folder: str) -> None:
    """Write what each rank found."""
    results = {}
    for name, train in LOADERS.items():
        watch = Tabled()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            max_epochs=2,
            callbacks=[watch],
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30)),
            **quiet,
        )
        trainer.fit(mlp(), train())
        whole = {key: column.tolist() for key, column in watch.whole.items()}
        results[name] = {"found": watch.found, "truth": watch.truth, "whole": whole, "num_samples": watch.num_samples}
        results[name]["scores"] = watch.scores
    torch.save(results, f"{folder}/{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
