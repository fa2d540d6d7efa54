"""Where paths run: the layers whose units they choose from, and where in an output its units lie."""

import dis
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_neuro.layers import DEFAULT_MAX_LAYERS, named_layers, resolve_layers

Layers = str | Sequence[str] | Mapping[str, nn.Module] | None


def path_layers(model: nn.Module, layers: Layers = None) -> dict[str, nn.Module]:
    """The layers between which paths run.

    Args:
        model: The model.
        layers: Names or globs, as `Probe(layers=...)` takes them; or module by name; or None for the default: the
            outputs of residual blocks where the model has at least two that convolve, else the outputs of its
            activation modules, else of its linear and convolution layers without the last; eight at most, evenly
            spread over the depth.

    Returns:
        Module by name.

    Raises:
        MisconfigurationException: If a pattern matches no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(path_layers(net))
        ['1']
    """
    if isinstance(layers, Mapping):
        return dict(layers)
    if layers is None and len(blocks := residual_blocks(model)) >= 2:
        names, last = list(blocks), len(blocks) - 1
        if len(names) > DEFAULT_MAX_LAYERS:
            names = [names[round(i * last / (DEFAULT_MAX_LAYERS - 1))] for i in range(DEFAULT_MAX_LAYERS)]
        return {name: blocks[name] for name in names}
    return resolve_layers(model, layers)


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules below a model that convolve and add in their own `forward`, innermost only, by name."""
    found = {name: module for name, module in named_layers(model).items() if _adds(module) and _convolves(module)}
    return {
        name: module
        for name, module in found.items()
        if not any(inner in found.values() for inner in module.modules() if inner is not module)
    }


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, _ConvNd) for part in module.modules() if part is not module)


def _adds(module: nn.Module) -> bool:
    # Read and not traced: running a user's forward, even symbolically, could change what it counts or logs.
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(
        step.opname == "BINARY_OP" and step.argrepr in ("+", "+=") for step in dis.get_instructions(code)
    )


def unit_axes(output: Tensor, num_samples: int, units_last: bool | None) -> tuple[int, int]:
    """The dimensions of a layer's output that count the samples and the units.

    Args:
        output: A layer's output.
        num_samples: N.
        units_last: As `lightning_neuro.layers.latest_layout` tells it; None: not known.

    Raises:
        ValueError: If it is not floating-point, or has no such dimensions.
    """
    shape = tuple(output.shape)
    if not output.is_floating_point() or output.ndim < 2:
        raise ValueError(f"its output has no units: it is {output.dtype} of shape {shape}")
    if shape[0] == num_samples:
        last = output.ndim == 3 if units_last is None else units_last
        return 0, (output.ndim - 1 if last else 1)
    if output.ndim == 3 and shape[1] == num_samples:  # recurrent and attention layers put the time first
        return 1, 2
    raise ValueError(f"its output of shape {shape} does not have the {num_samples} samples in its first dimension")


def broadcast(per_unit: Tensor, output: Tensor, axes: tuple[int, int]) -> Tensor:
    """(N, units) or (1, units), shaped so that it multiplies a layer's output."""
    shape = [1] * output.ndim
    shape[axes[0]], shape[axes[1]] = per_unit.shape
    return per_unit.reshape(shape)


def unit_means(output: Tensor, axes: tuple[int, int]) -> Tensor:
    """(N, units): the mean of a layer's output over the positions."""
    positions = [dim for dim in range(output.ndim) if dim not in axes]
    return output.mean(positions) if positions else output


def with_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """A layer's output with one tensor replaced: recurrent and attention layers return tuples, some models mappings."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        changed = {key: with_tensor(value, old, new) for key, value in output.items()}
        return type(output)(**changed) if type(output) is not dict else changed
    if isinstance(output, (tuple, list)):
        parts = [with_tensor(value, old, new) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


def take(inputs: Any, rows: Tensor, num_samples: int) -> Any:
    """Chosen samples of a model's inputs, as often as they are named: of every tensor that has a dimension for them."""
    if isinstance(inputs, Tensor):
        for dim in range(min(2, inputs.ndim)):
            if inputs.shape[dim] == num_samples:
                return inputs.index_select(dim, rows.to(inputs.device))
        return inputs
    if isinstance(inputs, Mapping):
        changed = {key: take(value, rows, num_samples) for key, value in inputs.items()}
        return changed if type(inputs) is dict else type(inputs)(changed)  # type: ignore[call-arg]
    if isinstance(inputs, (tuple, list)):
        parts = [take(value, rows, num_samples) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def join(parts: Sequence[Any], num_samples: Sequence[int]) -> Any:
    """Several batches of a model's inputs as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        for dim in range(min(2, first.ndim)):
            if [part.shape[dim] for part in parts] == list(num_samples):
                return torch.cat(list(parts), dim=dim)
        return first
    if isinstance(first, Mapping):
        joined = {key: join([part[key] for part in parts], num_samples) for key in first}
        return joined if type(first) is dict else type(first)(joined)  # type: ignore[call-arg]
    if isinstance(first, (tuple, list)):
        columns = [join(column, num_samples) for column in zip(*parts, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    return first


def class_scores(output: Any, num_samples: int) -> Tensor:
    """The (N, classes) logits in what a model returns.

    Raises:
        ValueError: If there are none.
    """
    found: Any = output
    if isinstance(output, Mapping):
        found = output.get("logits", next((value for value in output.values() if isinstance(value, Tensor)), None))
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    is_table = isinstance(found, Tensor) and found.is_floating_point() and found.ndim == 2
    if isinstance(found, Tensor) and is_table and found.shape[0] == num_samples and found.shape[1] >= 2:
        return found
    seen = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
    raise ValueError(
        f"Paths need a model that returns logits of shape (N, classes), with at least 2 classes; for {num_samples}"
        f" samples it returned {seen}."
    )


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class of the model.

    Raises:
        ValueError: Saying which.
    """
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or targets.ndim != 1:
        raise ValueError(f"targets must be (N,) whole numbers, got {targets.dtype} of shape {tuple(targets.shape)}.")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"targets must be classes of the model, 0 to {num_classes - 1}, but reach from {int(targets.min())} to"
            f" {int(targets.max())}."
        )
