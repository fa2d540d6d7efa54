"""The heads of attention layers as units: how many there are, and where their outputs can be read and scaled.

The outputs of all heads, one beside the other, are the input of the layer's output projection. There a head can be told
from the others; after the projection their contributions are added up.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError

# Names of output projections in timm, transformers, diffusers and the usual implementations of attention.
_PROJECTIONS = ("proj", "c_proj", "out_proj", "o_proj", "to_out", "to_out.0", "out_lin", "dense", "wo", "Wo", "o")
_PROJECTION_BESIDE = "output.dense"
_NUMBERS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_PATTERN = re.compile(r"heads|(?P<layer>.+)\.heads(?:=(?P<number>\d+))?")


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of an attention layer, which take its place among the selected layers.

    Attributes:
        projection: The layer's output projection. Its input holds the outputs of the heads along the last dimension.
        num_heads: Number of heads.
    """

    projection: nn.Module
    num_heads: int


Layer = nn.Module | Heads
"""What can be selected: a module, whose output holds the units, or the heads of an attention layer."""


def hooked_module(layer: Layer) -> nn.Module:
    """The module whose calls show the units of a layer."""
    return layer.projection if isinstance(layer, Heads) else layer


def head_norms(outputs: Tensor, num_heads: int) -> Tensor:
    """The Euclidean norm of each head's output at each position.

    The norm and not the mean over channels, because a network can rotate the channels of a head without changing what
    it computes, and this changes the mean.

    Args:
        outputs: (..., channels), the input of an output projection.
        num_heads: Number of heads; the channels of a head are adjacent.

    Returns:
        (..., num_heads), not negative.

    Raises:
        ValueError: If the channels cannot be divided among the heads.

    Example:
        >>> import torch
        >>> head_norms(torch.tensor([[3.0, 4.0, 0.0, -2.0]]), 2).tolist()
        [[5.0, 2.0]]
    """
    require_divisible(outputs.shape[-1] if outputs.ndim else 0, num_heads)
    found: Tensor = outputs.reshape(*outputs.shape[:-1], num_heads, -1).norm(dim=-1)
    return found


def require_divisible(num_channels: int, num_heads: int) -> None:
    """Require that channels can be divided among heads; raises `ValueError`."""
    if num_channels == 0 or num_channels % num_heads:
        raise ValueError(
            f"the {num_channels} channels of its output projection cannot be divided among {num_heads} heads"
        )


def asks_for_heads(pattern: str) -> bool:
    """Whether a pattern of layers ends with `heads`, or with `heads=` and their number."""
    return _PATTERN.fullmatch(pattern) is not None


def matching_heads(
    pattern: str, layers: Mapping[str, nn.Module], matches: Callable[[str, str], bool]
) -> dict[str, Heads]:
    """Find the heads that a pattern names.

    Args:
        pattern: `<layer>.heads`, where the layer is the name of an attention layer or a glob; `heads` for all of them;
            or `<layer>.heads=<number>`, where the layer may also be an output projection.
        layers: All modules of the model by name.
        matches: Whether a name matches a glob.

    Returns:
        `<layer>.heads` -> the heads; empty if there is no such attention layer.

    Raises:
        ArgumentError: If no hook can reach the heads, as in `torch.nn.MultiheadAttention`, or the layer does not have
            the given number of heads.
    """
    parsed = _PATTERN.fullmatch(pattern)
    if parsed is None:
        return {}
    number = parsed["number"]
    glob = pattern if number is None else f"{parsed['layer']}.heads"

    def named(name: str) -> bool:
        return f"{name}.heads" == glob or (parsed["layer"] not in layers and matches(f"{name}.heads", glob))

    for name, module in layers.items():
        if named(name) and (reason := _why_unreachable(module)):
            raise ArgumentError(
                f"`layers` asks for the heads of '{name}', which cannot be told apart, because {reason}; name its"
                f" output instead, with `layers=[{name!r}]`, or use another implementation of attention."
            )
    if number is None:
        return {f"{name}.heads": heads for name, heads in all_heads(layers).items() if named(name)}
    return {f"{name}.heads": _given(name, layers, int(number)) for name in layers if named(name)}


def require_distinct(layers: Mapping[str, Layer]) -> None:
    """Require that the heads at an output projection are selected once.

    Raises:
        ArgumentError: If they have two names.
    """
    names: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, Heads) and (other := names.setdefault(id(layer.projection), name)) != name:
            raise ArgumentError(
                f"`layers` names the heads of one attention layer twice, {other!r} and {name!r}; name one."
            )


def all_heads(layers: Mapping[str, nn.Module]) -> dict[str, Heads]:
    """The heads of all attention layers whose output projection and number of heads are known, by the layer's name.

    Args:
        layers: All modules of the model by name.

    Example:
        >>> net = nn.Module()
        >>> net.attn = nn.Module()
        >>> net.attn.num_heads, net.attn.proj = 2, nn.Linear(8, 8)
        >>> all_heads(dict(net.named_modules()))["attn"].num_heads
        2
    """
    found: dict[str, Heads] = {}
    for name, module in layers.items():
        number = _num_heads(module)
        if number is None or _why_unreachable(module):
            continue
        # As in BERT, the projection may lie beside the module that computes the attention.
        for owner in (name, name.rpartition(".")[0]):
            projection = _projection(owner, layers)
            if projection is not None:
                if _num_channels(projection) % number == 0:
                    found.setdefault(owner, Heads(projection, number))
                break
    return {name: found[name] for name in layers if name in found}


def _why_unreachable(module: nn.Module) -> str:
    """Why the outputs of an attention layer's heads cannot be hooked; empty if nothing is known against it."""
    if isinstance(module, nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention computes attention and output projection in one function without a hook"
    if type(module).__module__ == "timm.models.nest":
        return "NesT interleaves the channels of its heads"
    return ""


def _given(name: str, layers: Mapping[str, nn.Module], number: int) -> Heads:
    projection = _projection(name, layers) or layers[name]
    if not _is_projection(projection):
        raise ArgumentError(
            f"`layers` asks for the heads of '{name}', whose output projection is not known; name the projection and"
            f" the number of heads, such as `layers=['{name}.out.heads={number}']`."
        )
    if number == 0 or _num_channels(projection) % number:
        raise ArgumentError(
            f"`layers` asks for {number} heads of '{name}', among which the {_num_channels(projection)} channels of its"
            f" output projection cannot be divided; give the number of heads that it has."
        )
    return Heads(projection, number)


def _projection(name: str, layers: Mapping[str, nn.Module]) -> nn.Module | None:
    """The output projection of an attention layer."""
    is_named_so = name in layers and "attention" in type(layers[name]).__name__.lower()
    names = (*_PROJECTIONS, _PROJECTION_BESIDE) if is_named_so else _PROJECTIONS
    found = (layers.get(f"{name}.{child}") for child in names if name)
    return next((module for module in found if module is not None and _is_projection(module)), None)


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _num_channels(projection: nn.Module) -> int:
    """Size of the input; 0 if the module does not say it."""
    size = getattr(projection, "in_features", getattr(projection, "nx", 0))
    return size if isinstance(size, int) else 0


def _num_heads(module: nn.Module) -> int | None:
    """The number of heads that a module says it has; the classes of transformers may say it in their configuration."""
    own = vars(module)
    sources = [own]
    if "attention" in type(module).__name__.lower() and own.get("config") is not None:
        config = own["config"]
        sources.append({name: getattr(config, name, None) for name in _NUMBERS})
    numbers = (source.get(name) for source in sources for name in _NUMBERS)
    return next((number for number in numbers if type(number) is int and number > 0), None)
