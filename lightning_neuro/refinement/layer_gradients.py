"""The weight gradient of a linear or convolution layer, split by the source of the samples that caused it."""

from collections.abc import Mapping
from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from lightning_neuro.refinement.patches import CONVOLUTIONS, Convolution, padded, patches_of
from lightning_neuro.refinement.position_sums import chunks
from lightning_neuro.refinement.sources import Sources, ledger_dtype

Operator = nn.Linear | Convolution

# Up to this many multiplications the gradient of a linear layer is split by one matrix product over all sources. It
# costs as many times the weight gradient as there are sources, but the host never has to read the labels.
ONE_PRODUCT = 2**27


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is the `Conv1D` of Hugging Face transformers: a linear layer whose weight is (in, out)."""
    weight = module._parameters.get("weight")
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return named and weight is not None and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer, y = x W^T + b, or one whose weight is transposed (`is_transposed_linear`)."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def why_unsupported(module: nn.Module) -> str:
    """The reason why the refinement of a module cannot be computed; empty if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if not is_linear(module) and not isinstance(module, CONVOLUTIONS):
        return f"it is a {type(module).__name__}; Linear, Conv1d, Conv2d and Conv3d are supported"
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return "its weight has no shape yet; run the module once before the fit"
    if "weight_orig" in module._parameters:
        return "it is pruned: its weight is computed from `weight_orig` and a mask, until `prune.remove` is called"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters (a parametrization), which must be removed first"
    return ""


def parameters_of(module: Operator) -> Mapping[str, nn.Parameter]:
    """The parameters of a layer by name: `"weight"`, and `"bias"` if it has one."""
    return {name: value for name, value in module._parameters.items() if value is not None}


def num_outputs(module: Operator) -> int:
    """Number of output units (channels) of a layer."""
    return module.weight.shape[1 if is_transposed_linear(module) else 0]


def units_last(module: Operator, outputs: Tensor) -> Tensor:
    """Outputs of the layer as (B, positions, units)."""
    if is_linear(module):
        return outputs.reshape(len(outputs), -1, outputs.shape[-1])
    return outputs.flatten(2).mT


