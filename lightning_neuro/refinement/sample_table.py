"""The table of training samples: how much each of them has refined each layer since training began.

A step changes the weights of a layer; the part of the change that sample i caused is -rate G_i, where G_i is its weight
gradient and rate = learning rate x (gradient that the optimizer used / raw gradient). Its refinement of the layer is
the length of this part, r_i = rate |G_i|, summed over the steps. The effect of this part on later steps, through
momentum or adaptive learning rates, is not included: the table ranks samples; exact contributions are in the ledgers.

If only some steps are recorded, the sum over all visits of a sample is estimated by the mean over its recorded visits
times the number of its visits. Samples without a recorded visit are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError, check_int, require
from lightning_neuro.ranks import over_ranks, reduced
from lightning_neuro.refinement.sample_norms import gradient_norms
from lightning_neuro.refinement.sources import ledger_dtype
from lightning_neuro.refinement.training_steps import TrainBatch

Arrays = dict[str, np.ndarray[Any, Any]]
PREFIX = "refinement/"
"""First part of the names of the columns that hold the refinement of a layer."""


class SampleTable:
    """Accumulates over training how much each sample refined each layer.

    It is a `StepListener` of training steps. Until the optimizer makes its step, one number per sample is kept; nothing
    waits for the device. Memory: 8 bytes x (layers + 3) x samples, on the device of the model.

    A sample is counted as visited once per micro-batch, when the first of the layers is committed. Gradients of several
    micro-batches before a step add up. If a module is called several times in a pass, the sum of the norms of its calls
    is used for the norm of their sum; it is an upper bound.

    Args:
        layers: Names of the layers.
        num_samples: Number of samples in the dataset: ids are 0 ... num_samples - 1. Others are left out and counted.

    Raises:
        ArgumentError: If there is no layer or no sample.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.training_steps import TrainBatch
        >>> table = SampleTable(["fc"], num_samples=5)
        >>> batch = TrainBatch(ids=torch.tensor([3, 1]), targets=torch.tensor([0, 1]))
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> table.see("fc", layer, torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.ones(2, 1), batch)
        >>> table.commit("fc", torch.tensor(0.1))
        >>> {name: array.round(2).tolist() for name, array in table.arrays().items()}
        {'sample_id': [1, 3], 'target': [1, 0], 'visits': [1, 1], 'recorded': [1, 1], 'refinement/fc': [0.1, 0.5]}
    """

    def __init__(self, layers: Sequence[str], num_samples: int) -> None:
        require(len(layers) > 0, "layers", "hold at least one name", layers)
        check_int("num_samples", num_samples, minimum=1)
        self.num_samples = num_samples
        # One more row than samples, for ids that have no row, so that the host never has to read the ids.
        self._refinement = {layer: torch.zeros(num_samples + 1, dtype=torch.float64) for layer in layers}
        self._visits = torch.zeros(num_samples + 1, dtype=torch.int64)
        self._recorded = torch.zeros(num_samples + 1, dtype=torch.int64)
        self._targets = torch.full((num_samples + 1,), -1, dtype=torch.int64)
        self._num_nonfinite = torch.zeros((), dtype=torch.int64)
        self._num_without_id = 0
        self._pending: dict[str, list[tuple[TrainBatch, Tensor | None]]] = {}
        self._counted: WeakSet[TrainBatch] = WeakSet()

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self._refinement)

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        return 8 * (len(self._refinement) + 3) * (self.num_samples + 1)

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Keep the gradient norms of the samples until the optimizer makes its step."""
        if layer not in self._refinement:
            return
        # For example, if tokens are folded into the batch dimension, it is not known to which sample each belongs.
        if batch.ids is None or len(batch.ids) != len(inputs):
            self._num_without_id += len(inputs)
        else:
            norms = gradient_norms(module, inputs, gradients) if batch.recorded else None
            self._pending.setdefault(layer, []).append((batch, norms))

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add the pending norms, times `rate`."""
        for batch, norms in self._pending.pop(layer, ()):
            self._move(rate.device)
            rows = batch.rows(self.num_samples, rate.device)
            if norms is not None:
                values = norms.to(self._refinement[layer].dtype) * rate
                finite = values.isfinite()
                self._refinement[layer].index_add_(0, rows, torch.where(finite, values, 0.0))
                self._num_nonfinite += (~finite).sum()
            if batch not in self._counted:
                self._count(batch, rows)

    def _count(self, batch: TrainBatch, rows: Tensor) -> None:
        self._counted.add(batch)
        once = torch.ones_like(rows)
        self._visits.index_add_(0, rows, once)
        if batch.recorded:
            self._recorded.index_add_(0, rows, once)
        if batch.targets is not None:
            self._targets.index_copy_(0, rows, batch.targets)

    def drop(self, layer: str) -> None:
        """Discard the pending norms."""
        self._pending.pop(layer, None)

    def values(self, layer: str) -> Tensor:
        """How much each recorded sample refined one layer over its visits, in the order of their ids: (recorded,)."""
        found = self._recorded[:-1] > 0
        return self._refinement[layer][:-1][found] * (self._visits[:-1][found] / self._recorded[:-1][found])

    def arrays(self) -> Arrays:
        """The table of the samples with a recorded visit.

        Returns:
            1-D arrays of the same length: `sample_id` (int64), `target` (int64, -1 where unknown), `visits` (int64),
            `recorded` (int64, visits in recorded steps) and `refinement/<layer>` (float64, over all visits) for each
            layer, in the order of the ids.
        """
        found = (self._recorded[:-1] > 0).nonzero().flatten()
        counts = {"target": self._targets, "visits": self._visits, "recorded": self._recorded}
        columns = {"sample_id": found} | {name: values[found] for name, values in counts.items()}
        columns |= {f"{PREFIX}{layer}": self.values(layer) for layer in self._refinement}
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def notes(self) -> dict[str, str]:
        """Kind -> a warning about what was left out of the table, shown once."""
        notes = {}
        if outside := int(self._visits[-1]):
            notes["ids"] = (
                f"{outside:,} visits had a sample id outside 0 ... {self.num_samples - 1:,} and are left out."
            )
        if nonfinite := int(self._num_nonfinite):
            notes["nonfinite"] = f"{nonfinite:,} per-sample gradients were NaN or infinite and are left out."
        if self._num_without_id:
            notes["without_id"] = (
                f"{self._num_without_id:,} per-sample gradients could not be assigned to a sample id and are left out."
            )
        return notes

    def over_ranks(self, trainer: "pl.Trainer") -> "SampleTable":
        """The table of all ranks (sums, and the larger target), the same on each of them. Call it on every rank."""
        if trainer.world_size == 1:
            return self
        whole = SampleTable(self.layers, self.num_samples)
        whole._refinement = {layer: reduced(trainer, values, "sum") for layer, values in self._refinement.items()}
        whole._visits = reduced(trainer, self._visits, "sum")
        whole._recorded = reduced(trainer, self._recorded, "sum")
        whole._targets = reduced(trainer, self._targets, "max")
        whole._num_nonfinite = reduced(trainer, self._num_nonfinite, "sum")
        whole._num_without_id = over_ranks(trainer, self._num_without_id, "sum")
        return whole

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, on the CPU, without the pending norms."""
        return {
            "refinement": {layer: values.to("cpu", copy=True) for layer, values in self._refinement.items()},
            "visits": self._visits.to("cpu", copy=True),
            "recorded": self._recorded.to("cpu", copy=True),
            "targets": self._targets.to("cpu", copy=True),
            "num_nonfinite": self._num_nonfinite.to("cpu", copy=True),
            "num_without_id": self._num_without_id,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned.

        Raises:
            ArgumentError: If it belongs to other layers or to another number of samples.
        """
        saved = list(state["refinement"]), len(state["visits"]) - 1
        if saved != (self.layers, self.num_samples):
            raise ArgumentError(
                f"The saved table must have the layers {self.layers} and {self.num_samples} samples; got {saved[0]} and"
                f" {saved[1]} samples."
            )
        self._refinement = {layer: values.clone() for layer, values in state["refinement"].items()}
        self._visits = state["visits"].clone()
        self._recorded = state.get("recorded", state["visits"]).clone()
        self._targets = state["targets"].clone()
        self._num_nonfinite = state["num_nonfinite"].clone()
        self._num_without_id = state["num_without_id"]
        self._pending = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not follow the training of the original; a WeakSet cannot be pickled.
        return {name: value for name, value in vars(self).items() if name != "_counted"} | {"_pending": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._counted = WeakSet()

    def _move(self, device: torch.device) -> None:
        if self._visits.device == device:
            return
        self._refinement = {
            layer: values.to(device, ledger_dtype(device)) for layer, values in self._refinement.items()
        }
        self._visits = self._visits.to(device)
        self._recorded = self._recorded.to(device)
        self._targets = self._targets.to(device)
        self._num_nonfinite = self._num_nonfinite.to(device)


def gini(values: Tensor) -> float:
    """Gini coefficient: how unevenly a quantity is distributed.

    Args:
        values: (n,) non-negative numbers.

    Returns:
        0 if all numbers are equal, up to 1 - 1/n if only one is positive; NaN if none is.

    Example:
        >>> gini(torch.tensor([1.0, 1.0, 1.0, 1.0])), gini(torch.tensor([0.0, 0.0, 0.0, 8.0]))
        (0.0, 0.75)
    """
    ordered = values.to(ledger_dtype(values.device)).sort().values
    total, count = float(ordered.sum()), len(ordered)
    if not total > 0:
        return float("nan")
    weights = 2 * torch.arange(1, count + 1, device=ordered.device, dtype=ordered.dtype) - count - 1
    return float((weights * ordered).sum()) / (count * total)
