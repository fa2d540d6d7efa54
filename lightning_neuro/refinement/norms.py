"""How long each sample's own weight gradient is, from a layer's inputs and output gradients, without a backward pass.

The weight gradient of one sample is G = sum over positions p (pixels, tokens) of d_p a_p^T, with the layer's input a_p
there (for a convolution: the patch under the kernel) and the output gradient d_p. A bias counts as a weight on a
constant input of 1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What is worked on at a time should stay in a CPU's cache; a GPU wants work for all of its cores.
_CPU_CHUNK_BYTES = 4 * 2**20
_GPU_CHUNK_BYTES = 256 * 2**20


def gradient_norms(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Tensor:
    """|G| of each sample: how hard it pulls at the weights and the bias of a layer.

    A linear layer that sees one position a sample has a closed form, |d| |a|. Elsewhere the cheaper of two ways is
    taken, by the layer's size: |G|^2 = sum_pq <a_p, a_q> <d_p, d_q> (Gram form), or G itself, a few samples at a time.

    Args:
        module: `nn.Linear`, or `nn.Conv1d`, `Conv2d`, `Conv3d` with any stride, padding, dilation and groups.
        inputs: The layer's input, (N, ..., in) for linear layers and (N, channels, ...) for convolutions; any floating
            dtype. It is brought to the gradients' dtype, in which the layer ran.
        gradients: The gradient of the loss with respect to the layer's output, laid out the same way.

    Returns:
        (N,), in units of the loss per unit of weight: float32, or float64 for float64 gradients. In half precision the
        products G are rounded, their squares are added up in float32.

    Raises:
        ValueError: If the layer is of another type or the shapes do not belong to it.

    Source:
        Goodfellow, *Efficient per-example gradient computations*, arXiv 1510.01799 (2015), for the closed form.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.norms import gradient_norms
        >>> inputs, gradients = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0], [2.0]])
        >>> gradient_norms(torch.nn.Linear(2, 1, bias=False), inputs, gradients).tolist()
        [10.0, 0.0]
        >>> gradient_norms(torch.nn.Linear(2, 1), inputs, gradients)[1].item()
        2.0
    """
    _check(module, inputs, gradients)
    inputs = inputs.to(gradients.dtype)
    if isinstance(module, _CONVOLUTIONS):
        squares, bias = _convolution(module, inputs, gradients), gradients.flatten(2).sum(2, dtype=_wide(gradients))
    elif inputs.ndim == 2:
        squares, bias = _square(inputs) * _square(gradients), gradients
    else:
        inputs, gradients = inputs.flatten(1, -2), gradients.flatten(1, -2)
        squares, bias = _tokens(inputs, gradients), gradients.sum(1, dtype=_wide(gradients))
    if module.bias is not None:
        squares = squares + _square(bias)
    # The Gram form can fall below 0 by rounding where its terms cancel.
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
    # Its terms have both signs, so rounded ones would not do.
    inputs, gradients = inputs.to(_wide(inputs)), gradients.to(_wide(gradients))
    return (torch.bmm(inputs.mT, inputs) * torch.bmm(gradients.mT, gradients)).sum((1, 2))


def _gram_is_cheaper(features: int, out: int, positions: int) -> bool:
    """Whether P^2 (in + out) multiplications beat P in out; measured, the times cross where these do."""
    return positions * (features + out) <= features * out


def _cost(features: int, out: int, positions: int) -> int:
    """Numbers that one sample's products take."""
    return 2 * positions**2 if _gram_is_cheaper(features, out, positions) else features * out


def _chunks(inputs: Tensor, gradients: Tensor, bytes_per_sample: int) -> Iterator[tuple[Tensor, Tensor]]:
    limit = _CPU_CHUNK_BYTES if inputs.device.type == "cpu" else _GPU_CHUNK_BYTES
    samples = max(1, limit // max(1, bytes_per_sample))
    return zip(torch.split(inputs, samples), torch.split(gradients, samples), strict=True)


def unfold(module: Convolution, inputs: Tensor) -> Tensor:
    """The patches that a convolution's kernel lies on.

    Args:
        module: The convolution.
        inputs: (N, channels, ...).

    Returns:
        (N, channels x kernel, positions): its output is the weight, flattened to (out, channels x kernel), times this
        (group by group).

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.norms import unfold
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
    if isinstance(module, _CONVOLUTIONS):
        ndim, features, out, axis = 2 + len(module.kernel_size), module.in_channels, module.out_channels, 1
        fits = inputs.ndim == gradients.ndim == ndim
    elif isinstance(module, nn.Linear):
        features, out, axis = module.in_features, module.out_features, -1
        fits = inputs.ndim >= 2 and inputs.shape[:-1] == gradients.shape[:-1]
    else:
        raise ValueError(f"module must be nn.Linear, nn.Conv1d, Conv2d or Conv3d; got {type(module).__name__}.")
    fits = fits and len(inputs) == len(gradients) and (inputs.shape[axis], gradients.shape[axis]) == (features, out)
    if not fits:
        raise ValueError(
            f"inputs and gradients must be a batch of {module}'s inputs and outputs; got the shapes"
            f" {tuple(inputs.shape)} and {tuple(gradients.shape)}."
        )
