"""The table of training samples: how much each has refined each layer since training began.

One step changes a layer's weights, and sample i's own part of the change is -rate G_i, with its weight gradient G_i and
rate = learning rate x (gradient that the optimiser used / raw gradient). Its refinement of the layer is the length of
this part, r_i = rate |G_i|, added up over the steps. What momentum and an adaptive optimiser make of the part later is
left out: the table ranks samples, the ledger of the classes is the exact account.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_neuro.refinement.batch import TrainBatch
from lightning_neuro.refinement.norms import gradient_norms

Arrays = dict[str, np.ndarray[Any, Any]]
_PREFIX = "refinement/"


class SampleTable:
    """Refinement of each layer by each training sample, cumulated over the steps.

    It watches training steps as an `Observer`. What is seen is kept as one number a sample until the step is known to
    have happened; nothing waits for the device. Memory: 8 bytes x (layers + 2) x samples, on the model's device.

    A sample's visit counts once a micro-batch, at the first commit of any layer. Gradients of several micro-batches
    before a step add; for a module that is called several times in a pass, the sum of the calls' norms stands for the
    norm of their sum, of which it is an upper bound.

    Args:
        layers: Names of the layers.
        num_samples: Samples in the dataset: ids are 0 ... num_samples - 1. Others are left out and counted.

    Raises:
        ValueError: If there is no layer or no sample.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.batch import TrainBatch
        >>> table = SampleTable(["fc"], num_samples=5)
        >>> batch = TrainBatch(ids=torch.tensor([3, 1]), targets=torch.tensor([0, 1]))
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> table.see("fc", layer, torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.ones(2, 1), batch)
        >>> table.commit("fc", torch.tensor(0.1))
        >>> {name: array.round(2).tolist() for name, array in table.arrays().items()}
        {'sample_id': [1, 3], 'target': [1, 0], 'visits': [1, 1], 'refinement/fc': [0.1, 0.5]}
    """

    def __init__(self, layers: Sequence[str], num_samples: int) -> None:
        if not layers or num_samples < 1:
            raise ValueError(f"layers and num_samples must not be empty; got {list(layers)} and {num_samples}.")
        self.num_samples = num_samples
        # One row more than samples: what has no row of its own goes there, without asking the device which it is.
        self._refinement = {layer: torch.zeros(num_samples + 1, dtype=torch.float64) for layer in layers}
        self._visits = torch.zeros(num_samples + 1, dtype=torch.int64)
        self._targets = torch.full((num_samples + 1,), -1, dtype=torch.int64)
        self._num_nonfinite = torch.zeros((), dtype=torch.int64)
        self._num_without_id = 0
        self._pending: dict[str, list[tuple[TrainBatch, Tensor]]] = {}
        self._counted: WeakSet[TrainBatch] = WeakSet()

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self._refinement)

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        return 8 * (len(self._refinement) + 2) * (self.num_samples + 1)

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Keep the samples' gradient norms until the step is known to have happened."""
        if layer not in self._refinement:
            return
        # A layer that folds tokens into its batch dimension, say, does not tell whose is whose.
        if batch.ids is None or len(batch.ids) != len(inputs):
            self._num_without_id += len(inputs)
        else:
            self._pending.setdefault(layer, []).append((batch, gradient_norms(module, inputs, gradients)))

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add what is pending, times `rate`."""
        for batch, norms in self._pending.pop(layer, ()):
            self._to(norms.device)
            rows = batch.rows(self.num_samples, norms.device)
            values = norms.to(self._refinement[layer].dtype) * rate
            finite = values.isfinite()
            self._refinement[layer].index_add_(0, rows, torch.where(finite, values, 0.0))
            self._num_nonfinite += (~finite).sum()
            if batch not in self._counted:
                self._counted.add(batch)
                self._visits.index_add_(0, rows, torch.ones_like(rows))
                if batch.targets is not None:
                    self._targets.index_copy_(0, rows, batch.targets)

    def drop(self, layer: str) -> None:
        """Forget what is pending."""
        self._pending.pop(layer, None)

    def values(self, layer: str) -> Tensor:
        """The refinement of one layer by each visited sample, in the order of their ids: (visited,)."""
        return self._refinement[layer][:-1][self._visits[:-1] > 0]

    def arrays(self) -> Arrays:
        """The table of the visited samples.

        Returns:
            1-D arrays of one length: `sample_id` (int64), `target` (int64, -1 where unknown), `visits` (int64) and
            `refinement/<layer>` (float64) for each layer, in the order of the ids.
        """
        visited = (self._visits[:-1] > 0).nonzero().flatten()
        columns = {"sample_id": visited, "target": self._targets[visited], "visits": self._visits[visited]}
        columns |= {f"{_PREFIX}{layer}": values[visited] for layer, values in self._refinement.items()}
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def notes(self) -> dict[str, str]:
        """What was left out of the table: kind -> a sentence that the user must be told once."""
        notes = {}
        if outside := int(self._visits[-1]):
            notes["ids"] = f"{outside:,} visits had a sample id outside 0 ... {self.num_samples - 1:,}: left out."
        if nonfinite := int(self._num_nonfinite):
            notes["nonfinite"] = f"{nonfinite:,} per-sample gradients were NaN or infinite: left out."
        if self._num_without_id:
            notes["without_id"] = (
                f"{self._num_without_id:,} per-sample gradients could be given to no sample id: left out."
            )
        return notes

    def merged(self, *others: "SampleTable") -> "SampleTable":
        """The table of several shards of the training: sums, and the larger target where they differ.

        Raises:
            ValueError: If the tables are not of the same layers and number of samples.
        """
        whole = SampleTable(self.layers, self.num_samples)
        whole.load_state_dict(self.state_dict())
        for other in others:
            if (other.layers, other.num_samples) != (self.layers, self.num_samples):
                raise ValueError("the tables must be of the same layers and number of samples.")
            state = other.state_dict()
            for layer, values in state["refinement"].items():
                whole._refinement[layer] += values
            whole._visits += state["visits"]
            whole._num_nonfinite += state["num_nonfinite"]
            whole._num_without_id += state["num_without_id"]
            whole._targets = torch.maximum(whole._targets, state["targets"])
        return whole

    def over_ranks(self, trainer: "pl.Trainer") -> "SampleTable":
        """The table of all ranks, the same on each; every rank must ask."""
        if trainer.world_size == 1:
            return self

        whole = SampleTable(self.layers, self.num_samples)
        whole._refinement = {layer: reduced(trainer, values, "sum") for layer, values in self._refinement.items()}
        whole._visits, whole._targets = reduced(trainer, self._visits, "sum"), reduced(trainer, self._targets, "max")
        whole._num_nonfinite = reduced(trainer, self._num_nonfinite, "sum")
        whole._num_without_id = int(reduced(trainer, torch.tensor(self._num_without_id), "sum"))
        return whole

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, on the CPU; what is pending is not part of it."""
        return {
            "refinement": {layer: values.to("cpu", copy=True) for layer, values in self._refinement.items()},
            "visits": self._visits.to("cpu", copy=True),
            "targets": self._targets.to("cpu", copy=True),
            "num_nonfinite": self._num_nonfinite.to("cpu", copy=True),
            "num_without_id": self._num_without_id,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: If it is of other layers or another number of samples.
        """
        saved = list(state["refinement"]), len(state["visits"]) - 1
        if saved != (self.layers, self.num_samples):
            raise ValueError(
                f"the saved table is of the layers {saved[0]} and {saved[1]} samples; this one of {self.layers} and"
                f" {self.num_samples}."
            )
        self._refinement = {layer: values.clone() for layer, values in state["refinement"].items()}
        self._visits, self._targets = state["visits"].clone(), state["targets"].clone()
        self._num_nonfinite, self._num_without_id = state["num_nonfinite"].clone(), state["num_without_id"]
        self._pending = {}

    def _to(self, device: torch.device) -> None:
        if self._visits.device == device:
            return
        number = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._refinement = {layer: values.to(device, number) for layer, values in self._refinement.items()}
        self._visits, self._targets = self._visits.to(device), self._targets.to(device)
        self._num_nonfinite = self._num_nonfinite.to(device)


def reduced(trainer: "pl.Trainer", tensor: Tensor, reduce_op: str) -> Tensor:
    """The `"sum"` or `"max"` of a tensor over all ranks; every rank must ask."""
    # A copy: the reduction works in place.
    result: Tensor = trainer.strategy.reduce(tensor.to(trainer.strategy.root_device, copy=True), reduce_op=reduce_op)
    return result


def gini(values: Tensor) -> float | None:
    """How unevenly a quantity is spread over its holders.

    Args:
        values: (n,) non-negative numbers.

    Returns:
        0 if all hold the same, up to 1 - 1/n if one holds all; None where there is nothing to hold.

    Example:
        >>> gini(torch.tensor([1.0, 1.0, 1.0, 1.0])), gini(torch.tensor([0.0, 0.0, 0.0, 8.0]))
        (0.0, 0.75)
    """
    ordered = values.double().sort().values if values.device.type != "mps" else values.cpu().double().sort().values
    total, count = float(ordered.sum()), len(ordered)
    if not total > 0:
        return None
    weights = 2 * torch.arange(1, count + 1, device=ordered.device, dtype=torch.float64) - count - 1
    return float((weights * ordered).sum()) / (count * total)


def top_samples(arrays: Mapping[str, Any], layer: str, count: int = 20) -> Arrays:
    """The samples that refined a layer most, the first one first: the same columns, at most `count` long."""
    order = np.argsort(-arrays[f"{_PREFIX}{layer}"], kind="stable")[:count]
    return {name: column[order] for name, column in arrays.items()}


def top_rows(arrays: Mapping[str, Any], layer: str, count: int = 20) -> list[list[object]]:
    """Rows (rank, sample id, target, visits, refinement, its share of the layer's) for a Markdown table."""
    top, total = top_samples(arrays, layer, count), float(arrays[f"{_PREFIX}{layer}"].sum())
    columns = (top["sample_id"], top["target"], top["visits"], top[f"{_PREFIX}{layer}"])
    return [
        [rank, int(sample), int(target) if target >= 0 else "-", int(visits), f"{value:.4g}", f"{value / total:.2%}"]
        for rank, (sample, target, visits, value) in enumerate(zip(*columns, strict=True), start=1)
        if total > 0
    ]


def write_csv(arrays: Mapping[str, Any], path: Path) -> None:
    """Save the table, a row a sample; a file that is there stays whole until the new one is."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(arrays)
        writer.writerows(zip(*(column.tolist() for column in arrays.values()), strict=True))
    temporary.replace(path)
