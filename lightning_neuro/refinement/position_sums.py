"""|G|^2 of G = sum_p d_p a_p^T, a sum over the positions p (pixels, tokens) of one sample, for many samples."""

from collections.abc import Iterator

import torch
from torch import Tensor

# One chunk should fit into the cache of a CPU; a GPU needs enough work for all of its cores.
CPU_CHUNK_BYTES = 4 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20


def square_of_sum(inputs: Tensor, gradients: Tensor) -> Tensor:
    """|sum_p d_p a_p^T|^2 of each sample, by the cheaper of two forms: G itself, or sum_pq <a_p, a_q> <d_p, d_q>.

    Args:
        inputs: (N, in, positions), the vectors a_p.
        gradients: (N, out, positions), the vectors d_p.

    Returns:
        (N,), float32 or float64.
    """
    if not gram_is_cheaper(inputs.shape[1], gradients.shape[1], inputs.shape[2]):
        return square(torch.bmm(gradients, inputs.mT).flatten(1))
    return product_of_grams(gram(inputs), gram(gradients))


def gram_is_cheaper(features: int, out: int, positions: int) -> bool:
    """Whether P^2 (in + out) multiplications are fewer than P in out; the measured times cross at the same point."""
    return positions * (features + out) <= features * out


def num_elements(features: int, out: int, positions: int) -> int:
    """Number of elements in the products of one sample."""
    return 2 * positions**2 if gram_is_cheaper(features, out, positions) else features * out


def gram(vectors: Tensor) -> Tensor:
    """(N, features, P) -> (N, P, P) inner products, in float32 or float64.

    The terms of their sum have both signs, so they must not be rounded to half precision.
    """
    vectors = vectors.to(wide(vectors))
    return torch.bmm(vectors.mT, vectors)


def product_of_grams(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of pairs of matrices, (N, P, P) -> (N,); the first is overwritten."""
    return one.mul_(other).sum((1, 2))


def square(vectors: Tensor) -> Tensor:
    """|v|^2 of each row, (N, n) -> (N,), in float32 or float64."""
    return vectors.to(wide(vectors)).square().sum(1)


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which squares are summed: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def chunks(inputs: Tensor, gradients: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A few samples at a time.

    Args:
        inputs: (N, ...).
        gradients: (N, ...).
        elements: Number of elements that are computed of each sample.
    """
    limit = CPU_CHUNK_BYTES if inputs.device.type == "cpu" else GPU_CHUNK_BYTES
    samples = max(1, limit // max(1, elements * inputs.element_size()))
    return zip(torch.split(inputs, samples), torch.split(gradients, samples), strict=True)
