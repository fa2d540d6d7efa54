"""The table of influence: what each training sample did to the outputs for a few fixed inputs, summed over training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError
from lightning_neuro.ranks import over_ranks, reduced
from lightning_neuro.refinement.influence import (
    Influence,
    check_direction,
    direction_name,
    directions,
    influence_scores,
    output_changes,
    strongest,
)
from lightning_neuro.refinement.layer_gradients import parameters_of
from lightning_neuro.refinement.options import Direction
from lightning_neuro.refinement.sources import ledger_dtype
from lightning_neuro.refinement.traced_layers import require_linear
from lightning_neuro.refinement.training_steps import TrainBatch


class InfluenceTable:
    """Accumulates the influence of each training sample on a few fixed inputs while the network trains.

    It is a `StepListener` of the training steps of one linear layer. Every few steps, `refresh` must be called with the
    current input h_t of the layer for the probe samples; all that is seen until the next call is scored against it.
    Before the first call nothing is scored.

    The table sums the whole c_i, vectors in the output of the layer, and the direction is chosen when scores are
    requested. Sums along the current direction of each step would be of little use, because this direction changes much
    during training: on digits, their rank correlation with scores along the final direction is .65 to .74, and that of
    the vectors .98 to .99.

    Args:
        layer: Name of the layer.
        module: The `nn.Linear`, with its weights before training, from which the refinement is measured.
        num_samples: Number of samples in the dataset: ids are 0 ... num_samples - 1. Others are left out.
        direction: Default direction of `scores` and `top`, see there. Or directions, (Q, ..., out): then only the
            components along them are summed, for layers that are too wide to keep vectors.

    Raises:
        ArgumentError: If the layer is not linear, or the direction is unknown.
    """

    def __init__(
        self, layer: str, module: nn.Module, num_samples: int, *, direction: Direction | Tensor = "contrast"
    ) -> None:
        check_direction(direction)
        self.layer = layer
        self.module = require_linear(layer, module, "module")
        self.num_samples = num_samples
        self.direction = direction
        self._initial = [parameter.detach().clone() for parameter in self._weights()]
        self._probe: Tensor | None = None
        self._centre: Tensor | None = None
        self._sums: Tensor | None = None
        self._classes = torch.full((num_samples + 1,), -1, dtype=torch.int64)
        self._seen = torch.zeros(num_samples + 1, dtype=torch.bool)
        self._pending: list[tuple[TrainBatch, Tensor]] = []

    def num_bytes(self, num_inputs: int) -> int:
        """Memory on the device for a number of inputs with one position each."""
        return (self.num_samples + 1) * (
            8 * num_inputs * (1 if isinstance(self.direction, Tensor) else self.module.out_features) + 9
        )

    def refresh(self, probe_inputs: Tensor, centre: Tensor | None = None) -> None:
        """From now on, score against these inputs of the layer.

        Args:
            probe_inputs: (Q, in) or (Q, ..., in).
            centre: (in,) mean input of the layer, for the direction "centred"; default: that of these inputs.
        """
        self._centre = None if centre is None else centre.detach().to(self.module.weight, copy=True)
        self._probe = probe_inputs.detach().to(self.module.weight, copy=True)

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Score the samples, and keep the scores until the optimizer makes its step."""
        if layer != self.layer or self._probe is None or batch.ids is None or len(batch.ids) != len(inputs):
            return
        bias = self.module.bias is not None
        if isinstance(self.direction, Tensor):
            moved = influence_scores(inputs, gradients, self._probe, self.direction.to(self._probe), bias=bias)
        else:
            moved = output_changes(inputs, gradients, self._probe, bias=bias).flatten(1)
        self._pending.append((batch, moved))

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add the pending scores, times `rate`."""
        if layer != self.layer:
            return
        for batch, moved in self._pending:
            sums = self._sums_for(moved)
            rows = batch.rows(self.num_samples, sums.device)
            values = moved.to(sums.dtype) * rate
            sums.index_add_(0, rows, torch.where(values.isfinite(), values, 0.0))
            self._seen.index_fill_(0, rows, True)
            if batch.targets is not None:
                self._classes.index_copy_(0, rows, batch.targets)
        self._pending = []

    def drop(self, layer: str) -> None:
        """Discard the pending scores."""
        self._pending = [] if layer == self.layer else self._pending

    def scores(self, direction: Direction | Tensor | None = None, *, targets: Tensor | None = None) -> Tensor:
        """The scores so far.

        Args:
            direction: "contrast": between the class of each input and its current strongest rival, for the classifier
                head; "refinement": along W_t h_t - W_0 h_t, with the current weights and the latest inputs; "centred":
                along (W_t - W_0) (h_t - mean h_t), what of it sets the input apart; or a tensor, (Q, ..., out),
                which is not normalised. Default: the direction of the table; if that is a tensor, it is the only
                direction available.
            targets: (Q,) classes of the inputs, for "contrast"; default: the currently predicted classes.

        Returns:
            (num_samples, Q) float64, 0 for samples that were not seen; (num_samples, 0) before any was.

        Raises:
            ArgumentError: If the direction is unknown or does not fit the layer.
        """
        direction = self.direction if direction is None or isinstance(self.direction, Tensor) else direction
        check_direction(direction)
        if self._sums is None or self._probe is None:
            return torch.zeros(self.num_samples, 0, dtype=torch.float64)
        if isinstance(self.direction, Tensor):
            return self._sums[:-1]
        with torch.no_grad():
            # Not by calling the module, whose hooks would deliver the call.
            along = directions(self._probe, self._weights(), self._initial, direction, targets, self._centre)
            along = along.to(self._sums).flatten(1)
        return (self._sums[:-1].view(self.num_samples, *along.shape) * along).sum(2)

    def top(
        self, top_k: int = 10, direction: Direction | Tensor | None = None, *, targets: Tensor | None = None
    ) -> Influence | None:
        """The strongest of the samples seen so far; arguments as in `scores`. None if no sample has been seen."""
        seen = self._seen[:-1].nonzero().flatten()
        if self._sums is None or not len(seen):
            return None
        scores = self.scores(direction, targets=targets)[seen]
        direction = self.direction if direction is None or isinstance(self.direction, Tensor) else direction
        found = strongest(scores, seen, self._classes[seen], top_k=top_k, direction=direction_name(direction))
        if direction != "contrast" or self._probe is None:
            return found
        with torch.no_grad():
            logits = nn.functional.linear(self._probe, *self._weights())
        return replace(found, predictions=logits.argmax(1).cpu())

    def over_ranks(self, trainer: "pl.Trainer") -> "InfluenceTable":
        """The scores of all ranks, the same on each of them. Call it on every rank."""
        if trainer.world_size == 1:
            return self
        # A rank that has not seen anything yet must take part too, or the others would wait for it forever.
        width = over_ranks(trainer, 0 if self._sums is None else self._sums.shape[1], "max")
        if not width:
            return self
        sums = torch.zeros(self.num_samples + 1, width, dtype=torch.float64) if self._sums is None else self._sums
        whole = InfluenceTable(self.layer, self.module, self.num_samples, direction=self.direction)
        whole._initial = self._initial
        whole._probe = self._probe
        whole._centre = self._centre
        whole._sums = reduced(trainer, sums, "sum")
        whole._classes = reduced(trainer, self._classes, "max")
        whole._seen = reduced(trainer, self._seen.long(), "sum") > 0
        return whole

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, on the CPU."""
        tensors = {"classes": self._classes, "seen": self._seen}
        tensors |= {} if self._sums is None else {"sums": self._sums}
        tensors |= {} if self._probe is None else {"probe_inputs": self._probe}
        tensors |= {} if self._centre is None else {"centre": self._centre}
        tensors |= {f"initial{number}": parameter for number, parameter in enumerate(self._initial)}
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned.

        Raises:
            ArgumentError: If it belongs to another layer or to another number of samples.
        """
        initial = [state[f"initial{number}"] for number in range(len(self._initial)) if f"initial{number}" in state]
        same = [part.shape for part in initial] == [part.shape for part in self._initial]
        if not same or len(state["seen"]) != self.num_samples + 1:
            raise ArgumentError(
                f"The saved scores must be those of layer '{self.layer}' with its shape, and of {self.num_samples}"
                f" samples; got {len(state['seen']) - 1} samples."
            )
        device = self.module.weight.device
        moved = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
        self._initial = [moved[f"initial{number}"] for number in range(len(initial))]
        self._classes = moved["classes"]
        self._seen = moved["seen"]
        self._sums = moved.get("sums")
        self._probe = moved.get("probe_inputs")
        self._centre = moved.get("centre")
        self._pending = []

    def _weights(self) -> list[Tensor]:
        return list(parameters_of(self.module).values())

    def _sums_for(self, moved: Tensor) -> Tensor:
        device = moved.device
        if self._sums is None:
            shape = self.num_samples + 1, moved.shape[1]
            self._sums = torch.zeros(shape, dtype=ledger_dtype(device), device=device)
        if self._classes.device != device or self._sums.device != device:
            self._sums = self._sums.to(device, ledger_dtype(device))
            self._classes = self._classes.to(device)
            self._seen = self._seen.to(device)
        return self._sums
