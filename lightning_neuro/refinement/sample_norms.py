"""Norms of per-sample weight gradients, from the inputs and output gradients of a layer, without a backward pass.

The weight gradient of one sample is the sum over positions p (pixels, tokens) of d_p a_p^T, where a_p is the input of
the layer at this position (for a convolution: the patch under the kernel) and d_p the output gradient. A bias counts as
a weight with a constant input of 1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_neuro.checks import ArgumentError, describe, require
from lightning_neuro.refinement.layer_gradients import CONVOLUTIONS, Convolution, is_linear, is_transposed_linear

# One chunk should fit into the cache of a CPU; a GPU needs enough work for all of its cores.
_CPU_CHUNK_BYTES = 4 * 2**20
_GPU_CHUNK_BYTES = 256 * 2**20


def gradient_norms(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Tensor:
    """The norm |G| of each sample's gradient with respect to weight and bias.

    For a linear layer with one position per sample, |G| = |d| |a|. Otherwise the cheaper of two forms is used,
    depending on the size of the layer: |G|^2 = sum_pq <a_p, a_q> <d_p, d_q> (Gram form), or G itself, for a few samples
    at a time.

    Args:
        module: `nn.Linear`, or `nn.Conv1d`, `Conv2d`, `Conv3d` with any stride, padding, dilation and groups.
        inputs: Input of the layer, (N, ..., in) for linear layers and (N, channels, ...) for convolutions; any floating
            dtype. It is converted to the dtype of the gradients, in which the layer ran.
        gradients: Gradient of the loss with respect to the output of the layer, in the same layout.

    Returns:
        (N,), in units of the loss per unit of weight: float32, or float64 for float64 gradients. In half precision the
        products G are rounded, and their squares are summed in float32.

    Raises:
        ArgumentError: If the layer is of another type, or the shapes do not fit it.

    Source:
        Goodfellow, *Efficient per-example gradient computations*, arXiv 1510.01799 (2015), for the closed form.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.sample_norms import gradient_norms
        >>> inputs, gradients = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0], [2.0]])
        >>> gradient_norms(torch.nn.Linear(2, 1, bias=False), inputs, gradients).tolist()
        [10.0, 0.0]
        >>> gradient_norms(torch.nn.Linear(2, 1), inputs, gradients)[1].item()
        2.0
    """
    _check(module, inputs, gradients)
    inputs = inputs.to(gradients.dtype)
    if isinstance(module, CONVOLUTIONS):
        squares, bias = _convolution(module, inputs, gradients), gradients.flatten(2).sum(2, dtype=_wide(gradients))
    elif inputs.ndim == 2:
        squares, bias = _square(inputs) * _square(gradients), gradients
    else:
        inputs, gradients = inputs.flatten(1, -2), gradients.flatten(1, -2)
        squares, bias = _tokens(inputs, gradients), gradients.sum(1, dtype=_wide(gradients))
    if module.bias is not None:
        squares = squares + _square(bias)
    # If its terms cancel, rounding can make the Gram form negative.
    norms: Tensor = squares.clamp(min=0).sqrt()
    return norms


def _tokens(inputs: Tensor, gradients: Tensor) -> Tensor:
    size = _cost(inputs.shape[2], gradients.shape[2], inputs.shape[1]) * inputs.element_size()
    return torch.cat([_square_of_sum(a.mT, d.mT) for a, d in _chunks(inputs, gradients, size)])


def _convolution(module: Convolution, inputs: Tensor, gradients: Tensor) -> Tensor:
    groups, out, positions = module.groups, gradients.shape[1], gradients.shape[2:].numel()
    patch = module.weight.shape[1:].numel()
    size = (groups * patch * positions + groups * _cost(patch, out // groups, positions)) * inputs.element_size()
    squares = []
    for a, d in _chunks(inputs, gradients, size):
        patches = unfold(module, a).reshape(len(a) * groups, patch, positions)
        by_group = _square_of_sum(patches, d.reshape(len(d) * groups, out // groups, positions))
        squares.append(by_group.view(len(a), groups).sum(1))
    return torch.cat(squares)


def _square_of_sum(inputs: Tensor, gradients: Tensor) -> Tensor:
    """|sum_p d_p a_p^T|^2 of (N, in, P) and (N, out, P)."""
    if not _gram_is_cheaper(inputs.shape[1], gradients.shape[1], inputs.shape[2]):
        return _square(torch.bmm(gradients, inputs.mT).flatten(1))
    # Its terms have both signs, so they must not be rounded to half precision.
    inputs, gradients = inputs.to(_wide(inputs)), gradients.to(_wide(gradients))
    return (torch.bmm(inputs.mT, inputs) * torch.bmm(gradients.mT, gradients)).sum((1, 2))


def _gram_is_cheaper(features: int, out: int, positions: int) -> bool:
    """Whether P^2 (in + out) multiplications are fewer than P in out; the measured times cross at the same point."""
    return positions * (features + out) <= features * out


def _cost(features: int, out: int, positions: int) -> int:
    """Number of elements in the products of one sample."""
    return 2 * positions**2 if _gram_is_cheaper(features, out, positions) else features * out


def _chunks(inputs: Tensor, gradients: Tensor, bytes_per_sample: int) -> Iterator[tuple[Tensor, Tensor]]:
    limit = _CPU_CHUNK_BYTES if inputs.device.type == "cpu" else _GPU_CHUNK_BYTES
    samples = max(1, limit // max(1, bytes_per_sample))
    return zip(torch.split(inputs, samples), torch.split(gradients, samples), strict=True)


def unfold(module: Convolution, inputs: Tensor) -> Tensor:
    """The patches of the input under the kernel of a convolution, one for each position of the output.

    Args:
        module: The convolution.
        inputs: (N, channels, ...).

    Returns:
        (N, channels x kernel, positions). The output of the layer is its weight, flattened to (out, channels x kernel),
        times the patches (group by group).

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.sample_norms import unfold
        >>> unfold(torch.nn.Conv1d(1, 1, 2, stride=2), torch.arange(4.0).reshape(1, 1, 4)).tolist()
        [[[0.0, 2.0], [1.0, 3.0]]]
    """
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    patches, dims = inputs, len(module.kernel_size)
    for dim, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        patches = patches.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return patches.permute(order).flatten(1 + dims + 1).flatten(1, 1 + dims)


def _square(vectors: Tensor) -> Tensor:
    """|v|^2 of each row, (N, n) -> (N,)."""
    return vectors.to(_wide(vectors)).square().sum(1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(module: nn.Module, inputs: Tensor, gradients: Tensor) -> None:
    supported = is_linear(module) or isinstance(module, CONVOLUTIONS)
    require(supported, "module", "be nn.Linear, nn.Conv1d, Conv2d or Conv3d", module)
    if isinstance(module, CONVOLUTIONS):
        features, out, axis = module.in_channels, module.out_channels, 1
        fits = inputs.ndim == gradients.ndim == 2 + len(module.kernel_size)
    else:
        assert is_linear(module)
        out, features = module.weight.T.shape if is_transposed_linear(module) else module.weight.shape
        axis = -1
        fits = inputs.ndim >= 2 and inputs.shape[:-1] == gradients.shape[:-1]
    fits = fits and len(inputs) == len(gradients) and (inputs.shape[axis], gradients.shape[axis]) == (features, out)
    if not fits:
        raise ArgumentError(
            f"`inputs` and `gradients` must belong to a batch of inputs and outputs of {module}; got"
            f" {describe(inputs)} and {describe(gradients)}."
        )
