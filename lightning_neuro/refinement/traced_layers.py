"""Which layers of a model can be traced, each with all modules that share its weight."""

from collections.abc import Sequence

from torch import nn

from lightning_neuro.checks import ArgumentError
from lightning_neuro.layers import LINEAR_OR_CONV, named_layers, resolve_layers
from lightning_neuro.refinement.layer_gradients import OPERATORS, Operator, why_unsupported

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def find_layers(
    model: nn.Module, patterns: str | Sequence[str] | None, argument: str = "layers"
) -> dict[str, list[Operator]]:
    """The layers to trace, each with all modules that share its weight.

    Args:
        model: The model.
        patterns: Names or globs; None for the classifier head, which is the last trained linear or convolution layer.
        argument: Name of the argument that holds the patterns, for messages.

    Raises:
        ArgumentError: If a layer that is named in full cannot be traced (globs skip such layers), or none is left.
    """
    layers = named_layers(model)
    if patterns is None:
        heads = [name for name, module in layers.items() if isinstance(module, LINEAR_OR_CONV) and _is_trained(module)]
        if not heads:
            raise ArgumentError(
                f"{type(model).__name__} has no trained linear or convolution layer, so there is no default layer to"
                " trace. Pass `RepresentationRefinement(layers=...)`."
            )
        patterns = heads[-1]
    named = {patterns} if isinstance(patterns, str) else set(patterns)
    chosen: dict[str, list[Operator]] = {}
    reasons: dict[str, str] = {}
    for name, module in resolve_layers(model, patterns).items():
        owners = [other for other in layers.values() if _shares_weight(other, module)]
        if reason := why_unsupported(module) or _why_not_shared(owners):
            reasons[name] = reason
        else:
            chosen[name] = owners  # type: ignore[assignment]
    for name, reason in reasons.items():
        if name in named or not chosen:
            raise ArgumentError(f"`{argument}` must name layers that can be traced; got '{name}': {reason}.")
    return chosen


def require_linear(layer: str, module: nn.Module, argument: str) -> nn.Linear:
    """Require a linear layer, whose update by one sample is the product of two vectors.

    Raises:
        ArgumentError: If the layer is of another type.
    """
    if not isinstance(module, nn.Linear):
        raise ArgumentError(
            f"`{argument}` can only be used with linear layers, such as the classifier head; got '{layer}', a"
            f" {type(module).__name__}."
        )
    return module


def _is_trained(module: nn.Module) -> bool:
    return not why_unsupported(module) and any(parameter.requires_grad for parameter in module.parameters())


def _shares_weight(other: nn.Module, module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and other._parameters.get("weight") is weight


def _why_not_shared(owners: Sequence[nn.Module]) -> str:
    """The reason why a weight that these modules share cannot be traced; empty if it can."""
    for owner in owners:
        if not isinstance(owner, OPERATORS):
            return f"it shares its weight with a module of type {type(owner).__name__}, which cannot be traced"
        if any(getattr(owner, name, None) != getattr(owners[0], name, None) for name in _GEOMETRY):
            return "it shares its weight with a layer of another stride, padding or dilation"
        if owner.bias is not owners[0].bias:
            return "it shares its weight with a layer that has a bias of its own"
    return ""
