"""The patches of an input under the kernel of a convolution."""

from torch import Tensor, nn
from torch.nn.functional import pad

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def padded(module: Convolution, inputs: Tensor) -> Tensor:
    """The input of a convolution with its padding."""
    if not any(module._reversed_padding_repeated_twice):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(inputs, module._reversed_padding_repeated_twice, mode=mode)


def patches_of(module: Convolution, inputs: Tensor) -> Tensor:
    """The patches of the padded input under the kernel of a convolution, one for each position of the output.

    Args:
        module: The convolution.
        inputs: (N, channels, ...), padded.

    Returns:
        (N, channels x kernel, positions). The output of the layer is its weight, flattened to (out, channels x kernel),
        times the patches (group by group).

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.patches import patches_of
        >>> patches_of(torch.nn.Conv1d(1, 1, 2, stride=2), torch.arange(4.0).reshape(1, 1, 4)).tolist()
        [[[0.0, 2.0], [1.0, 3.0]]]
    """
    patches, dims = inputs, len(module.kernel_size)
    for dim, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        patches = patches.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return patches.permute(order).flatten(1 + dims + 1).flatten(1, 1 + dims)