def by_group(module: Operator, weights: Tensor) -> Tensor:
    """Weights (N, *weight shape) of the layer as (N, groups, outputs, inputs) of each group; a linear layer is one."""
    if is_transposed_linear(module):
        return weights.mT.unsqueeze(1)
    groups = getattr(module, "groups", 1)
    return weights.reshape(len(weights), groups, weights.shape[1] // groups, -1)


def layer_output(module: Operator, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of the layer with another weight and bias; its hooks do not run."""
    if is_linear(module):
        return F.linear(inputs, weight.T if is_transposed_linear(module) else weight, bias)
    assert isinstance(module, CONVOLUTIONS)
    output: Tensor = module._conv_forward(inputs, weight, bias)
    return output


def weights_on_cpu(module: nn.Module) -> list[Tensor]:
    """Copies of the weight and, if there is one, the bias of a layer."""
    parameters = (getattr(module, name) for name in ("weight", "bias"))
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters if parameter is not None]


def fitting_dims(module: Operator, inputs: Tensor, num_samples: int) -> list[int]:
    """The dimensions of a layer's input along which the samples may lie: 0, and 1 after the time, if the sizes fit."""
    # Recurrent and attention layers put the time first by default.
    time_first = is_linear(module) and inputs.ndim == 3
    return [dim for dim in ((0, 1) if time_first else (0,)) if inputs.shape[dim] == num_samples]


def layer_samples_first(
    module: Operator, inputs: Tensor, gradients: Tensor, num_samples: int, dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Bring the samples of the batch to the first dimension of a layer's inputs and output gradients.

    Args:
        module: The layer.
        inputs: Its input.
        gradients: Gradient of the loss with respect to its output, in the same layout.
        num_samples: Number of samples in the batch.
        dim: The dimension of the samples, if two of them have this size; default: the first of those.

    Raises:
        ValueError: If neither dimension has the number of samples of the batch.
    """
    unbatched = inputs.ndim == (1 if is_linear(module) else module.weight.ndim - 1)
    if unbatched:
        inputs, gradients = inputs[None], gradients[None]
    if dims := fitting_dims(module, inputs, num_samples):
        dim = dim if dim in dims else dims[0]
        return inputs.transpose(0, dim), gradients.transpose(0, dim)
    # The layout is not guessed: k times as many rows may be k views of the batch, or k positions of each sample.
    raise ValueError(
        f"its input of shape {tuple(inputs.shape)} does not have the {num_samples} samples of the batch in its first"
        " dimension, so it is not known to which sample each row belongs. Pass a `source_fn` that returns the source of"
        " each row; for two views of a batch, `source_fn=lambda batch: torch.cat([batch[1], batch[1]])`"
    )


def source_gradients(module: Operator, inputs: Tensor, gradients: Tensor, sources: Sources) -> dict[str, Tensor]:
    """Split the gradient of the layer's parameters by the source of the samples that caused it.

    Args:
        module: The layer.
        inputs: Its input, (B, ..., features) or (B, channels, ...).
        gradients: Gradient of the loss with respect to its output, in the same layout.
        sources: The sources of the samples.

    Returns:
        `"weight"`: (sources, *weight shape), and `"bias"`: (sources, outputs) if the layer has one. Summed over the
        sources they are the gradient of an ordinary backward pass.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> inputs, gradients = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 1)
        >>> source_gradients(layer, inputs, gradients, Sources(torch.tensor([0, 1]), 2))["weight"].tolist()
        [[[1.0, 2.0]], [[3.0, 4.0]]]
    """
    dtype = torch.promote_types(gradients.dtype, torch.float32)
    sums = {
        name: torch.zeros(sources.num, *parameter.shape, dtype=dtype, device=gradients.device)
        for name, parameter in parameters_of(module).items()
    }
    add_source_gradients(module, inputs, gradients, sources, sums)
    return sums


def add_source_gradients(
    module: Operator,
    inputs: Tensor,
    gradients: Tensor,
    sources: Sources,
    sums: Mapping[str, Tensor],
    *,
    may_wait: bool = False,
) -> None:
    """Add the gradients by source to earlier sums, in place; the arguments are those of `source_gradients`.

    Args:
        module: The layer.
        inputs: Its input.
        gradients: Gradient of the loss with respect to its output.
        sources: The sources of the samples.
        sums: `"weight"` and `"bias"`, as `source_gradients` returns them.
        may_wait: Whether the host may wait for the device, which is faster for many sources.
    """
    # As under autocast: the layer multiplied in the lower precision, so its gradient consists of the rounded values.
    inputs = inputs.to(gradients.dtype)
    dtype = torch.promote_types(gradients.dtype, torch.float32)
    inputs, gradients = inputs.to(dtype), gradients.to(dtype)
    # On a GPU, the host would have to wait to read which samples are of a source.
    reads = may_wait or inputs.device.type == "cpu"
    if is_linear(module):
        inputs, gradients = (part.reshape(len(part), -1, part.shape[-1]) for part in (inputs, gradients))
        weight = sums["weight"].mT if is_transposed_linear(module) else sums["weight"]
        if not may_wait and sources.num * inputs.shape[2] * gradients.numel() <= ONE_PRODUCT:
            weight += _in_one_product(inputs, gradients, sources)
        elif reads:
            a, d = (part.to(weight.dtype) for part in (inputs, gradients))
            for source, members in sources.members.items():
                weight[source].addmm_(d[members].flatten(0, 1).T, a[members].flatten(0, 1))
        else:
            add_by_sample(weight, inputs, gradients, sources)
        per_sample = gradients.sum(1)
    else:
        assert isinstance(module, CONVOLUTIONS)
        if reads:
            for source, members in sources.members.items():
                sums["weight"][source] += _conv_weight(module, inputs[members], gradients[members])
        else:
            add_by_sample(sums["weight"], inputs, gradients, sources, module)
        per_sample = gradients.flatten(2).sum(2)
    if module.bias is not None:
        sums["bias"].index_add_(0, sources.rows, per_sample.to(sums["bias"].dtype))


def input_sums(module: Operator, inputs: Tensor, outputs: Tensor, sources: Sources) -> Tensor:
    """The inputs from which single outputs of the layer are computed, summed over positions and samples, by source.

    Args:
        module: The layer.
        inputs: Its input, (B, ..., features) or (B, channels, ...).
        outputs: Its output, of which only the shape is used.
        sources: The sources of the samples.

    Returns:
        (sources, groups, inputs), as in `by_group`: what the weights of any output of a group are multiplied with.
        Float64 (float32 on devices without it).

    Example:
        >>> layer = nn.Conv1d(1, 4, 2)
        >>> inputs = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 5.0]]])
        >>> input_sums(layer, inputs, layer(inputs), Sources(torch.tensor([1, 1]), 2)).tolist()
        [[[0.0, 0.0]], [[3.0, 10.0]]]
    """
    dtype = ledger_dtype(inputs.device)
    if is_linear(module):
        per_sample = inputs.reshape(len(inputs), -1, inputs.shape[-1]).to(dtype).sum(1)
        sums = per_sample.new_zeros(sources.num, per_sample.shape[1]).index_add_(0, sources.rows, per_sample)
        return sums.unsqueeze(1)
    assert isinstance(module, CONVOLUTIONS)
    # Of the sum over samples, because a convolution is linear in its input.
    summed = inputs.new_zeros(sources.num, *inputs.shape[1:], dtype=dtype)
    summed = summed.index_add_(0, sources.rows, inputs.to(dtype))
    ones = summed.new_ones(1, module.groups, *outputs.shape[2:])
    return torch.stack([_conv_weight(module, part[None], ones, one_output=True) for part in summed]).flatten(2)


def _in_one_product(inputs: Tensor, gradients: Tensor, sources: Sources) -> Tensor:
    """(B, positions, in) inputs and (B, positions, out) gradients -> (sources, out, in)."""
    num_in, num_out = inputs.shape[-1], gradients.shape[-1]
    spread = torch.einsum("bk,bpo->bpko", sources.one_hot.to(inputs.dtype), gradients)
    return (spread.reshape(-1, sources.num * num_out).T @ inputs.reshape(-1, num_in)).view(-1, num_out, num_in)


def add_by_sample(
    sums: Tensor, inputs: Tensor, gradients: Tensor, sources: Sources, convolution: Convolution | None = None
) -> None:
    """Add weight gradients by source, from that of each sample; the host reads nothing.

    Args:
        sums: (sources, *weight shape), changed in place.
        inputs: (B, positions, in) for linear layers, (B, channels, ...) for a convolution.
        gradients: Output gradients in the same layout.
        sources: The sources of the samples.
        convolution: The convolution; None for a linear layer.
    """
    groups = 1 if convolution is None else convolution.groups
    rows, shape = sources.rows, sums.shape[1:]
    elements = shape.numel()
    if convolution is not None:
        elements += shape[1:].numel() * groups * gradients.shape[2:].numel()
    for a, d in chunks(inputs, gradients, elements):
        mine, rows = rows[: len(a)], rows[len(a) :]
        if convolution is None:
            product = torch.bmm(d.mT, a)
        else:
            patches = patches_of(convolution, padded(convolution, a))
            patches, d = (part.reshape(len(a) * groups, -1, patches.shape[2]) for part in (patches, d))
            product = torch.bmm(d, patches.mT)
        sums.index_add_(0, mine, product.reshape(len(a), *shape).to(sums.dtype))


def _conv_weight(module: Convolution, inputs: Tensor, gradients: Tensor, *, one_output: bool = False) -> Tensor:
    """The weight gradient; with `one_output`, of a convolution with one output per group."""
    dims = module.weight.ndim - 2
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs, padding = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode), [0] * dims
    else:
        padding = list(module.padding)
    weight = module.weight.detach().to(gradients.dtype)  # only its shape is used
    weight = weight[: module.groups] if one_output else weight
    _, gradient, _ = torch.ops.aten.convolution_backward(
        gradients,
        inputs,
        weight,
        None,
        module.stride,
        padding,
        module.dilation,
        False,
        [0] * dims,
        module.groups,
        [False, True, False],
    )
    result: Tensor = gradient
    return result
