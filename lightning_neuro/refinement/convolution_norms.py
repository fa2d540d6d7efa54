"""Squared norms of the per-sample weight gradients of a convolution, by the form that costs least.

The gradient of a sample is G = sum_p d_p a_p^T over the positions p of the output, where a_p is the patch of the input
under the kernel. Four forms of |G|^2 have the same value:

* patches: G, or the Gram form sum_pq <a_p, a_q> <d_p, d_q>, from all patches a_p, for any convolution;
* pixels: the Gram form for stride 1. The inner product of two patches is a sum of those of their pixels, which are as
  many times fewer as the kernel has elements;
* rows: G by Toom-Cook interpolation, for kernels of height 3 and stride 1, with half of the multiplications.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_neuro.refinement import toom_cook
from lightning_neuro.refinement.patches import Convolution, padded, patches_of
from lightning_neuro.refinement.position_sums import (
    chunks,
    gram,
    gram_is_cheaper,
    num_elements,
    product_of_grams,
    square,
    square_of_sum,
    wide,
)

# The time to write an element of an intermediate result, in multiplications of a matrix product; measured on CPUs.
_WRITE = 16


class Form(NamedTuple):
    """One way to compute squared norms.

    Attributes:
        squares: Module, padded inputs (N, channels, ...) and gradients (N, out, ...) -> (N,).
        multiplications: Number of multiplications for one sample.
        elements: Number of elements of intermediate results of one sample.
    """

    squares: Callable[[Convolution, Tensor, Tensor], Tensor]
    multiplications: int
    elements: int

    @property
    def cost(self) -> int:
        """The time that it takes, in multiplications."""
        return self.multiplications + _WRITE * self.elements


def convolution_squares(module: Convolution, inputs: Tensor, gradients: Tensor) -> Tensor:
    """|G|^2 of each sample, without the bias.

    Args:
        module: The convolution.
        inputs: Its input, (N, channels, ...).
        gradients: Gradient of the loss with respect to its output, (N, out, ...), in the dtype of the input.

    Returns:
        (N,), float32 or float64.
    """
    form = min(possible_forms(module, inputs, gradients), key=lambda form: form.cost)
    parts = chunks(inputs, gradients, form.elements)
    return torch.cat([form.squares(module, padded(module, a), d) for a, d in parts])


def possible_forms(module: Convolution, inputs: Tensor, gradients: Tensor) -> list[Form]:
    """The forms that can be used for a convolution, with their costs."""
    groups, out, positions = module.groups, gradients.shape[1] // module.groups, gradients.shape[2:].numel()
    channels, patch = inputs.shape[1] // groups, module.weight.shape[1:].numel()
    pads = module._reversed_padding_repeated_twice[::-1]
    sizes = [size + sum(pads[2 * dim : 2 * dim + 2]) for dim, size in enumerate(inputs.shape[2:])]
    factors = positions * (patch + out) if gram_is_cheaper(patch, out, positions) else patch * out
    forms = [
        Form(
            _by_patches,
            groups * positions * factors,
            groups * (patch * positions + num_elements(patch, out, positions)),
        )
    ]
    if any(stride != 1 for stride in module.stride):
        return forms
    pixels = prod(sizes)
    if patch > channels:
        products = pixels**2 * channels + (pixels - _reach(module, sizes)) ** 2 * out
        # Once for each dimension of the kernel, and for the product with the other Gram matrix.
        forms.append(Form(_by_pixels, groups * products, groups * (len(sizes) + 2) * pixels**2))
    if _fits_toom_cook(module) and inputs.dtype == wide(inputs):
        height, columns = gradients.shape[2], module.kernel_size[1]
        kept = toom_cook.PRODUCTS * columns * channels * out
        area = -(-height // toom_cook.TILE) * sizes[1]
        # In and out of the transforms.
        moved = 2 * (toom_cook.PRODUCTS * area * (channels + out) + kept // groups)
        forms.append(Form(_by_rows, groups * kept * area, groups * moved))
    return forms


def _by_patches(module: Convolution, inputs: Tensor, gradients: Tensor) -> Tensor:
    num, groups = len(inputs), module.groups
    patches = patches_of(module, inputs)
    patches = patches.reshape(num * groups, -1, patches.shape[2])
    return square_of_sum(patches, gradients.reshape(num * groups, -1, patches.shape[2])).view(num, groups).sum(1)


def _by_pixels(module: Convolution, inputs: Tensor, gradients: Tensor) -> Tensor:
    num, groups, sizes = len(inputs), module.groups, inputs.shape[2:]
    products = gram(inputs.reshape(num * groups, -1, sizes.numel()))
    # A step by one element of the kernel is the same distance everywhere in the flattened, padded input.
    for dim, (kernel, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        step = dilation * sizes[dim + 1 :].numel()
        length = products.shape[1] - (kernel - 1) * step
        shifted = [
            products[:, first : first + length, first : first + length] for first in range(0, kernel * step, step)
        ]
        if kernel > 1:
            products = shifted[0] + shifted[1]
            for part in shifted[2:]:
                products += part
    spread = _spread(gradients, sizes).reshape(num * groups, -1, sizes.numel())[..., : products.shape[1]]
    return product_of_grams(products, gram(spread)).view(num, groups).sum(1)


def _by_rows(module: Convolution, inputs: Tensor, gradients: Tensor) -> Tensor:
    num, groups, (height, width) = len(inputs), module.groups, inputs.shape[2:]
    offsets = tuple(module.dilation[1] * column for column in range(module.kernel_size[1]))
    a = inputs.reshape(num * groups, -1, height, width)
    d = pad(gradients, (0, offsets[-1])).reshape(num * groups, -1, gradients.shape[2], width)
    return square(toom_cook.kernel_gradients(a, d, offsets).flatten(1)).view(num, groups).sum(1)


def _fits_toom_cook(module: Convolution) -> bool:
    return len(module.kernel_size) == 2 and module.kernel_size[0] == toom_cook.KERNEL and module.dilation[0] == 1


def _reach(module: Convolution, sizes: list[int]) -> int:
    """Distance between the first and the last element of the kernel in the flattened, padded input."""
    ends = [(kernel - 1) * dilation for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    return sum(end * prod(sizes[dim + 1 :]) for dim, end in enumerate(ends))


def _spread(gradients: Tensor, sizes: torch.Size) -> Tensor:
    """Gradients at the places of the padded input where their patches begin, and 0 elsewhere."""
    missing = [size - own for size, own in zip(sizes, gradients.shape[2:], strict=True)]
    return pad(gradients, [part for end in reversed(missing) for part in (0, end)])
