"""Forward hooks on the traced layers: their inputs and output gradients in training, their outputs in an evaluation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_neuro.batches import first_tensor
from lightning_neuro.refinement.backward_passes import BackwardPasses, LayerCall, LayerPass
from lightning_neuro.refinement.layer_gradients import Operator, parameters_of

# Further calls of a module in one forward pass of the probe set (in a loop, say) are not evaluated.
MAX_EVALUATED_CALLS = 64


def _no_pass() -> None:
    """Number of the forward pass while nothing is recorded: None."""


class Receiver(Protocol):
    """What the backward passes of the layers are delivered to."""

    def see(self, layer: str, module: Operator, inputs: Tensor, gradients: Tensor) -> None:
        """Process one backward pass through one call of a layer."""

    def drop(self, layer: str) -> None:
        """Discard what was seen of a layer, because its gradients were reset before the optimizer used them."""


class GradientHooks:
    """Reads inputs and output gradients of layers in training, and their inputs and outputs in an evaluation.

    The gradient is read at the output tensor. Full backward hooks would raise an error if an in-place activation
    follows the layer. It is delivered once the same backward pass has added to the gradients of the layer, so that
    `torch.autograd.grad` does not count. Without autocast, no tensor is kept that autograd does not keep anyway.

    Args:
        layers: Layer name -> the modules that own its weight: several if modules are tied.

    Attributes:
        receiver: What backward passes are delivered to, once `deliver_to` has named it.
        tracing: Whether the calls of the layers are followed to their backward passes.
        idle: Names of layers that are not followed now, although `tracing` is on.
        recorded: Layer -> (inputs, outputs) of each call in the latest forward pass, while recording is on.
    """

    def __init__(self, layers: Mapping[str, Sequence[Operator]]) -> None:
        self.layers = dict(layers)
        self.receiver: Receiver | None = None
        self.tracing = False
        self.idle: Collection[str] = ()
        self.recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._pass_number: Callable[[], int | None] = _no_pass
        self._last_pass: int | None = None
        self._awaiting_gradient: set[str] = set()
        self._passes = BackwardPasses(self._deliver)
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(_LayerHook(self, layer), with_kwargs=True)
            for layer, owners in layers.items()
            for module in owners
        ]

    def deliver_to(self, receiver: Receiver) -> None:
        """Deliver the backward passes to this receiver from now on, while `tracing` is on."""
        self.receiver = receiver

    @property
    def recording(self) -> bool:
        """Whether inputs and outputs of the layers are kept."""
        return self._pass_number() is not None

    def record(self, pass_number: Callable[[], int | None]) -> None:
        """Keep the inputs and outputs of the layers.

        Args:
            pass_number: Returns the number of the forward pass that is running, or None while nothing is to be
                recorded. Records of earlier passes are discarded, because other callbacks may run the model too.
        """
        self._pass_number = pass_number
        self._last_pass = None
        self.recorded = {}

    def stop_recording(self) -> None:
        """Discard the recorded inputs and outputs, and stop recording."""
        self.record(_no_pass)

    def stop_tracing(self) -> None:
        """Follow no further calls, and release what a backward pass held that ended with an error."""
        self.tracing = False
        self._passes.release()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._passes.remove()
        self.receiver = None
        self.tracing = False
        self.stop_recording()

    def layer_ran(self, layer: str, module: Operator, inputs: Tensor, output: Tensor) -> None:
        """Record a call of a layer, or wait for the gradient of its output; called by the hooks."""
        if self.recording:
            self._record_call(layer, inputs, output)
        elif self._follows(layer, module) and output.requires_grad:
            self._awaiting_gradient.add(layer)
            self._passes.watch(layer, module)
            inputs = inputs.detach()
            if torch.is_autocast_enabled(inputs.device.type):
                # Autograd keeps a copy in the lower precision; the input itself may be changed in place later.
                inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))

            def hold(gradients: Tensor) -> None:
                if self.receiver is not None:
                    call = LayerCall(module, inputs, gradients.detach())
                    self._passes.hold(layer, call, may_follow_reset=layer in self._awaiting_gradient)

            output.register_hook(hold)  # type: ignore[no-untyped-call]

    def _follows(self, layer: str, module: Operator) -> bool:
        trained = any(parameter.requires_grad for parameter in parameters_of(module).values())
        return self.tracing and layer not in self.idle and trained

    def _record_call(self, layer: str, inputs: Tensor, output: Tensor) -> None:
        if (number := self._pass_number()) != self._last_pass:
            self._last_pass = number
            self.recorded = {}
        calls = self.recorded.setdefault(layer, [])
        if len(calls) < MAX_EVALUATED_CALLS:
            # Copies, because later modules may change both in place.
            calls.append((inputs.detach().clone(), output.detach().clone()))

    def _deliver(self, layer: str, backward_pass: LayerPass) -> None:
        """Deliver a backward pass that added to the gradients of a layer."""
        if self.receiver is None:
            return
        # Only the first pass after a forward pass can follow a reset; later ones belong to the same forward pass.
        if layer in self._awaiting_gradient:
            self._awaiting_gradient.discard(layer)
            if backward_pass.after_reset:
                self.receiver.drop(layer)
        for call in backward_pass.calls:
            with torch.no_grad(), torch.autocast(call.gradients.device.type, enabled=False):
                self.receiver.see(layer, call.module, call.inputs, call.gradients)


class _LayerHook:
    """A picklable hook, so that the hooked model can be pickled and copied; the hook of a copy does nothing."""

    def __init__(self, hooks: GradientHooks | None, layer: str) -> None:
        self.hooks = hooks
        self.layer = layer

    # A compiled graph would leave out the side effects of the hook.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.hooks is not None and (self.hooks.tracing or self.hooks.recording):
            self.hooks.layer_ran(self.layer, module, args[0] if args else kwargs["input"], first_tensor(output))

    def __reduce__(self) -> tuple[type["_LayerHook"], tuple[None, str]]:
        return _LayerHook, (None, self.layer)
