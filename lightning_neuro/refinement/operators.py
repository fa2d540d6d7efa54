"""Linear layers and convolutions as operators on their weights: apply, and the weight gradient source by source."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

Operator = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
OPERATORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Multiplications up to which a linear layer's split is one matrix product over all sources. It costs as many times the
# weight gradient as there are sources, but never makes an accelerator wait for the host to sort the labels.
ONE_PRODUCT = 2**27


@dataclass(frozen=True)
class Sources:
    """Which source each sample of a batch belongs to.

    Attributes:
        rows: (B,) int64, in 0 .. num - 1.
        num: Number of sources.
    """

    rows: Tensor
    num: int

    @cached_property
    def counts(self) -> Tensor:
        """Samples per source, (num,) float64 (float32 where a device lacks it)."""
        ones = torch.ones(len(self.rows), dtype=ledger_dtype(self.rows.device), device=self.rows.device)
        return ones.new_zeros(self.num).index_add_(0, self.rows, ones)

    @cached_property
    def members(self) -> dict[int, Tensor]:
        """Source -> positions of its samples in the batch; reads the labels on the host."""
        order = torch.argsort(self.rows, stable=True)
        sizes = torch.bincount(self.rows, minlength=self.num).tolist()
        return {source: part for source, part in enumerate(torch.split(order, sizes)) if len(part)}


def ledger_dtype(device: torch.device) -> torch.dtype:
    """What additive statistics are kept in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def why_unsupported(module: nn.Module) -> str:
    """Why a module's refinement cannot be traced, or an empty string."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if not isinstance(module, OPERATORS):
        return f"it is a {type(module).__name__}; Linear, Conv1d, Conv2d and Conv3d are supported"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight has no shape yet; run the module once before the fit"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters (a parametrisation); remove the parametrisation"
    return ""


def apply(module: Operator, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output for other weights than its own."""
    if isinstance(module, nn.Linear):
        return F.linear(inputs, weight, bias)
    output: Tensor = module._conv_forward(inputs, weight, bias)
    return output


def samples_first(module: Operator, inputs: Tensor, gradients: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Bring the batch's samples to the first dimension of a layer's inputs and output gradients.

    Linear layers may have them second, after the time; where both dimensions are as long, the first is taken.

    Raises:
        ValueError: If neither has the batch's number of samples.
    """
    unbatched = inputs.ndim == (1 if isinstance(module, nn.Linear) else module.weight.ndim - 1)
    if unbatched:
        inputs, gradients = inputs[None], gradients[None]
    rows = inputs.shape[0]
    if rows == num_samples:
        return inputs, gradients
    if isinstance(module, nn.Linear) and inputs.ndim == 3 and inputs.shape[1] == num_samples:
        return inputs.transpose(0, 1), gradients.transpose(0, 1)  # recurrent and attention layers: time first
    # Never a guess: k times as many rows may be views one after the other, or positions of each sample.
    raise ValueError(
        f"its input of shape {tuple(inputs.shape)} does not have the {num_samples} samples of the batch in its first"
        " dimension. Say whose each row is with `sources=`, for two views of a batch for example"
        " `sources=lambda batch: torch.cat([batch[1], batch[1]])`"
    )


def source_gradients(module: Operator, inputs: Tensor, gradients: Tensor, sources: Sources) -> dict[str, Tensor]:
    """Split the gradient of the layer's parameters by the source of the samples that caused it.

    Args:
        module: The layer.
        inputs: (B, ..., features) or (B, channels, ...), what the layer was given.
        gradients: Gradient with respect to its output, same layout.
        sources: The samples' sources.

    Returns:
        `"weight"`: (sources, *weight shape), and `"bias"`: (sources, outputs) where the layer has one; their sum over
        the sources is the gradient of a usual backward pass.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> inputs, gradients = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 1)
        >>> source_gradients(layer, inputs, gradients, Sources(torch.tensor([0, 1]), 2))["weight"].tolist()
        [[[1.0, 2.0]], [[3.0, 4.0]]]
    """
    # As autocast does: the layer multiplied in the lower precision, and its gradient has the products of these values.
    inputs = inputs.to(gradients.dtype)
    dtype = torch.promote_types(gradients.dtype, torch.float32)
    inputs, gradients = inputs.to(dtype), gradients.to(dtype)
    split: dict[str, Tensor] = {}
    if isinstance(module, nn.Linear):
        inputs, gradients = (part.reshape(len(part), -1, part.shape[-1]) for part in (inputs, gradients))
        split["weight"] = _linear(inputs, gradients, sources)
        per_sample = gradients.sum(1)
    else:
        split["weight"] = gradients.new_zeros(sources.num, *module.weight.shape)
        for source, members in sources.members.items():
            split["weight"][source] = _conv_weight(module, inputs[members], gradients[members])
        per_sample = gradients.flatten(2).sum(2)
    if module.bias is not None:
        split["bias"] = per_sample.new_zeros(sources.num, per_sample.shape[1]).index_add_(0, sources.rows, per_sample)
    return split


def _linear(inputs: Tensor, gradients: Tensor, sources: Sources) -> Tensor:
    """Of inputs (B, positions, in) and gradients (B, positions, out): (sources, out, in)."""
    num_in, num_out = inputs.shape[-1], gradients.shape[-1]
    if sources.num * num_in * gradients.numel() <= ONE_PRODUCT:
        chosen = F.one_hot(sources.rows, sources.num).to(inputs.dtype)
        spread = torch.einsum("bk,bpo->bpko", chosen, gradients)
        return (spread.reshape(-1, sources.num * num_out).T @ inputs.reshape(-1, num_in)).view(-1, num_out, num_in)
    split = inputs.new_zeros(sources.num, num_out, num_in)
    for source, members in sources.members.items():
        split[source] = gradients[members].flatten(0, 1).T @ inputs[members].flatten(0, 1)
    return split


def _conv_weight(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, gradients: Tensor) -> Tensor:
    dims = module.weight.ndim - 2
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs, padding = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode), [0] * dims
    else:
        padding = list(module.padding)
    weight = module.weight.detach().to(gradients.dtype)  # only its shape is looked at
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


def parameters_of(module: Operator) -> Mapping[str, nn.Parameter]:
    """The parameters whose refinement is traced, by name: `"weight"`, and `"bias"` where there is one."""
    return {name: value for name, value in module._parameters.items() if value is not None}
