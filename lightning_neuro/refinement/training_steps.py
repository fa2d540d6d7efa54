"""From backward passes to steps: ledgers and listeners see the gradients, and the optimizer step makes them count."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_neuro.checks import ArgumentError
from lightning_neuro.cost import Cost
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.layer_gradients import Operator, parameters_of, why_unsupported
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.sample_dims import SampleDims
from lightning_neuro.refinement.sources import Sources


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """The samples of a training micro-batch: one object per micro-batch, shared by all layers.

    Attributes:
        ids: (B,) int64 index of each sample in the dataset, on the device of the model; None if it is not known.
        targets: (B,) int64 class labels on the same device; None if the targets are not class labels.
        recorded: Whether the gradients of single samples are looked at in this step.
    """

    ids: Tensor | None = None
    targets: Tensor | None = None
    recorded: bool = True

    def rows(self, num_samples: int, device: torch.device) -> Tensor:
        """The rows of the samples in a table of `num_samples` + 1 rows; the last row is for ids that have none.

        The host does not read the ids, so training need not wait for the device.
        """
        assert self.ids is not None
        ids = self.ids.to(device)
        return torch.where((ids >= 0) & (ids < num_samples), ids, num_samples)


class StepListener(Protocol):
    """Collects something about layers while they are trained: a table of samples, a log of updates.

    What it sees is pending until the optimizer makes the step of the layer (`commit`) or does not (`drop`). None of
    these methods may wait for the device.
    """

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Process one backward pass through a layer.

        Args:
            layer: Name of the layer.
            module: The layer.
            inputs: Its input, (B, ..., in) for linear layers, (B, channels, ...) for convolutions.
            gradients: Gradient of the loss with respect to its output, in the same layout.
            batch: The B samples.
        """

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add the pending data, times `rate`, because the weights of the layer were changed.

        Args:
            layer: Name of the layer.
            rate: Scalar on the device: learning rate x (gradient that the optimizer used / gradient that was seen).
        """

    def drop(self, layer: str) -> None:
        """Discard the pending data, because its gradients were reset."""


class TrainingSteps:
    """Shows each backward pass to ledgers and listeners, and tells them what the optimizer made of it.

    Args:
        hooks: Hooks on the layers.
        ledgers: Layer name -> ledger, for some of the layers.
        listeners: Are shown the backward passes of all layers.
        optimizers: Their steps are followed from now on. What they hold of earlier training is credited to the initial
            weights.
        report: Called with the layer and the error if something fails; no error may reach the training step.
        elementwise: Whether gradients may be changed other than by one common factor before the optimizer uses them.
        world_size: Number of processes that train together.
        mean_over_ranks: Averages a tensor over these processes.
        sample_dims: In which dimension of the layers' inputs the samples lie, as far as it is known.
        cost: Where the time that this takes is added.

    Attributes:
        num_steps: Number of optimizer steps so far.
        broken: Layer -> error, for ledgers that missed a step.

    Raises:
        ArgumentError: If two optimizers move the same layer.
    """

    def __init__(
        self,
        hooks: GradientHooks,
        ledgers: Mapping[str, RefinementLedger],
        listeners: Sequence[StepListener],
        optimizers: Iterable[Optimizer],
        report: Callable[[str, Exception], None],
        *,
        elementwise: bool = False,
        world_size: int = 1,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
        sample_dims: SampleDims | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.cost = Cost() if cost is None else cost
        self.hooks = hooks
        self.ledgers = dict(ledgers)
        self.listeners = list(listeners)
        self.report = report
        self.elementwise = elementwise
        self.world_size = world_size
        self.mean_over_ranks = mean_over_ranks
        self.sample_dims = SampleDims() if sample_dims is None else sample_dims
        self.num_steps = 0
        self.broken: dict[str, Exception] = {}
        self._batch: TrainBatch | None = None
        self._sources: Sources | None = None
        optimizers = list(optimizers)
        self._require_one_optimizer(optimizers)
        for optimizer in optimizers:
            for ledger in self.ledgers.values():
                ledger.start(optimizer)
        self._handles = [optimizer.register_step_post_hook(self._stepped) for optimizer in optimizers]
        hooks.deliver_to(self)

    def begin(self, batch: TrainBatch | None, sources: Sources) -> None:
        """Start a training micro-batch, which is about to run."""
        self._batch = batch or TrainBatch()
        self._sources = sources
        self.hooks.idle = set() if self._batch.recorded else self.hooks.layers.keys() - self.ledgers.keys()
        self.hooks.tracing = True

    def end(self) -> None:
        """Finish the training micro-batch."""
        self._batch = self._sources = None
        self.hooks.stop_tracing()

    def remove(self) -> None:
        """Remove the hooks from layers and optimizers."""
        self.hooks.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end()

    def see(self, layer: str, module: Operator, inputs: Tensor, gradients: Tensor) -> None:
        """Show one backward pass through one call of a layer to its ledger and to the listeners."""
        if self._batch is None or self._sources is None:
            return
        if reason := why_unsupported(module):  # since the run began
            self.drop(layer)
            if layer not in self.broken:
                self.broken[layer] = ValueError(f"In this run, {reason}")
                self.report(layer, self.broken[layer])
            return
        with self.cost.timing("step"):
            try:
                num_samples = len(self._sources.rows)
                inputs, gradients = self.sample_dims.samples_first(layer, module, inputs, gradients, num_samples)
                if layer in self.ledgers:
                    self.ledgers[layer].see(module, inputs, gradients, self._sources)
                for listener in self.listeners:
                    listener.see(layer, module, inputs, gradients, self._batch)
            except Exception as error:
                self.report(layer, error)

    def drop(self, layer: str) -> None:
        """Discard the pending data of a layer, because its gradients did not reach the optimizer."""
        if layer in self.ledgers:
            self.ledgers[layer].drop()
        for listener in self.listeners:
            listener.drop(layer)

    def _require_one_optimizer(self, optimizers: Sequence[Optimizer]) -> None:
        for layer, ledger in self.ledgers.items():
            mine = {id(parameter) for parameter in parameters_of(ledger.module).values()}
            if sum(bool(mine & _learning_rates(optimizer).keys()) for optimizer in optimizers) > 1:
                raise ArgumentError(
                    f"`layers` must not contain a layer that two optimizers update, because their steps cannot be"
                    f" distinguished; got '{layer}'. Leave this layer out."
                )

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad(), self.cost.timing("step"):
            self._follow(optimizer)

    def _follow(self, optimizer: Optimizer) -> None:
        """Repeat a step of an optimizer."""
        rates = _learning_rates(optimizer)
        if _was_skipped(optimizer):
            for layer, owners in self.hooks.layers.items():
                if any(id(parameter) in rates for parameter in parameters_of(owners[0]).values()):
                    self.drop(layer)
            return
        self.num_steps += 1
        scale = self._step_ledgers(optimizer)
        for layer, owners in self.hooks.layers.items():
            weight = owners[0].weight
            if id(weight) in rates and weight.grad is not None:
                # Clipping and unscaling are the same for all layers, so the factor of one ledger holds for all of them.
                factor = torch.ones((), device=weight.device) if scale is None else scale
                # The gradient of a sample is for the mean over its rank; the optimizer used the mean over all ranks.
                self._commit(layer, rates[id(weight)] * (factor / self.world_size))

    def _step_ledgers(self, optimizer: Optimizer) -> Tensor | None:
        """Repeat the step in all ledgers; returns the factor by which the gradients were multiplied, if known."""
        scale: Tensor | None = None
        for layer, ledger in self.ledgers.items():
            try:
                # Not on the steps of other optimizers: the ranks on which this ledger works do not wait for it there.
                if not ledger.is_moved_by(optimizer):
                    continue
                if layer in self.broken:
                    ledger.join(self.mean_over_ranks)
                    continue
                own = ledger.step(optimizer, elementwise=self.elementwise, mean_over_ranks=self.mean_over_ranks)
            except Exception as error:
                self.broken[layer] = error
                self.report(layer, error)
                continue
            if own is not None:  # it is 0 if the gradient was 0, and then carries no information
                scale = torch.where(own != 0, own, torch.ones_like(own) if scale is None else scale)
        return scale

    def _commit(self, layer: str, rate: Tensor) -> None:
        for listener in self.listeners:
            try:
                listener.commit(layer, rate)
            except Exception as error:
                self.report(layer, error)


def _learning_rates(optimizer: Optimizer) -> dict[int, Any]:
    return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skipped the step inside its kernel, because a gradient scaler found infinite gradients.

    Only in this case the host waits for the device.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
