"""Norms of per-sample weight gradients, from the inputs and output gradients of a layer, without a backward pass.

The weight gradient of one sample is the sum over positions p (pixels, tokens) of d_p a_p^T, where a_p is the input of
the layer at this position (for a convolution: the patch under the kernel) and d_p the output gradient. A bias counts as
a weight with a constant input of 1.
"""

import torch
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError, describe, require
from lightning_neuro.refinement.convolution_norms import convolution_squares
from lightning_neuro.refinement.layer_gradients import is_linear, is_transposed_linear
from lightning_neuro.refinement.patches import CONVOLUTIONS
from lightning_neuro.refinement.position_sums import chunks, num_elements, square, square_of_sum, wide


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
        squares, bias = (
            convolution_squares(module, inputs, gradients),
            gradients.flatten(2).sum(2, dtype=wide(gradients)),
        )
    elif inputs.ndim == 2:
        squares, bias = square(inputs) * square(gradients), gradients
    else:
        inputs, gradients = inputs.flatten(1, -2), gradients.flatten(1, -2)
        squares, bias = _tokens(inputs, gradients), gradients.sum(1, dtype=wide(gradients))
    if module.bias is not None:
        squares = squares + square(bias)
    # If its terms cancel, rounding can make the Gram form negative.
    norms: Tensor = squares.clamp(min=0).sqrt()
    return norms


def _tokens(inputs: Tensor, gradients: Tensor) -> Tensor:
    size = num_elements(inputs.shape[2], gradients.shape[2], inputs.shape[1])
    return torch.cat([square_of_sum(a.mT, d.mT) for a, d in chunks(inputs, gradients, size)])


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
