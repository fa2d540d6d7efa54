"""Hooks that ride on the training steps: what each layer was given, and the gradient of the loss at its output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_neuro.layers import first_tensor
from lightning_neuro.refinement.operators import Operator, parameters_of

# A module that a loop calls more often than this in one pass of the probe is not recorded further.
MAX_CALLS = 64


def _is_zeroed(gradient: Tensor | None) -> bool:
    """Whether a gradient was thrown away; asks the device only where it is accumulated or zeroed in place."""
    return gradient is None or not bool(gradient.any())


def _off() -> None:
    """No look is recorded."""


class Receiver(Protocol):
    """Who is told what the taps see."""

    def see(self, layer: str, module: Operator, inputs: Tensor, gradients: Tensor) -> None:
        """One backward pass through one call of a layer."""

    def drop(self, layer: str) -> None:
        """The layer's gradients were zeroed: what was seen before did not reach the optimiser."""


class GradientTaps:
    """Reads layer inputs and output gradients in training, and inputs and outputs in an evaluation.

    The gradient is taken at the output tensor and not with full backward hooks, which break where an in-place
    activation follows. Without autocast nothing is held that autograd does not hold anyway.

    Args:
        modules: Layer name -> the modules that own its weight: more than one where modules are tied.
        receiver: Is told of every backward pass.

    Attributes:
        tracing: Whether backward passes are reported; off, the hooks do nothing.
        recorded: Layer -> (inputs, outputs) of each call in the latest look, while `record` is on.
    """

    def __init__(self, modules: Mapping[str, Sequence[Operator]], receiver: Receiver) -> None:
        self.modules = modules
        self.receiver = receiver
        self.tracing = False
        self.recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._look_of: Callable[[], int | None] = _off
        self._look: int | None = None
        self._new: set[str] = set()
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(_TapHook(self, layer), with_kwargs=True)
            for layer, owners in modules.items()
            for module in owners
        ]

    @property
    def recording(self) -> bool:
        """Whether what the layers are given and return is kept."""
        return self._look_of() is not None

    def record(self, look_of: Callable[[], int | None]) -> None:
        """Keep what the layers are given and return.

        Args:
            look_of: The number of the forward pass that runs; what belongs to an earlier one is forgotten, for others
                may run the model too. None turns recording off.
        """
        self._look_of, self.recorded, self._look = look_of, {}, None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.tracing = [], False
        self.record(_off)

    def ran(self, layer: str, module: Operator, inputs: Tensor, output: Tensor) -> None:
        """A layer ran; called by the hooks."""
        if (look := self._look_of()) is not None:
            if look != self._look:
                self._look, self.recorded = look, {}
            calls = self.recorded.setdefault(layer, [])
            if len(calls) < MAX_CALLS:
                # Copies: what follows may change both in place.
                calls.append((inputs.detach().clone(), output.detach().clone()))
        elif self.tracing and output.requires_grad and any(p.requires_grad for p in parameters_of(module).values()):
            self._new.add(layer)
            inputs = inputs.detach()
            if torch.is_autocast_enabled(inputs.device.type):
                # Autograd holds a copy in the lower precision; the input itself may be changed in place by now.
                inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))

            def report(gradients: Tensor) -> None:
                # The first gradient after a forward pass; later ones belong to the same, or accumulate.
                if layer in self._new:
                    self._new.discard(layer)
                    if all(_is_zeroed(p.grad) for p in parameters_of(module).values()):
                        self.receiver.drop(layer)
                with torch.no_grad(), torch.autocast(gradients.device.type, enabled=False):
                    self.receiver.see(layer, module, inputs, gradients.detach())

            output.register_hook(report)  # type: ignore[no-untyped-call]


class _TapHook:
    """A class and not a closure, so that the hooked model can be pickled and copied; the copy's hook does nothing."""

    def __init__(self, taps: GradientTaps | None, layer: str) -> None:
        self.taps = taps
        self.layer = layer

    # A compiled graph would not keep what the hook does beside it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.taps is not None and (self.taps.tracing or self.taps.recording):
            self.taps.ran(self.layer, module, args[0] if args else kwargs["input"], first_tensor(output))

    def __reduce__(self) -> tuple[type["_TapHook"], tuple[None, str]]:
        return _TapHook, (None, self.layer)
