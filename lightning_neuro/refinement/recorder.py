"""Brings ledgers and those who watch samples through training: seen in backward passes, settled by the step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_neuro.layers import LINEAR_OR_CONV, named_layers, resolve_layers
from lightning_neuro.refinement.batch import Observer, TrainBatch
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.operators import (
    OPERATORS,
    Operator,
    Sources,
    parameters_of,
    samples_first,
    why_unsupported,
)
from lightning_neuro.refinement.taps import GradientTaps

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def find_layers(
    model: nn.Module, patterns: str | Sequence[str] | None, argument: str = "layers"
) -> dict[str, list[Operator]]:
    """The layers to trace, each with all modules that share its weight.

    Args:
        model: The model.
        patterns: Names or globs; None for the classifier head, the last linear or convolution layer.
        argument: What to call them in errors.

    Raises:
        MisconfigurationException: For a layer named in full that cannot be traced (a glob leaves it out), or no layer.
    """
    layers = named_layers(model)
    if patterns is None:
        heads = [name for name, module in layers.items() if isinstance(module, LINEAR_OR_CONV) and _is_trained(module)]
        if not heads:
            raise MisconfigurationException(
                f"{type(model).__name__} has no linear or convolution layer whose refinement could be traced. Name the"
                " layers: `RepresentationRefinement(layers=...)`."
            )
        patterns = heads[-1]
    named = {patterns} if isinstance(patterns, str) else set(patterns)
    chosen: dict[str, list[Operator]] = {}
    reasons: dict[str, str] = {}
    for name, module in resolve_layers(model, patterns).items():
        owners = [other for other in layers.values() if _shares_weight(other, module)]
        if reason := why_unsupported(module) or _why_not_with(owners):
            reasons[name] = reason
        else:
            chosen[name] = owners  # type: ignore[assignment]
    for name, reason in reasons.items():
        if name in named or not chosen:
            raise MisconfigurationException(f"`{argument}` names '{name}', which cannot be traced: {reason}.")
    return chosen


def _is_trained(module: nn.Module) -> bool:
    return not why_unsupported(module) and any(parameter.requires_grad for parameter in module.parameters())


def _shares_weight(other: nn.Module, module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and other._parameters.get("weight") is weight


def _why_not_with(owners: Sequence[nn.Module]) -> str:
    """Why a weight cannot be traced that these modules share, or an empty string."""
    for owner in owners:
        if not isinstance(owner, OPERATORS):
            return f"it shares its weight with a module of type {type(owner).__name__}, which cannot be followed"
        if any(getattr(owner, name, None) != getattr(owners[0], name, None) for name in _GEOMETRY):
            return "it shares its weight with a layer of another stride, padding or dilation"
        if owner.bias is not owners[0].bias:
            return "it shares its weight with a layer that has a bias of its own"
    return ""


class StepRecorder:
    """Settles, step by step, what the taps see in the backward passes.

    Args:
        layers: Layer name -> the modules that own its weight.
        ledgers: Layer name -> ledger, for some of the layers.
        observers: Are shown every backward pass, and told whether the optimiser made the step.
        report: Is given the layer and the error if something fails; nothing may reach the training step.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[Operator]],
        ledgers: Mapping[str, RefinementLedger],
        observers: Sequence[Observer],
        report: Callable[[str, Exception], None],
    ) -> None:
        self.layers = dict(layers)
        self.ledgers = dict(ledgers)
        self.observers = list(observers)
        self.report = report
        self.taps = GradientTaps(layers, self)
        self.elementwise = False
        self.mean_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.world_size = 1
        self.broken: dict[str, Exception] = {}
        self._batch: TrainBatch | None = None
        self._sources: Sources | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow the optimisers' steps; what they hold of the time before belongs to the initial weights.

        Raises:
            MisconfigurationException: If two optimisers move the same traced layer.
        """
        optimizers = list(optimizers)
        for layer, ledger in self.ledgers.items():
            mine = {id(parameter) for parameter in parameters_of(ledger.module).values()}
            if sum(bool(mine & _learning_rates(optimizer).keys()) for optimizer in optimizers) > 1:
                raise MisconfigurationException(
                    f"`layers` names '{layer}', which two optimizers move; what each of them did cannot be told apart."
                    " Leave this layer out."
                )
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._stepped))
            for ledger in self.ledgers.values():
                ledger.start(optimizer)

    def remove(self) -> None:
        """Take all hooks off."""
        self.taps.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end()

    def begin(self, batch: TrainBatch | None, sources: Sources) -> None:
        """A training micro-batch is about to run."""
        self._batch, self._sources = batch or TrainBatch(), sources
        self.taps.tracing = True

    def end(self) -> None:
        """The training micro-batch is over."""
        self._batch = self._sources = None
        self.taps.tracing = False

    def see(self, layer: str, module: Operator, inputs: Tensor, gradients: Tensor) -> None:
        """One backward pass through one call of a layer."""
        if self._batch is None or self._sources is None:
            return
        try:
            inputs, gradients = samples_first(module, inputs, gradients, len(self._sources.rows))
            if layer in self.ledgers:
                self.ledgers[layer].see(module, inputs, gradients, self._sources)
            for observer in self.observers:
                observer.see(layer, module, inputs, gradients, self._batch)
        except Exception as error:
            self.report(layer, error)

    def drop(self, layer: str) -> None:
        """The layer's gradients did not reach the optimiser."""
        if layer in self.ledgers:
            self.ledgers[layer].drop()
        for observer in self.observers:
            observer.drop(layer)

    @torch.no_grad()
    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = _learning_rates(optimizer)
        # A fused optimiser under a gradient scaler skips the step inside its kernel; here alone the device is asked.
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None and bool(found_inf):
            for layer, owners in self.layers.items():
                if any(id(parameter) in rates for parameter in parameters_of(owners[0]).values()):
                    self.drop(layer)
            return
        scale: Tensor | None = None
        for layer, ledger in self.ledgers.items():
            try:
                if layer in self.broken:
                    ledger.join(self.mean_over_ranks)
                    continue
                own = ledger.step(optimizer, elementwise=self.elementwise, mean_over_ranks=self.mean_over_ranks)
            except Exception as error:
                self.broken[layer] = error
                self.report(layer, error)
                continue
            if own is not None:  # 0 where its gradient was 0, and tells nothing
                scale = torch.where(own != 0, own, torch.ones_like(own) if scale is None else scale)
        for layer, owners in self.layers.items():
            weight = owners[0].weight
            if id(weight) in rates and weight.grad is not None:
                # Clipping and unscaling are alike for all layers, so a ledger's layer tells them for the others.
                factor = torch.ones((), device=weight.device) if scale is None else scale
                # A sample's gradient holds the mean over its rank's samples; the optimiser's, that over the ranks.
                factor = factor / self.world_size
                for observer in self.observers:
                    try:
                        observer.commit(layer, rates[id(weight)] * factor)
                    except Exception as error:
                        self.report(layer, error)


def _learning_rates(optimizer: Optimizer) -> dict[int, Any]:
    return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
