"""Which layers to look at, and what their units are.

Two questions, in this order: names and globs -> modules (`resolve_layers`), and a layer's output -> a matrix with a row
per sample and a column per unit (`to_units`).
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules import activation as _activation
from torch.nn.modules import batchnorm as _batchnorm
from torch.nn.modules import conv as _conv
from torch.nn.modules import instancenorm as _instancenorm
from torch.nn.modules import pooling as _pooling
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Reduction = Literal["mean", "max", "random", "tokens", "cls", "flatten"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

DEFAULT_MAX_LAYERS = 8


def _own_modules(source: ModuleType) -> tuple[type[nn.Module], ...]:
    """The module classes that a file of `torch.nn.modules` defines itself."""
    classes = [cls for cls in vars(source).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    return tuple(cls for cls in classes if cls.__module__ == source.__name__)


_NOT_HIDDEN = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
ACTIVATIONS = tuple(cls for cls in _own_modules(_activation) if cls not in _NOT_HIDDEN)
LINEAR_OR_CONV: tuple[type[nn.Module], ...] = (nn.Linear, _conv._ConvNd)

# Where the units of an output lie: on the last dimension after these ...
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
# ... and on dimension 1 after these.
_CHANNELS_FIRST = (
    *(_conv._ConvNd, _batchnorm._NormBase, _instancenorm._InstanceNorm, nn.GroupNorm),
    *_own_modules(_pooling),
)


def clean_name(name: str) -> str:
    """A module's name as the user knows it: without the wrapper that `torch.compile` puts around a module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by their clean name; a compiled module stands under the name of the module it wraps."""
    return {clean_name(name): module for name, module in model.named_modules() if clean_name(name)}


def resolve_layers(model: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Find the modules that names or globs mean.

    A pattern that is a module's full name means this module alone. Any other pattern is compared, segment by segment,
    with the end of each name, so that `conv*` finds `backbone.conv1` but not `backbone.conv1.bias_net`.

    Args:
        model: The model whose submodules are searched.
        patterns: A name or glob, or several; None for the default: the outputs of activation modules, or where the
            model has none, of linear and convolution layers without the last one (the logits); of more than eight,
            eight evenly spread over the depth.

    Returns:
        Module by name, in the model's own order.

    Raises:
        MisconfigurationException: If a pattern matches nothing (the nearest names are listed) or the model has no
            layer to look at by default.

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
            raise MisconfigurationException(
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
        # An attention module uses the weights of its projection without ever calling it, so no hook fires there.
        found = {
            name: module
            for name, module in layers.items()
            if isinstance(module, LINEAR_OR_CONV) and not isinstance(module, NonDynamicallyQuantizableLinear)
        }
        # The last one computes the logits, whose units are the classes themselves.
        found = dict(list(found.items())[:-1])
    if not found:
        raise MisconfigurationException(
            "The model has neither activation modules nor two linear or convolution layers to look at by default."
            f" Name the layers with `layers=[...]`; the model has: {', '.join(list(layers)[:20]) or 'no modules'}."
        )
    names = list(found)
    if len(names) > DEFAULT_MAX_LAYERS:
        last = len(names) - 1
        names = [names[round(i * last / (DEFAULT_MAX_LAYERS - 1))] for i in range(DEFAULT_MAX_LAYERS)]
    return {name: found[name] for name in names}


class _LayoutHook:
    """A class and not a closure, so that the hooked model can be pickled and copied; a copy notes for itself."""

    def __init__(self) -> None:
        self.latest: tuple[bool, int] | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        last = isinstance(module, _CHANNELS_LAST)
        tensor = first_tensor(output)
        if tensor.ndim > 1:
            self.latest = last, tensor.shape[-1 if last else 1]


@contextmanager
def latest_layout(model: nn.Module) -> Iterator[Callable[[Tensor], bool | None]]:
    """Follow where the units lie while the model runs: the same ReLU may follow convolutions and tokens.

    Yields a function that says of an output just computed whether its units lie on the last dimension (True) or on
    dimension 1 (False): as those of the latest layer that decides it (linear and normalised over features: last;
    convolutions: dimension 1), or, after a permutation, where this layer's number of units is found. None as long as no
    such layer has run.
    """
    note = _LayoutHook()

    def units_last(output: Tensor) -> bool | None:
        if note.latest is None or output.ndim < 3:
            return None
        last, units = note.latest
        at_end, at_front = output.shape[-1] == units, output.shape[1] == units
        return at_end if at_end != at_front else last

    deciding = [module for module in model.modules() if isinstance(module, (*_CHANNELS_LAST, *_CHANNELS_FIRST))]
    handles = [module.register_forward_hook(note) for module in deciding]
    try:
        yield units_last
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a layer's output: recurrent and attention layers return a tuple, transformers a mapping."""
    if isinstance(output, Tensor):
        return output
    children: Iterable[Any] = ()
    if isinstance(output, Mapping):
        children = output.values()
    elif isinstance(output, (tuple, list)):
        children = output
    for child in children:
        try:
            return first_tensor(child)
        except TypeError:
            continue
    raise TypeError(f"The output has no tensor in it: it is a {type(output).__name__}.")


def to_units(
    output: Tensor,
    reduction: Reduction = "mean",
    *,
    units_last: bool | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turn a layer's output into a matrix with a row per sample and a column per unit.

    Args:
        output: Floating-point tensor whose dimension 0 is the sample. Shape (N, units) is returned as it is.
        reduction: What becomes of the positions (pixels, tokens): `"mean"` or `"max"` over them; `"random"`: one
            position per sample; `"cls"`: the first position; `"tokens"`: each position is a row of its own, sample
            after sample; `"flatten"`: each unit at each position is a unit of its own.
        units_last: Whether the units lie on the last dimension, else on dimension 1; None: last for three dimensions
            (tokens), dimension 1 for more (feature maps).
        generator: Draws the positions for `"random"`, on the CPU.

    Returns:
        Tensor of shape (N, units), or (N x positions, units) for `"tokens"`.

    Raises:
        ValueError: If the output has no sample dimension or is not floating-point.

    Example:
        >>> import torch
        >>> to_units(torch.arange(8.0).reshape(1, 2, 2, 2)).tolist()
        [[1.5, 5.5]]
    """
    if not output.is_floating_point() or output.ndim == 0:
        raise ValueError(
            f"A layer's output must be a floating-point tensor with a sample dimension; it is {output.dtype} of shape"
            f" {tuple(output.shape)}."
        )
    if output.ndim == 1:
        return output.unsqueeze(1)
    if output.ndim == 2 or reduction == "flatten":
        return output.flatten(1)
    if units_last is None:
        units_last = output.ndim == 3
    # (N, positions, units)
    positions = output.flatten(1, -2) if units_last else output.flatten(2).transpose(1, 2)
    return _reduce(positions, reduction, generator)


def _reduce(positions: Tensor, reduction: Reduction, generator: torch.Generator | None) -> Tensor:
    if reduction == "mean":
        return positions.mean(dim=1)
    if reduction == "max":
        return positions.amax(dim=1)
    if reduction == "cls":
        return positions[:, 0]
    if reduction == "tokens":
        return positions.flatten(0, 1)
    samples, count = positions.shape[:2]
    chosen = torch.randint(count, (samples,), generator=generator).to(positions.device)
    return positions[torch.arange(samples, device=positions.device), chosen]
