"""Finds the units in a layer's output."""

from collections.abc import Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_neuro.batches import sample_dim
from lightning_neuro.checks import ArgumentError, as_labels, describe, require
from lightning_neuro.heads import Layer
from lightning_neuro.layers import resolve_layers
from lightning_neuro.paths.options import Layers


class UnitAxes(NamedTuple):
    """The dimensions of a layer's output along which the samples and the units lie."""

    samples: int
    units: int


def modules_of(model: nn.Module, layers: Layers = None) -> dict[str, Layer]:
    """The selected layers, as modules or heads by name; None for the default layers of all callbacks.

    Raises:
        MisconfigurationException: If a pattern matches no module.
    """
    return dict(layers) if isinstance(layers, Mapping) else resolve_layers(model, layers)


def unit_axes(output: Tensor, num_samples: int, units_last: bool | None, known_dim: int | None = None) -> UnitAxes:
    """The dimensions of a layer's output along which the samples and the units lie.

    Args:
        output: A layer's output.
        num_samples: N.
        units_last: Whether the units lie on the last dimension, as `lightning_neuro.units.latest_layout` determines it;
            None if it is not known.
        known_dim: The dimension of the samples, if two dimensions have N entries.

    Returns:
        The two dimensions.

    Raises:
        ValueError: If the output is not floating-point, or has no such dimensions.
    """
    shape = tuple(output.shape)
    if not output.is_floating_point() or output.ndim < 2:
        raise ValueError(f"its output has no units: it is {describe(output)}")
    samples = sample_dim(output, num_samples)
    if known_dim is not None and output.ndim == 3 and output.shape[known_dim] == num_samples:
        samples = known_dim
    if samples == 0:
        last = output.ndim == 3 if units_last is None else units_last
        return UnitAxes(0, output.ndim - 1 if last else 1)
    if samples == 1 and output.ndim == 3:  # recurrent and attention layers put the time first
        return UnitAxes(1, 2)
    raise ValueError(f"its output of shape {shape} does not have the {num_samples} samples in its first dimension")


def broadcast(per_unit: Tensor, output: Tensor, axes: UnitAxes) -> Tensor:
    """Values of shape (N, units) or (1, units), reshaped so that they multiply a layer's output.

    If the units are heads, the value of each is repeated for all of its channels.
    """
    per_unit = per_unit.repeat_interleave(output.shape[axes.units] // per_unit.shape[1], dim=1)
    shape = [1] * output.ndim
    shape[axes.samples], shape[axes.units] = per_unit.shape
    return per_unit.reshape(shape)


def unit_means(output: Tensor, axes: UnitAxes) -> Tensor:
    """(N, units): the mean of a layer's output over the positions."""
    positions = [dim for dim in range(output.ndim) if dim not in axes]
    return output.mean(positions) if positions else output


def with_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """A layer's output with one tensor replaced; the output may be a tensor, tuple, list, mapping or dataclass."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        changed = {key: with_tensor(value, old, new) for key, value in output.items()}
        return type(output)(**changed) if type(output) is not dict else changed
    if isinstance(output, (tuple, list)):
        parts = [with_tensor(value, old, new) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if is_dataclass(output) and not isinstance(output, type):
        replaced: Any = copy(output)
        for field in fields(output):
            # Not by the constructor, which may not take every field; and a frozen dataclass has no other setter.
            object.__setattr__(replaced, field.name, with_tensor(getattr(output, field.name), old, new))
        return replaced
    return output


def integer_labels(labels: Any, *, name: str = "targets") -> Tensor:
    """Labels as int64 (N,), for any N.

    Raises:
        ArgumentError: If they are not one integer per sample.
    """
    found = as_labels(labels, len(labels) if getattr(labels, "ndim", 0) else 0, name=name)
    if found is None:
        raise ArgumentError(f"`{name}` must be integers of shape (N,), one per sample; got None.")
    return found


def check_classes(targets: Tensor, num_classes: int) -> None:
    """Require that labels are classes of the model.

    Raises:
        ArgumentError: If one is negative or has no logit.
    """
    if len(targets):
        low, high = int(targets.min()), int(targets.max())
        must = f"be classes of the model, 0 to {num_classes - 1}"
        if not 0 <= low <= high < num_classes:
            raise ArgumentError(f"`targets` must {must}; got labels from {low} to {high}.")


def check_groups(concepts: Tensor, num_concepts: int) -> None:
    """Require that every concept has a row in the paths or scores.

    Raises:
        ArgumentError: If a concept has no row.
    """
    largest = int(concepts.max()) if len(concepts) else -1
    if largest >= num_concepts:
        raise ArgumentError(f"`concepts` must be below {num_concepts}, the number of paths; got concept {largest}.")


def check_same_length(concepts: Tensor, targets: Tensor) -> None:
    """Require one concept per sample."""
    require(concepts.shape == targets.shape, "concepts", f"be integers of shape ({len(targets)},)", concepts)
