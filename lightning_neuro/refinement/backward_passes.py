"""Which backward passes count: those that add to `.grad`, and not those of `torch.autograd.grad`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.utils.hooks import RemovableHandle

from lightning_neuro.refinement.layer_gradients import Operator, parameters_of


@dataclass(eq=False)
class LayerCall:
    """One call of a layer in a forward pass, with the gradient that a backward pass brought to its output."""

    module: Operator
    inputs: Tensor
    gradients: Tensor


@dataclass(eq=False)
class LayerPass:
    """One backward pass through a layer.

    Attributes:
        after_reset: Whether the gradients of the layer were zero when the pass arrived.
        calls: The calls of the layer whose outputs it has reached so far.
    """

    after_reset: bool
    calls: list[LayerCall] = field(default_factory=list)


class BackwardPasses:
    """Holds what a backward pass brings to the outputs of a layer until the pass adds to `.grad` of its parameters.

    A gradient penalty, an energy model or a network with derivatives in its loss calls `torch.autograd.grad`. This is
    a backward pass that reaches the outputs of the layers, but adds nothing to their `.grad`. What is held of a pass is
    released at its end. Passes can be nested: activation checkpointing runs one inside another.

    Args:
        counts: Called with the name of a layer and a pass that adds to its gradients, once per pass.
    """

    def __init__(self, counts: Callable[[str, LayerPass], None]) -> None:
        self._counts = counts
        self._held: dict[int, dict[str, LayerPass]] = {}
        self._watched: dict[tuple[str, nn.Parameter], RemovableHandle] = {}
        self._states: dict[int, tuple[int, int]] = {}

    def watch(self, layer: str, module: Operator) -> None:
        """Notice when a backward pass adds to the gradients of a layer; may be called any number of times."""
        for parameter in parameters_of(module).values():
            if parameter.requires_grad and (layer, parameter) not in self._watched:
                hook = partial(self._added, layer)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._watched[layer, parameter] = handle

    def hold(self, layer: str, call: LayerCall, *, may_follow_reset: bool) -> None:
        """Hold what the running backward pass brought to the output of a call.

        Args:
            layer: Name of the layer.
            call: The call.
            may_follow_reset: Whether the gradients may have been reset since the last pass that counted.
        """
        number = torch._C._current_graph_task_id()
        if number not in self._held:
            self._held[number] = {}
            Variable._execution_engine.queue_callback(partial(self._pass_ended, number))
        passes = self._held[number]
        if layer not in passes:
            after_reset = may_follow_reset and all(map(self._was_reset, parameters_of(call.module).values()))
            passes[layer] = LayerPass(after_reset)
        passes[layer].calls.append(call)

    def release(self) -> None:
        """Release what is held; necessary only after a backward pass that ended with an error."""
        self._held.clear()

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        self._states.clear()
        self.release()

    def _pass_ended(self, number: int) -> None:
        self._held.pop(number, None)

    def _was_reset(self, parameter: nn.Parameter) -> bool:
        """Whether a gradient is None or zero; reads it only if it was changed in place since the last pass added to it.

        So the host does not wait for the device if gradients are accumulated.
        """
        gradient = parameter.grad
        if gradient is None:
            return True
        return self._states.get(id(parameter)) != _state(gradient) and not bool(gradient.any())

    def _added(self, layer: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._states[id(parameter)] = _state(parameter.grad)
        # All calls of the layer come before: a pass adds to a parameter once, when the sum over its uses is complete.
        passes = self._held.get(torch._C._current_graph_task_id(), {})
        if (found := passes.pop(layer, None)) is not None:
            self._counts(layer, found)


def _state(gradient: Tensor) -> tuple[int, int]:
    """Changes with every operation in place, and if another tensor takes its place."""
    return gradient.data_ptr(), gradient._version
