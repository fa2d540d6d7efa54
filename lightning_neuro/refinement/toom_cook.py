"""Sums of products of shifted rows with half of the multiplications: Toom-Cook interpolation, known from Winograd.

The gradient of a kernel of height 3 is, along the rows, y_k = sum_i d_i a_{i + k} for k = 0, 1, 2. Over tiles of 4 rows
d_i this takes 12 products. It is the transpose of the product of two polynomials with 3 and 4 coefficients, which 6
values determine, so 6 products suffice: y = E_3^T ((E_4 d) * (E_6^-T a)), where E_n evaluates n coefficients at 6
points.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

KERNEL, TILE = 3, 4
PRODUCTS = KERNEL + TILE - 1
# And infinity. Small numbers, so that little precision is lost.
_POINTS = (0, 1, -1, 2, -2)


@lru_cache
def transforms(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices E_6^-T (6, 6), E_4 (6, 4) and E_3^T (3, 6)."""

    def evaluation(degree: int) -> Tensor:
        rows = [[float(point) ** power for power in range(degree)] for point in _POINTS]
        return torch.tensor([*rows, [0.0] * (degree - 1) + [1.0]], dtype=torch.float64)

    found = (torch.linalg.inv(evaluation(PRODUCTS)).T, evaluation(TILE), evaluation(KERNEL).T)
    inputs, gradients, outputs = (matrix.to(device, dtype) for matrix in found)
    return inputs, gradients, outputs


def kernel_gradients(inputs: Tensor, gradients: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """The gradient of a kernel with 3 rows, for each sample.

    Args:
        inputs: (N, in, height + 2, width), padded input of a convolution with stride 1.
        gradients: (N, out, height, width), its output gradients; columns beyond its output are 0.
        offsets: Columns of the kernel: 0, dilation, 2 x dilation, ...

    Returns:
        (N, 3, columns x out x in).

    Example:
        >>> inputs, gradients = torch.arange(6.0).view(1, 1, 6, 1), torch.ones(1, 1, 4, 1)
        >>> kernel_gradients(inputs, gradients, (0,)).flatten().round().tolist()
        [6.0, 10.0, 14.0]
    """
    of_inputs, of_gradients, back = transforms(inputs.device, inputs.dtype)
    num, (height, width) = len(inputs), gradients.shape[2:]
    tiles = -(-height // TILE)
    if missing := tiles * TILE - height:
        inputs, gradients = pad(inputs, (0, 0, 0, missing)), pad(gradients, (0, 0, 0, missing))
    rows = inputs.unfold(2, PRODUCTS, TILE).permute(0, 4, 1, 2, 3).reshape(num, PRODUCTS, -1)
    a = (of_inputs @ rows).view(num * PRODUCTS, inputs.shape[1], -1)
    rows = gradients.reshape(num, -1, tiles, TILE, width).permute(0, 3, 1, 2, 4).reshape(num, TILE, -1)
    d = (of_gradients @ rows).view(num * PRODUCTS, gradients.shape[1], -1)
    length = tiles * width - offsets[-1]
    products = [torch.bmm(d[..., :length], a[..., offset : offset + length].mT) for offset in offsets]
    return back @ torch.stack(products, 1).view(num, PRODUCTS, -1)
