"""Selection of layers: from names and globs to modules, and the default layers."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from lightning_neuro.checks import ArgumentError, NothingToDoError
from lightning_neuro.default_layers import default_layers, spread
from lightning_neuro.heads import Layer, all_heads, asks_for_heads, matching_heads, require_distinct
from lightning_neuro.layer_kinds import LINEAR_OR_CONV as LINEAR_OR_CONV
from lightning_neuro.layer_kinds import is_activation, is_gate, is_linear, is_recurrent, is_sigmoid

if TYPE_CHECKING:
    from lightning_neuro.call_trace import SeenCall

_WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def clean_name(name: str, parallel: Collection[str] = ()) -> str:
    """A module's name without the wrappers of `torch.compile`, FSDP, activation checkpointing and data parallelism.

    Args:
        name: The name, as `named_modules` returns it.
        parallel: The names of the modules that a `DistributedDataParallel` or `DataParallel` wraps.
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return ".".join(
        part
        for part, prefix in zip(parts, prefixes, strict=True)
        if part not in _WRAPPED_NAMES and prefix not in parallel
    )


def modules_by_clean_name(model: nn.Module) -> dict[str, nn.Module]:
    """A model and all its modules by their clean name, `""` for the model; a wrapped module instead of its wrapper."""
    modules = dict(model.named_modules())
    parallel = {f"{name}.module".lstrip(".") for name, module in modules.items() if isinstance(module, _PARALLEL)}
    return {clean_name(name, parallel): module for name, module in modules.items()}


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below a model by their clean name."""
    return {name: module for name, module in modules_by_clean_name(model).items() if name}


def resolve_layers(
    model: nn.Module, patterns: str | Sequence[str] | None = None, seen: Sequence["SeenCall"] | None = None
) -> dict[str, Layer]:
    """Find the modules that match names or globs.

    A pattern that is the full name of a module matches only this module. Any other pattern is compared, segment by
    segment, with the end of each name, so that `conv*` matches `backbone.conv1` but not `backbone.conv1.bias_net`.
    `<attention layer>.heads` selects the heads of attention layers, see `matching_heads`.

    Args:
        model: The model whose submodules are searched.
        patterns: A name or glob, or several; None for the default layers, see `default_layers`.
        seen: The calls of a forward pass, from which the default layers are chosen. Without it, they are chosen from
            the registered modules: activations and recurrent layers or, if there are none, linear and convolution
            layers without the last one, at most eight.

    Returns:
        Module or heads by name, in the model's own order; default layers in the order of their calls.

    Raises:
        ArgumentError: If a pattern matches nothing (the nearest names are listed), it names heads that no hook can
            reach, or the model has no default layers.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(resolve_layers(net)), list(resolve_layers(net, "2"))
        (['1'], ['2'])
    """
    layers = named_layers(model)
    if patterns is None:
        return dict(_default_layers(layers, seen))
    chosen: dict[str, Layer] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [pattern] if pattern in layers else [name for name in layers if _matches(name, pattern)]
        found = {name: layers[name] for name in names} or matching_heads(pattern, layers, _matches)
        if not found:
            raise ArgumentError(_no_match(pattern, layers, type(model).__name__))
        chosen |= found
    require_distinct(chosen)
    order = {name: number for number, name in enumerate(layers)}
    return dict(sorted(chosen.items(), key=lambda item: order.get(item[0], order.get(item[0].rpartition(".")[0], 0))))


def _no_match(pattern: str, layers: Mapping[str, nn.Module], model: str) -> str:
    heads = [f"{name}.heads" for name in all_heads(layers)]
    if asks_for_heads(pattern):
        return (
            f"`layers` has the pattern {pattern!r}, which matches no attention layer of {model} whose output projection"
            f" and number of heads are known. These are: {', '.join(_nearest(pattern, heads)) or 'none'}. Of another"
            " attention layer, name the output projection and the number of heads, such as"
            " `layers=['mixer.out.heads=8']`."
        )
    nearest = _nearest(pattern, [*layers, *heads])
    return (
        f"`layers` has the pattern {pattern!r}, which matches no module of {model}. The nearest names are:"
        f" {', '.join(nearest) or 'none (the model has no modules)'}."
    )


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    by_end = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    found = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    found += [by_end[end] for end in difflib.get_close_matches(pattern.rsplit(".", 1)[-1], by_end, n=5, cutoff=0.4)]
    return list(dict.fromkeys(found))[:5] or names[:5]


def _default_layers(layers: Mapping[str, nn.Module], seen: Sequence["SeenCall"] | None) -> dict[str, nn.Module]:
    names = (default_layers(seen) if seen else []) or _registered_defaults(layers)
    if not names:
        raise NothingToDoError(
            "The model has neither activation modules nor two linear or convolution layers, so there are no default"
            f" layers. Pass `layers=[...]`; the model has: {', '.join(list(layers)[:20]) or 'no modules'}."
        )
    return {name: layers[name] for name in names}


def _registered_defaults(layers: Mapping[str, nn.Module]) -> list[str]:
    """The default layers where no forward pass has been seen, in the order in which they are registered."""
    features = [name for name, module in layers.items() if is_activation(module) or is_recurrent(module)]
    features = [name for name in features if not is_gate(name)]
    features = [name for name in features if not is_sigmoid(layers[name])] or features
    # The last one computes the logits, whose units are the classes themselves.
    return spread(features or [name for name, module in layers.items() if is_linear(module)][:-1])
