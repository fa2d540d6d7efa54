"""Conversion of a layer's output to a matrix with a row per sample and a column per unit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

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
        with suppress(TypeError, RuntimeError):  # an output without a tensor, or with a nested one, determines nothing
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


class UnitRows(NamedTuple):
    """A layer's output as a matrix.

    Attributes:
        values: (R, units).
        samples: (R,) int64, the sample of each row; None: one row for each sample, in order.
        positions: (R,) int64, the position of each row within its sample; None if the rows are no single positions.
        grid: Shape of the positions of a sample; empty if there is only one.
        aligned: Whether it is known which sample each row belongs to.
    """

    values: Tensor
    samples: Tensor | None = None
    positions: Tensor | None = None
    grid: tuple[int, ...] = ()
    aligned: bool = True


def selected(units: UnitRows, samples: Tensor) -> UnitRows:
    """The rows of some samples, which are numbered anew; rows that belong to no sample stay."""
    if not units.aligned:
        return units
    if units.samples is None:
        rows = samples.to(units.values.device)
        positions = None if units.positions is None else units.positions[rows]
        return units._replace(values=units.values[rows], positions=positions)
    new = torch.full((int(units.samples.max()) + 1,), -1, device=units.samples.device)
    new[samples.to(new.device)] = torch.arange(len(samples), device=new.device)
    rows = (new[units.samples] >= 0).nonzero().flatten()
    positions = None if units.positions is None else units.positions[rows]
    return units._replace(values=units.values[rows], samples=new[units.samples[rows]], positions=positions)


def to_units(output: Tensor, reduction: Reduction = "mean", **options: Any) -> Tensor:
    """The values of `unit_rows`, for the same arguments.

    Example:
        >>> import torch
        >>> to_units(torch.arange(8.0).reshape(1, 2, 2, 2)).tolist()
        [[1.5, 5.5]]
    """
    return unit_rows(output, reduction, **options).values


def unit_rows(
    output: Tensor,
    reduction: Reduction = "mean",
    *,
    units_last: bool | None = None,
    mask: Tensor | None = None,
    fractions: Tensor | None = None,
) -> UnitRows:
    """Turn a layer's output into a matrix with a row per sample and a column per unit.

    Args:
        output: Floating-point tensor whose dimension 0 is the sample. Shape (N, units) is returned unchanged.
        reduction: How the positions (pixels, tokens) are reduced: `"mean"` or `"max"` over them; `"random"`: one
            position per sample; `"cls"`: the first position; `"tokens"`: each position is a separate row, sample after
            sample; `"flatten"`: each unit at each position is a separate unit.
        units_last: Whether the units lie on the last dimension, else on dimension 1; None: last for three dimensions
            (tokens), dimension 1 for more (feature maps).
        mask: Bool (N, positions), False for padding, which is left out; for `"flatten"` it becomes 0. A mask for
            another number of positions is not used. A sample without any position is treated as if all were valid.
        fractions: (N,) in [0, 1), which of the positions to take for `"random"`; default: drawn at random.

    Returns:
        The matrix, of shape (N, units), or (positions, units) for `"tokens"`.

    Raises:
        ValueError: If the output has no sample dimension or is not floating-point.
    """
    if not output.is_floating_point() or output.ndim == 0:
        raise ValueError(
            f"A layer's output must be a floating-point tensor with a sample dimension; it is {output.dtype} of shape"
            f" {tuple(output.shape)}."
        )
    if output.ndim == 1:
        return UnitRows(output.unsqueeze(1))
    if output.ndim == 2:
        return UnitRows(output)
    if units_last is None:
        units_last = output.ndim == 3
    # (N, positions, units)
    positions = output.flatten(1, -2) if units_last else output.flatten(2).transpose(1, 2)
    fits = mask is not None and mask.shape == positions.shape[:2]
    mask = mask | ~mask.any(1, keepdim=True) if fits and mask is not None else None
    if reduction == "flatten":
        return UnitRows((output if mask is None else positions * mask[..., None]).flatten(1))
    grid = tuple(output.shape[1:-1] if units_last else output.shape[2:])
    return _reduce(positions, reduction, mask, fractions)._replace(grid=grid)


def _reduce(positions: Tensor, reduction: Reduction, mask: Tensor | None, fractions: Tensor | None) -> UnitRows:
    samples, count, _ = positions.shape
    device = positions.device
    if reduction == "mean":
        if mask is None:
            return UnitRows(positions.mean(dim=1))
        kept = positions.masked_fill(~mask[..., None], 0.0)
        return UnitRows(kept.sum(dim=1) / mask.sum(1, keepdim=True))
    if reduction == "max":
        return UnitRows((positions if mask is None else positions.masked_fill(~mask[..., None], -torch.inf)).amax(1))
    if reduction == "cls":
        return UnitRows(positions[:, 0], positions=torch.zeros(samples, dtype=torch.long, device=device))
    if reduction == "tokens":
        valid = torch.ones(samples, count, dtype=torch.bool, device=device) if mask is None else mask
        of_sample, at = valid.nonzero(as_tuple=True)
        return UnitRows(positions[of_sample, at], of_sample, at)
    fractions = torch.rand(samples) if fractions is None else fractions
    valid_counts = torch.full((samples,), count, device=device) if mask is None else mask.sum(1)
    chosen = (fractions.to(device) * valid_counts).long().clamp(max=valid_counts - 1)
    if mask is not None:  # the chosen-th of the valid positions
        chosen = (mask.cumsum(1) > chosen[:, None]).long().argmax(1)
    return UnitRows(positions[torch.arange(samples, device=device), chosen], positions=chosen)
