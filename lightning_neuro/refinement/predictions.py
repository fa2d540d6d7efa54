"""The table of predictions: how the network classified each training sample while it was trained.

The training steps compute the logits of every sample anyway. From the input of the classifier head they are computed
once more, which costs one product with the weight of the head, and kept as a few numbers per sample: the sum of its
cross-entropies over all visits, the class predicted at the last one, and a vote for the likeliest class besides its
label. The finished network may have memorised a wrong label; at early visits it had not, so the sum and the vote still
tell.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_neuro.checks import ArgumentError
from lightning_neuro.ranks import reduced
from lightning_neuro.refinement.layer_gradients import layer_output, parameters_of
from lightning_neuro.refinement.sources import ledger_dtype
from lightning_neuro.refinement.training_steps import TrainBatch

# Largest sum of a gradient over the classes, relative to that of its absolute values; half precision needs this much.
_ROUNDING = 0.02
# Fraction of the samples that may not have the gradient of a cross-entropy.
_UNLIKE = 0.05
# Attributes that are saved, without their leading underscore.
_SUMS = ("losses", "visits", "unlike")
_LATEST = ("predicted", "suggested", "votes", "visited_at")
_STATE = (*_SUMS, *_LATEST)


class PredictionTable:
    """Collects the loss and the predicted class of each training sample over its visits.

    It is a `StepListener` of the training steps of the classifier head, and does not wait for the device. The columns
    are only available if the head was trained with a cross-entropy over its outputs: then the gradient of each sample
    sums to 0 over the classes. A head with one output is that of a binary cross-entropy.

    The suggested class is elected over the visits: at each, the likeliest class besides the label gets a vote of the
    size of its probability. The class with more than half of all votes is found with one counter per sample (R. S.
    Boyer, J. S. Moore, *MJRTY*, 1991), so that no number per class is needed.

    Args:
        layer: Name of the classifier head, a linear layer.
        num_samples: Number of samples in the dataset: ids are 0 ... num_samples - 1.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> _ = head.weight.data.copy_(torch.eye(2))
        >>> logits, targets = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([0, 1])
        >>> gradients = logits.softmax(1) - torch.eye(2)[targets]
        >>> table = PredictionTable("head", num_samples=5)
        >>> table.see("head", head, logits, gradients, TrainBatch(torch.tensor([3, 1]), targets))
        >>> table.commit("head", torch.tensor(0.1))
        >>> {name: column.round(2).tolist() for name, column in table.columns(np.array([1, 3])).items()}
        {'predicted': [0, 1], 'suggested': [0, 1], 'loss': [0.69, 2.13]}
    """

    def __init__(self, layer: str, num_samples: int) -> None:
        self.layer = layer
        self.num_samples = num_samples
        # One more row than samples, for ids that have no row, so that the host never has to read the ids.
        self._losses = torch.zeros(num_samples + 1, dtype=torch.float64)
        self._visits = torch.zeros(num_samples + 1, dtype=torch.int64)
        self._predicted = torch.full((num_samples + 1,), -1, dtype=torch.int64)
        self._visited_at = torch.zeros(num_samples + 1, dtype=torch.int64)
        self._suggested = torch.full((num_samples + 1,), -1, dtype=torch.int64)
        self._votes = torch.zeros(num_samples + 1, dtype=torch.float64)
        self._unlike = torch.zeros((), dtype=torch.int64)
        self._num_commits = 0
        self._pending: list[tuple[TrainBatch, Tensor, Tensor]] = []

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        return 48 * (self.num_samples + 1)

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Keep the logits of the samples until the optimizer makes its step."""
        known = batch.ids is not None and batch.targets is not None and len(batch.ids) == len(inputs)
        if layer != self.layer or not known or inputs.ndim != 2:
            return
        parameters = parameters_of(module)  # type: ignore[arg-type]
        logits = layer_output(
            module,  # type: ignore[arg-type]
            inputs.to(parameters["weight"].dtype),
            parameters["weight"].detach(),
            parameters["bias"].detach() if "bias" in parameters else None,
        )
        self._pending.append((batch, logits, gradients))

    def commit(self, layer: str, rate: Tensor) -> None:
        """Count the pending predictions."""
        if layer != self.layer:
            return
        self._num_commits += 1
        for batch, logits, gradients in self._pending:
            self._move(rate.device)
            self._count(batch, logits, gradients)
        self._pending = []

    def drop(self, layer: str) -> None:
        """Discard the pending predictions."""
        self._pending = [] if layer == self.layer else self._pending

    def _count(self, batch: TrainBatch, logits: Tensor, gradients: Tensor) -> None:
        assert batch.targets is not None
        logits, gradients = logits.float(), gradients.float()
        if logits.shape[1] == 1:
            logits, gradients = (torch.cat([-part / 2, part / 2], 1) for part in (logits, gradients))
        rows = batch.rows(self.num_samples, logits.device)
        fits = gradients.sum(1).abs() <= _ROUNDING * gradients.abs().sum(1)
        fits &= (batch.targets >= 0) & (batch.targets < logits.shape[1]) & logits.isfinite().all(1)
        targets = batch.targets.clamp(0, logits.shape[1] - 1)
        losses = cross_entropy(logits, targets, reduction="none").to(self._losses.dtype)
        self._losses.index_add_(0, rows, torch.where(fits, losses, 0.0))
        self._visits.index_add_(0, rows, fits.long())
        self._unlike += (~fits).sum()
        self._predicted.index_copy_(0, rows, torch.where(fits, logits.argmax(1), self._predicted[rows]))
        self._visited_at.index_fill_(0, rows, self._num_commits)
        others = logits.softmax(1).to(self._votes.dtype).scatter(1, targets[:, None], 0.0)
        weights, likeliest = torch.where(fits[:, None], others, 0.0).max(1)
        votes, leading = self._votes[rows], self._suggested[rows]
        votes = torch.where(leading == likeliest, votes + weights, votes - weights)
        self._suggested.index_copy_(0, rows, torch.where(votes < 0, likeliest, leading))
        self._votes.index_copy_(0, rows, votes.abs())

    def columns(self, ids: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The predictions for some samples.

        Args:
            ids: (n,) ids of the samples.

        Returns:
            `predicted` (int64, the class predicted at the last visit), `suggested` (int64, the likeliest class besides
            the label over all visits), each -1 where unknown, and `loss` (float64, mean cross-entropy over the visits,
            NaN where unknown); empty if the head was not trained with a cross-entropy.
        """
        visits, unlike = int(self._visits.sum()), int(self._unlike)
        if not visits or unlike > _UNLIKE * (visits + unlike):
            return {}
        losses = self._losses.cpu() / self._visits.cpu()  # NaN without a visit
        found = {"predicted": self._predicted.cpu(), "suggested": self._suggested.cpu(), "loss": losses}
        return {name: column.numpy()[ids] for name, column in found.items()}

    def over_ranks(self, trainer: "pl.Trainer") -> "PredictionTable":
        """The sums of all ranks, and what the rank knows that visited a sample last. Call it on every rank."""
        if trainer.world_size == 1:
            return self
        whole = PredictionTable(self.layer, self.num_samples)
        whole._num_commits = self._num_commits
        for name in _SUMS:
            setattr(whole, f"_{name}", reduced(trainer, getattr(self, f"_{name}"), "sum"))
        latest = reduced(trainer, self._visited_at, "max").to(self._visited_at.device) == self._visited_at
        for name in _LATEST:
            mine = torch.where(latest, getattr(self, f"_{name}"), -1)
            setattr(whole, f"_{name}", reduced(trainer, mine, "max"))
        return whole

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, on the CPU."""
        tensors = {name: getattr(self, f"_{name}").to("cpu", copy=True) for name in _STATE}
        return tensors | {"layer": self.layer, "num_commits": self._num_commits}

    def load_state_dict(self, state: Mapping[str, Any], *, sums: bool = True) -> None:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned.
            sums: Whether to continue the sums, too, which only one rank may.

        Raises:
            ArgumentError: If it belongs to another layer or to another number of samples.
        """
        saved = state["layer"], len(state["visits"]) - 1
        if saved != (self.layer, self.num_samples):
            raise ArgumentError(
                f"The saved predictions must be those of layer '{self.layer}' for {self.num_samples} samples; got"
                f" '{saved[0]}' and {saved[1]} samples."
            )
        for name in _STATE:
            if sums or name not in _SUMS:
                setattr(self, f"_{name}", state[name].clone())
        self._num_commits = state["num_commits"]
        self._pending = []

    def _move(self, device: torch.device) -> None:
        if self._visits.device == device:
            return
        for name in _STATE:
            tensor = getattr(self, f"_{name}")
            setattr(self, f"_{name}", tensor.to(device, ledger_dtype(device) if tensor.is_floating_point() else None))
