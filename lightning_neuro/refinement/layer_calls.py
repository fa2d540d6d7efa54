"""The inputs and outputs of some layers when the model runs on given inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.batches import first_tensor
from lightning_neuro.capture import uncompiled
from lightning_neuro.checks import ArgumentError
from lightning_neuro.isolation import evaluation_mode


@dataclass(frozen=True, eq=False)
class LayerCalls:
    """The first call of each layer in one forward pass.

    Attributes:
        inputs: Layer -> its input.
        outputs: Layer -> its output.
        model_output: What the model returned.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    model_output: Any

    def is_head(self, layer: str) -> bool:
        """Whether the model returns the output of this layer, as logits of at least two classes."""
        output = self.outputs[layer]
        returned = self.model_output
        logits = isinstance(returned, Tensor) and returned.ndim == 2 and returned.shape[1] > 1
        return logits and output.shape == returned.shape and torch.equal(output, returned)


def call_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    forward_fn: Callable[[Any, Any], Any] | None = None,
) -> LayerCalls:
    """Run a model in evaluation mode, and keep what some of its layers receive and return.

    Args:
        model: The model.
        layers: Layer name -> module.
        inputs: What the model is called with.
        forward_fn: Calls the model on the inputs; default: `model(inputs)`.

    Raises:
        ArgumentError: If a layer is not called.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(2, 3))
        >>> calls = call_layers(model, {"1": model[1]}, torch.tensor([[-1.0, 2.0]]))
        >>> calls.inputs["1"].tolist(), calls.is_head("1")
        ([[0.0, 2.0]], True)
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(layer: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Copies, because later modules may change both in place.
            given = args[0] if args else kwargs["input"]
            seen.setdefault(layer, (given.detach().clone(), first_tensor(output).detach().clone()))

        return keep

    handles = [module.register_forward_hook(hook(layer), with_kwargs=True) for layer, module in layers.items()]
    try:
        with uncompiled(), evaluation_mode(model), torch.no_grad():
            returned = model(inputs) if forward_fn is None else forward_fn(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer not in seen:
            raise ArgumentError(f"`layer` must be called in the forward pass; got {layer!r}, which was not called.")
    return LayerCalls(
        inputs={layer: seen[layer][0] for layer in layers},
        outputs={layer: seen[layer][1] for layer in layers},
        model_output=returned,
    )
