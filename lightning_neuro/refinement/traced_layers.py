"""Which layers of a model can be traced, each with all modules that share its weight."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_neuro.checks import ArgumentError
from lightning_neuro.heads import Heads
from lightning_neuro.layers import LINEAR_OR_CONV, named_layers, resolve_layers
from lightning_neuro.refinement.layer_gradients import Operator, is_linear, why_unsupported

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def find_layers(
    model: nn.Module,
    patterns: str | Sequence[str] | None,
    argument: str = "layers",
    *,
    order: Sequence[str] | None = None,
    max_weights: float = inf,
) -> dict[str, list[Operator]]:
    """The layers to trace, each with all modules that share its weight.

    Args:
        model: The model.
        patterns: Names or globs; None for the classifier head, see `default_layer`.
        argument: Name of the argument that holds the patterns, for messages.
        order: Names of the layers in the order in which a forward pass called them, for the default.
        max_weights: Number of weights that the default layer may have.

    Raises:
        ArgumentError: If a layer that is named in full cannot be traced (globs skip such layers), or none is left.
    """
    layers = named_layers(model)
    if patterns is None:
        patterns = default_layer(model, order, max_weights)
    named = {patterns} if isinstance(patterns, str) else set(patterns)
    matched: dict[str, nn.Module] = {}
    for name, layer in resolve_layers(model, patterns).items():
        if isinstance(layer, Heads):
            raise ArgumentError(
                f"`{argument}` must name layers with weights of their own; got the heads '{name}'. Name the output"
                " projection of the attention layer."
            )
        matched[name] = layer
    for wrapper in [name for name, module in matched.items() if name not in named and _is_adapter(module)]:
        matched |= _trained_parts(wrapper, layers)
    chosen: dict[str, list[Operator]] = {}
    reasons: dict[str, str] = {}
    for name, module in layers.items():
        if name not in matched:
            continue
        if reason := _why_not(name, module, layers):
            reasons[name] = reason
        else:
            chosen[name] = _owners(module, layers)
    for name, reason in reasons.items():
        if name in named or not chosen:
            raise ArgumentError(f"`{argument}` must name layers that can be traced; got '{name}': {reason}.")
    return chosen


def default_layer(model: nn.Module, order: Sequence[str] | None = None, max_weights: float = inf) -> str:
    """The classifier head: the last trained linear or convolution layer that can be traced.

    Args:
        model: The model.
        order: Names of the layers in the order in which a forward pass called them; default: as they are registered.
        max_weights: Number of weights that it may have.

    Raises:
        ArgumentError: If no layer can be traced.
    """
    layers = named_layers(model)
    called = [name for name in order or () if name in layers]
    skipped: dict[str, str] = {}
    for name in reversed(called or list(layers)):
        module = layers[name]
        if not (is_linear(module) or isinstance(module, LINEAR_OR_CONV)) or not _is_trained(module):
            continue
        num_weights = sum(parameter.numel() for parameter in module._parameters.values() if parameter is not None)
        reason = _why_not(name, module, layers)
        if not reason and num_weights > max_weights:
            reason = f"the ledger of its {num_weights:,} weights would take more memory than `memory_limit`"
        if not reason:
            if skipped:
                rank_zero_info(f"The refinement of layer '{name}' is traced, because {_in_words(skipped)}.")
            return name
        skipped[name] = reason
    raise ArgumentError(
        f"{type(model).__name__} has no trained linear or convolution layer that can be traced"
        f" ({_in_words(skipped) or 'none is trained'}), so there is no default layer. Pass"
        " `RepresentationRefinement(layers=...)`."
    )


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
    return any(parameter.requires_grad for parameter in module.parameters())


def _in_words(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"'{name}' cannot be traced: {reason}" for name, reason in list(skipped.items())[:3])


def _owners(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[Operator]:
    """All modules that share the weight of a module."""
    weight = module._parameters.get("weight")
    return [other for other in layers.values() if weight is not None and other._parameters.get("weight") is weight]  # type: ignore[misc]


def _why_not(name: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    """The reason why a layer cannot be traced; empty if it can."""
    if _is_adapter(module):
        parts = ", ".join(f"'{part}'" for part in _trained_parts(name, layers)) or "none is trained"
        return (
            f"it is a LoRA adapter ({type(module).__name__} of peft), which is computed by the layers inside it; name"
            f" those that are trained: {parts}"
        )
    return why_unsupported(module) or _why_not_shared(_owners(module, layers))


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module is a linear layer with LoRA adapters, as peft makes them."""
    return all(isinstance(module._modules.get(part), nn.Module) for part in ("base_layer", "lora_A", "lora_B"))


def _trained_parts(name: str, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers inside a module that can be traced and are trained."""

    def parts() -> Iterator[tuple[str, nn.Module]]:
        for part, module in layers.items():
            if part.startswith(f"{name}.") and not why_unsupported(module) and _is_trained(module):
                yield part, module

    return dict(parts())


def _why_not_shared(owners: Sequence[nn.Module]) -> str:
    """The reason why a weight that these modules share cannot be traced; empty if it can."""
    for owner in owners:
        if why_unsupported(owner):
            return f"it shares its weight with a module of type {type(owner).__name__}, which cannot be traced"
        if any(getattr(owner, name, None) != getattr(owners[0], name, None) for name in _GEOMETRY):
            return "it shares its weight with a layer of another stride, padding or dilation"
        if owner.bias is not owners[0].bias:
            return "it shares its weight with a layer that has a bias of its own"
    return ""
