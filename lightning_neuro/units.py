"""Conversion of a layer's output to a matrix with a row per sample and a column per unit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm as _batchnorm
from torch.nn.modules import conv as _conv
from torch.nn.modules import instancenorm as _instancenorm
from torch.nn.modules import pooling as _pooling

from lightning_neuro.batches import first_tensor
from lightning_neuro.hooks import ForwardHook

Reduction = Literal["mean", "max", "random", "tokens", "cls", "flatten"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def own_modules(source: ModuleType) -> tuple[type[nn.Module], ...]:
    """The module classes that a file of `torch.nn.modules` defines itself."""
    classes = [cls for cls in vars(source).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    return tuple(cls for cls in classes if cls.__module__ == source.__name__)


# The units of an output lie on the last dimension after these layers ...
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
# ... and on dimension 1 after these.
_CHANNELS_FIRST = (
    *(_conv._ConvNd, _batchnorm._NormBase, _instancenorm._InstanceNorm, nn.GroupNorm),
    *own_modules(_pooling),
)


@contextmanager
def latest_layout(model: nn.Module) -> Iterator[Callable[[Tensor], bool | None]]:
    """Track the dimension of the units while the model runs, because the same ReLU may follow convolutions and tokens.

    The dimension is that of the latest layer that determines it (linear layers and normalisation over features: last;
    convolutions: dimension 1) and, after a permutation, the dimension with this layer's number of units.

    Yields:
        A function of the output that was just computed: whether its units lie on the last dimension (True) or on
        dimension 1 (False); None as long as no such layer has run.
    """
    latest: tuple[bool, int] | None = None

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal latest
        last = isinstance(module, _CHANNELS_LAST)
        with suppress(TypeError):  # an output without a tensor determines nothing
            tensor = first_tensor(output)
            if tensor.ndim > 1:
                latest = last, tensor.shape[-1 if last else 1]

    def units_last(output: Tensor) -> bool | None:
        if latest is None or output.ndim < 3:
            return None
        last, units = latest
        at_end, at_front = output.shape[-1] == units, output.shape[1] == units
        return at_end if at_end != at_front else last

    deciding = [module for module in model.modules() if isinstance(module, (*_CHANNELS_LAST, *_CHANNELS_FIRST))]
    handles = [module.register_forward_hook(ForwardHook(note)) for module in deciding]
    try:
        yield units_last
    finally:
        for handle in handles:
            handle.remove()


def to_units(
    output: Tensor,
    reduction: Reduction = "mean",
    *,
    units_last: bool | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turn a layer's output into a matrix with a row per sample and a column per unit.

    Args:
        output: Floating-point tensor whose dimension 0 is the sample. Shape (N, units) is returned unchanged.
        reduction: How the positions (pixels, tokens) are reduced: `"mean"` or `"max"` over them; `"random"`: one
            position per sample; `"cls"`: the first position; `"tokens"`: each position is a separate row, sample after
            sample; `"flatten"`: each unit at each position is a separate unit.
        units_last: Whether the units lie on the last dimension, else on dimension 1; None: last for three dimensions
            (tokens), dimension 1 for more (feature maps).
        generator: Generator of the positions for `"random"`, on the CPU.

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
