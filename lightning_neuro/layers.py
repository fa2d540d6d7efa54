"""Selection of layers: from names and globs to modules, and the default layers."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules import activation as _activation
from torch.nn.modules import conv as _conv
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_neuro.checks import ArgumentError
from lightning_neuro.units import own_modules

DEFAULT_MAX_LAYERS = 8

_WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

_NOT_HIDDEN = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
ACTIVATIONS = tuple(cls for cls in own_modules(_activation) if cls not in _NOT_HIDDEN)
LINEAR_OR_CONV: tuple[type[nn.Module], ...] = (nn.Linear, _conv._ConvNd)


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


def resolve_layers(model: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Find the modules that match names or globs.

    A pattern that is the full name of a module matches only this module. Any other pattern is compared, segment by
    segment, with the end of each name, so that `conv*` matches `backbone.conv1` but not `backbone.conv1.bias_net`.

    Args:
        model: The model whose submodules are searched.
        patterns: A name or glob, or several; None for the default: the activation modules or, if the model has none,
            the linear and convolution layers without the last one (the logits). If these are more than eight, eight of
            them are used, evenly spread over the depth.

    Returns:
        Module by name, in the model's own order.

    Raises:
        ArgumentError: If a pattern matches nothing (the nearest names are listed) or the model has no default layers.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(resolve_layers(net)), list(resolve_layers(net, "2"))
        (['1'], ['2'])
    """
    layers = named_layers(model)
    if patterns is None:
        return _default_layers(layers)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = [pattern] if pattern in layers else [name for name in layers if _matches(name, pattern)]
        if not matches:
            raise ArgumentError(
                f"`layers` has the pattern {pattern!r}, which matches no module of {type(model).__name__}."
                f" The nearest names are: {', '.join(_nearest(pattern, layers)) or 'none (the model has no modules)'}."
            )
        chosen.update(matches)
    return {name: module for name, module in layers.items() if name in chosen}


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    by_end = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    found = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    found += [by_end[end] for end in difflib.get_close_matches(pattern.rsplit(".", 1)[-1], by_end, n=5, cutoff=0.4)]
    return list(dict.fromkeys(found))[:5] or names[:5]


def _default_layers(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    found = {name: module for name, module in layers.items() if isinstance(module, ACTIVATIONS)}
    if not found:
        # An attention module uses the weights of its projection without calling it, so no hook fires.
        found = {
            name: module
            for name, module in layers.items()
            if isinstance(module, LINEAR_OR_CONV) and not isinstance(module, NonDynamicallyQuantizableLinear)
        }
        # The last one computes the logits, whose units are the classes themselves.
        found = dict(list(found.items())[:-1])
    if not found:
        raise ArgumentError(
            "The model has neither activation modules nor two linear or convolution layers, so there are no default"
            f" layers. Pass `layers=[...]`; the model has: {', '.join(list(layers)[:20]) or 'no modules'}."
        )
    names = list(found)
    if len(names) > DEFAULT_MAX_LAYERS:
        last = len(names) - 1
        names = [names[round(i * last / (DEFAULT_MAX_LAYERS - 1))] for i in range(DEFAULT_MAX_LAYERS)]
    return {name: found[name] for name in names}
